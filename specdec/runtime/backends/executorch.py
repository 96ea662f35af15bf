"""The ExecuTorch backend, with keys and values in the program or on the host.

A program's own slots hold one text's keys and values: where texts take turns, they are exchanged. Graphs that are given
keys and values leave them to the host, each text's to an updater of its own, and nothing is exchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export import executorch
from specdec.export.artifact import ArtifactModel
from specdec.export.delegates import check_runtime
from specdec.export.executorch import PROGRAM, SWAP
from specdec.export.manifest import ArtifactError
from specdec.export.options import Method
from specdec.export.sections import by_part, in_turn, numbered, swapped
from specdec.export.step import HIDDEN
from specdec.runtime.artifacts import ArtifactBackend, Inputs, Program
from specdec.runtime.hosted import HostProgram
from specdec.runtime.updaters import HOST_UPDATERS, SCATTER, UPDATERS, SmartMask, Updater


class _Loaded(Program):
    """The program and those of its graphs that are wanted."""

    def __init__(self, model: ArtifactModel, names: Sequence[str]):
        executorch.installed_version()
        executorch.load_operators()
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        super().__init__(model)
        if portable_lib._threadpool_get_thread_count() != torch.get_num_threads() and not _loaded:
            portable_lib._unsafe_reset_threadpool(torch.get_num_threads())  # unsafe beside a program that runs
        runtime = Runtime.get()
        check_runtime(self.options.delegate, runtime.backend_registry.registered_backend_names, model.folder)
        self._programs, self._methods = [], []
        for index in range(len(self.parts)):
            file = numbered(PROGRAM, index)
            if file not in model.manifest.files:
                raise ArtifactError(f"{model.folder}: the manifest lists no {file}; export the model again")
            program = runtime.load_program(model.folder / file)
            if executorch.CONTRACT not in program.method_names:
                raise ArtifactError(f"{model.folder}: {file} carries no contract; export the model again")
            inside = _method(program, executorch.CONTRACT, model.folder, file).execute(())[0]
            model.manifest.check_contract(model.folder, inside)
            self._methods.append({name: _method(program, name, model.folder, file) for name in names})
            self._programs.append(program)
        _loaded.add(self)

    @property
    def describes(self) -> str:
        return f"executorch on {self.options.delegate}"

    def call(self, name: str, inputs: Sequence[Tensor], num_held: int = 0) -> tuple[Tensor, ...]:
        """One graph, through all parts. The last `num_held` inputs are keys and values that it is given."""

        def run(index: int, own: Sequence[Tensor]) -> Sequence[Tensor]:
            out: Sequence[Tensor] = self._methods[index][name].execute(own)
            return out

        if name == SWAP:
            return swapped(self.parts, run, inputs)
        return in_turn(self.parts, run, inputs, num_held, len(self.kinds), self.options.hidden)


class _Owning(_Loaded):
    """A text's `state` is what its slots held when another one's came into the program; None where they are in it."""

    def __init__(self, model: ArtifactModel):
        super().__init__(model, (*(m.name for m in model.manifest.options.methods), SWAP))
        self._empty = self.empty
        self._holder: weakref.ref[ArtifactBackend] | None = None
        self.num_swaps = 0
        self._check_slots()

    def _check_slots(self) -> None:
        """Raise unless what each graph writes is there for the others: without common buffers texts would be wrong."""
        self.call(SWAP, self._empty)
        for method in self.methods:
            inputs = self.inputs[method.name]
            for tensor in inputs.all[:3]:
                tensor.zero_()
            inputs.slots[1:] = self.options.num_slots  # the bin
            for mask in inputs.masks:
                mask.fill_(HIDDEN)[:, 0] = 0
            self.call(method.name, inputs.all)
            held = by_part(self.parts, self.call(SWAP, self._empty))
            if not all(any(bool(tensor[0, 0].any()) for tensor in own) for own in held):
                raise ArtifactError(
                    f"{self.model.folder}: what {method.name} writes is not there for the other graphs: the program "
                    "was exported without common buffers. Export the model again"
                )

    def holder(self) -> ArtifactBackend | None:
        return self._holder() if self._holder is not None else None

    def holds(self, text: ArtifactBackend) -> bool:
        return text.state is not None or self.holder() is text

    def _hold(self, text: ArtifactBackend) -> None:
        """From now on the slots are those of this text; what they held is kept by the one before, if it lives."""
        before = self.holder()
        if before is text:
            return
        old = self.call(SWAP, text.state or self._empty)
        self.num_swaps += 1
        if before is not None:
            before.state = old
        text.state = None
        self._holder = weakref.ref(text)

    def duplicate(self, text: ArtifactBackend) -> tuple[Tensor, ...] | None:
        """What this text's slots hold, which nobody may write; None where it has not written any."""
        if self.holder() is text:
            text.state = self.call(SWAP, self._empty)
            self._holder = None
        kept: tuple[Tensor, ...] | None = text.state
        return kept

    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        self._hold(text)
        return self.call(method.name, inputs.all)


class _Given(HostProgram, _Loaded):
    """Graphs that are given keys and values."""

    def __init__(self, model: ArtifactModel, updater: type[Updater]):
        super().__init__(model, [executorch.host_graph(m) for m in model.manifest.options.methods])
        self.prepare(updater)

    @property
    def describes(self) -> str:
        return f"{super().describes}, {self.updater.name}"

    def run_graph(self, method: Method, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.call(executorch.host_graph(method), inputs, len(self._rooms))


_loaded: weakref.WeakSet[_Loaded] = weakref.WeakSet()


def _method(program: Any, name: str, folder: Path, file: str) -> Any:
    if name not in program.method_names:
        raise ArtifactError(f"{folder}: {file} has no graph {name!r}, which the manifest promises; export again")
    return program.load_method(name)


class ExecutorchBackend(ArtifactBackend):
    """Runs artefacts of `specdec export --backend executorch`.

    Lossless: yes, as every backend of artefacts; with a recipe nearly: activations are rounded at each step, and a last
    digit of attention in a wider graph can move one to the next value.
    """

    name = "executorch"

    @staticmethod
    def load(model: ArtifactModel, kv_updater: str | None = None, **options: Any) -> Program:
        """`kv_updater`: who writes keys and values and where, of `UPDATERS`; None: what the artefact has graphs for."""
        if options:
            raise InputError(f"the executorch backend takes kv_updater only, not {sorted(options)}")
        given: Any = model.manifest.options
        kv: str = given.kv
        name = kv_updater or (SmartMask.name if kv == "host" else SCATTER)
        if name not in UPDATERS:
            raise InputError(f"a KV updater is one of {', '.join(UPDATERS)}, not {name!r}")
        lacking = "graph" if kv == "host" and name == SCATTER else "host" if kv == "graph" and name != SCATTER else None
        if lacking is not None:
            raise InputError(
                f"{model.folder} has no graphs for the KV updater {name}: export it with --kv both, or --kv {lacking}"
            )
        return _Owning(model) if name == SCATTER else _Given(model, HOST_UPDATERS[name])
