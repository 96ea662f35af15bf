"""Who writes artefacts: one exporter per backend, found by name. What they share is the static step and the folder."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export.options import Options
from specdec.export.sections import spans
from specdec.export.step import StaticStep

#: Where each backend's exporter stands. Imported when it is wanted: most need a package that is an extra.
EXPORTERS = {
    "aoti": "specdec.export.aoti:AotiExporter",
    "executorch": "specdec.export.executorch:ExecutorchExporter",
    "openvino": "specdec.export.openvino:OpenvinoExporter",
    "qnn": "specdec.export.qnn:QnnExporter",
}
#: Told what is going on.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Stored:
    """A model in torch whose weights are rounded as an artefact of it stores them: what graphs are to be compared with.

    `facts`: what the contract says of them. `num_bytes`: of all weights as they are stored.
    """

    model: Any
    facts: dict[str, Any]
    num_bytes: int


class Exporter(ABC):
    """Makes the program of an artefact; everything beside it (tokenizer, manifest, cache) is common to all."""

    name: ClassVar[str]
    options: ClassVar[type[Options]]
    program: ClassVar[str]  # the file without which a folder is no artefact of this backend
    dtype: ClassVar[torch.dtype] = torch.float32  # of the model that an export starts from
    parts: ClassVar[bool] = False  # whether layers may be spread over several programs
    real_time: ClassVar[bool] = True  # whether graphs run here as fast as they will; an emulator's do not

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Of the packages that make and run the program, by name.

        Raises `InputError` when one is not there, or was never tried with the torch that is.
        """

    def check(self, model: Any, options: Any) -> None:
        """Raise `InputError` or `UnsupportedModelError` for what cannot work, before minutes are spent."""
        given = next(model.parameters()).device.type
        if model.dtype != self.dtype or given != "cpu":
            name = str(self.dtype).removeprefix("torch.")
            raise InputError(
                f"an export starts from a {name} model on the CPU: load it with dtype='{name}', device='cpu'"
            )
        config = model.config.get_text_config(decoder=True)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and options.max_seq_len > context:
            raise InputError(f"max_seq_len is {options.max_seq_len}, and the model's context is {context}")
        bad = [i for i in options.hidden if not 0 <= i <= config.num_hidden_layers]
        if bad:
            raise InputError(f"hidden state {bad[0]}: the model has those from 0 to {config.num_hidden_layers}")
        if options.parts > 1 and not self.parts:
            raise InputError(f"a program for {self.name} is one part, and parts={options.parts} is given: leave it out")
        spans(config.num_hidden_layers, options.parts)

    def needs_text(self, options: Any) -> bool:
        """Whether the recipe looks at activations on a calibration text."""
        return False

    def store(self, model: Any, options: Any, calibration_BT: Tensor | None = None) -> Stored | None:
        """The model as `options.recipe` stores it; None where weights stay as they are, or only the graphs round them.

        `calibration_BT`: tokens of text for recipes that look at activations. Raises `InputError` where it is wanting.
        """
        return None

    @abstractmethod
    def step(self, model: Any, options: Any) -> StaticStep:
        """The module whose widths become the graphs."""

    @abstractmethod
    def lower(
        self, step: StaticStep, options: Any, contract: Mapping[str, Any], folder: Path, tell: Tell
    ) -> dict[str, Any]:
        """Write the program into the folder. Returns what the manifest says about it, `seconds` by stage among it."""


def together(coverage: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """What a delegate took of each graph, over all parts."""
    return {
        name: {what: sum(one[name][what] for one in coverage) for what in coverage[0][name]} for name in coverage[0]
    }


def exporter(name: str) -> Exporter:
    """Raises `InputError` for a backend that no artefact can be made for."""
    if name not in EXPORTERS:
        raise InputError(f"artefacts are made for {', '.join(EXPORTERS)}, not for {name!r}")
    module, _, kind = EXPORTERS[name].partition(":")
    made: Exporter = getattr(importlib.import_module(module), kind)()
    return made
