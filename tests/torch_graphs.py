"""Artefacts whose graphs are run by torch, as they were before any compiler saw them: the host's part without minutes.

The graphs are called with what a runtime would give them, and return new tensors, as a runtime does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.export.artifact import ArtifactModel
from specdec.export.executorch import ExecutorchOptions
from specdec.export.manifest import Manifest
from specdec.export.options import Method
from specdec.export.step import StaticStep
from specdec.export.step_io import IoStep
from specdec.runtime.artifacts import ArtifactBackend, Inputs, Program
from specdec.runtime.backends.executorch import ExecutorchBackend
from specdec.runtime.hosted import HostProgram
from specdec.runtime.updaters import HOST_UPDATERS, SCATTER
from specdec.vocabulary import output_size

#: Narrow graphs and a small context, so that steps are cut and contexts end.
SMALL = ExecutorchOptions(prefill_len=8, k=(0, 3), max_seq_len=96, max_nodes=16, hidden=(0, 1, 2), kv="both")


def artifact(model: Any, options: ExecutorchOptions = SMALL) -> ArtifactModel:
    """What stands for the model, without a folder."""
    step, config = StaticStep(model, 1, attention="plain"), model.config.get_text_config(decoder=True)
    facts = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": output_size(model),
        "hidden_size": config.hidden_size,
        "attention_kinds": list(step.kinds),
        "sliding_window": getattr(config, "sliding_window", None),
        "slots": [[shape.heads, shape.key_size, shape.value_size] for shape in step.shapes],
    }
    contract = {"backend": "executorch", "options": options.as_dict(), "model": facts, "versions": {}}
    return ArtifactModel(Path("nowhere"), Manifest(contract, {}), model.config, model.generation_config)


class Hosted(HostProgram):
    """Graphs that are given keys and values."""

    def __init__(self, model: Any, options: ExecutorchOptions, updater: str):
        super().__init__(artifact(model, options))
        self.prepare(HOST_UPDATERS[updater])
        self._step = IoStep(model, options.num_slots, hidden=options.hidden)
        self.calls: list[str] = []

    @property
    def describes(self) -> str:
        return f"torch, {self.updater.name}"

    def run_graph(self, method: Method, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        self.calls.append(method.name)
        given = [(tensor.shape, tensor.dtype) for tensor in inputs]
        step = self._step.last_only() if method.one_logit else self._step
        assert given == [(tensor.shape, tensor.dtype) for tensor in step.example(method.width)]
        assert all(tensor.is_contiguous() for tensor in inputs)  # a runtime takes an address and a shape
        return [tensor.clone() for tensor in step(*inputs)]


class Owning(Program):
    """Graphs that scatter rows into slots of their own, one set for each text."""

    def __init__(self, model: Any, options: ExecutorchOptions):
        super().__init__(artifact(model, options))
        self._step = StaticStep(model, options.num_slots, hidden=options.hidden, attention="plain")
        self.calls: list[str] = []

    @property
    def describes(self) -> str:
        return "torch, scatter"

    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        self.calls.append(method.name)
        if text.state is None:
            text.state = {name: torch.zeros_like(buffer) for name, buffer in self._step.named_buffers(recurse=False)}
        for name, buffer in text.state.items():
            setattr(self._step, name, buffer)
        step = self._step.last_only() if method.one_logit else self._step
        for name, buffer in text.state.items():
            setattr(step, name, buffer)
        return tuple(tensor.clone() for tensor in step(*inputs.all))

    def duplicate(self, text: ArtifactBackend) -> dict[str, Tensor] | None:
        return text.state and {name: buffer.clone() for name, buffer in text.state.items()}


def opened(model: Any, updater: str, options: ExecutorchOptions = SMALL) -> ExecutorchBackend:
    """The backend of artefacts on these graphs."""
    return ExecutorchBackend(Owning(model, options) if updater == SCATTER else Hosted(model, options, updater))
