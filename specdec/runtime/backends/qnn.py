"""The QNN backend: an artefact for Qualcomm's HTP, run in the functional emulator that its compiler comes with.

Keys and values lie on the host, which hands them to each graph and writes the rows that come back. Results are those
of the chip's arithmetic; times are the emulator's, and say nothing of a chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export import htp
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError
from specdec.export.onnx_graphs import CONTRACT
from specdec.export.options import Method
from specdec.export.qnn import installed_version, part_folder
from specdec.export.sections import in_turn
from specdec.runtime.artifacts import ArtifactBackend, Program
from specdec.runtime.hosted import HostProgram, host_updater
from specdec.runtime.updaters import Updater


class _Program(HostProgram):
    def __init__(self, model: ArtifactModel, updater: type[Updater]):
        installed_version()
        super().__init__(model)
        self.hidden_score = self.options.hidden_score
        self._soc = htp.soc_of(self.options.soc)
        self._sessions: dict[tuple[int, str], Any] = {}
        self._session(0, self.methods[0])  # refuses now what cannot run
        self.prepare(updater)

    def _session(self, part: int, method: Method) -> Any:
        """Compiled at the first use: x86 cannot load the binary."""
        if (part, method.name) not in self._sessions:
            folder = self.model.folder / part_folder(part)
            made = htp.session(folder / f"{method.name}.onnx", self._soc)
            inside = made.get_modelmeta().custom_metadata_map.get(CONTRACT)
            if inside is None:
                raise ArtifactError(f"{folder}: {method.name}.onnx carries no contract; export the model again")
            self.model.manifest.check_contract(folder, inside)
            self._sessions[part, method.name] = made
        return self._sessions[part, method.name]

    def run_graph(self, method: Method, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        def run(part: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
            made = self._session(part, method)
            feed = {value.name: tensor.numpy() for value, tensor in zip(made.get_inputs(), own, strict=True)}
            return [torch.from_numpy(array) for array in made.run(None, feed)]

        return in_turn(self.parts, run, inputs, len(self._rooms), len(self.kinds), self.options.hidden)

    @property
    def describes(self) -> str:
        return f"qnn in {self.options.recipe} for {self._soc.name}, emulated, {self.updater.name}"


class QnnBackend(ArtifactBackend):
    """Runs artefacts of `specdec export --backend qnn`.

    Lossless: up to ties, with the model as the HTP computes it in half precision, not in float32. With weights
    of 8 or 4 bits graphs of different widths differ by about a percent of the largest logit; closer choices may differ.
    """

    name = "qnn"

    @staticmethod
    def load(model: ArtifactModel, kv_updater: str | None = None, **options: Any) -> Program:
        """`kv_updater`: how the host writes keys and values, of `HOST_UPDATERS`."""
        if options:
            raise InputError(f"the qnn backend takes kv_updater only, not {sorted(options)}")
        return _Program(model, host_updater(kv_updater, "qnn"))
