"""The QNN backend: an artefact for Qualcomm's HTP, run in the functional emulator that its compiler comes with.

Keys and values lie on the host, which hands them to each graph and writes the rows that come back. Results are those
of the chip's arithmetic; times are the emulator's, and say nothing of a chip.

Shape suffixes: T rows of a graph, S slots, K heads of keys and values, D their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export import htp, onnx_graphs
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import ArtifactError
from specdec.export.options import Method
from specdec.export.qnn import QnnOptions, installed_version
from specdec.runtime.artifacts import ArtifactBackend, Inputs, Program


class _Program(Program):
    """A text's `state` is its keys `[K, D, S]` and values `[K, S, D]`, of each layer in turn."""

    def __init__(self, model: ArtifactModel):
        installed_version()
        super().__init__(model)
        assert isinstance(self.options, QnnOptions)
        self._soc = htp.soc_of(self.options.soc)
        self._hidden = self.options.hidden_score
        slots = self.options.num_slots
        self._masks = {m.name: [torch.empty(m.width, slots + m.width) for _ in self.kinds] for m in self.methods}
        self._sessions: dict[str, Any] = {}
        self._session(self.methods[0])  # refuses now what cannot run

    def _session(self, method: Method) -> Any:
        """Compiled at the first use: x86 cannot load the binary."""
        if method.name not in self._sessions:
            folder = self.model.folder
            made = htp.session(folder / f"{method.name}.onnx", self._soc, {}, {})
            inside = made.get_modelmeta().custom_metadata_map.get(onnx_graphs.CONTRACT)
            if inside is None:
                raise ArtifactError(f"{folder}: {method.name}.onnx carries no contract; export the model again")
            self.model.manifest.check_contract(folder, inside)
            self._sessions[method.name] = made
        return self._sessions[method.name]

    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        if text.state is None:
            text.state = self._new()
        places = inputs.slots[:count]
        given = [inputs.tokens.int(), inputs.positions.int(), *(row.int() for row in inputs.row)]
        given += [self._split(mine, mask, places) for mine, mask in zip(self._masks[method.name], inputs.masks, strict=True)]
        made = self._session(method)
        feed = {
            value.name: tensor.numpy()
            for value, tensor in zip(made.get_inputs(), (*given, *text.state), strict=True)
        }
        out = [torch.from_numpy(array) for array in made.run(None, feed)]
        results, new = out[: -len(text.state)], out[-len(text.state) :]
        for index, (held, rows) in enumerate(zip(text.state, new, strict=True)):
            axis = 1 if index % 2 else 2
            held.index_copy_(axis, places, rows.narrow(axis, 0, count))
        return tuple(results)

    def _split(self, mine: Tensor, mask_TS: Tensor, places: Tensor) -> Tensor:
        """What rows see of the slots, and of each other: a row is in no slot before the host has written it there."""
        slots, count = self.options.num_slots, len(places)
        mine.fill_(self._hidden)
        mine[:count, :slots] = mask_TS[:count, :slots].clamp(min=self._hidden)
        mine[:count, slots : slots + count] = mine[:count].index_select(1, places)
        mine.index_fill_(1, places, self._hidden)
        return mine

    def _new(self) -> list[Tensor]:
        slots, made = self.options.num_slots, []
        for heads, key_size, value_size in self.model.manifest.model["slots"]:
            made += [torch.zeros(heads, key_size, slots), torch.zeros(heads, slots, value_size)]
        return made

    def duplicate(self, text: ArtifactBackend) -> list[Tensor] | None:
        return None if text.state is None else [held.clone() for held in text.state]

    @property
    def describes(self) -> str:
        return f"qnn, {self.options.recipe} for {self._soc.name} in the emulator"


class QnnBackend(ArtifactBackend):
    """Lossless: with the model as the HTP computes it, in half precision or rounded; not with its float32 weights."""

    name = "qnn"

    @staticmethod
    def load(model: ArtifactModel, **options: Any) -> Program:
        if options:
            raise InputError(f"the qnn backend takes no option, not {sorted(options)}")
        return _Program(model)
