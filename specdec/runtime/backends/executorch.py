"""The ExecuTorch backend: steps on the fixed-width graphs of an exported artefact.

A step runs in the narrowest graph that holds its rows; a wider one in several. Which slot of the graph's buffers a slot
of the session stands in is a table on the host, so that a commit permutes the table and copies nothing. One program
holds one text's keys and values; where texts take turns, what the slots hold is exchanged.

Shape suffixes: M rows of a step, T rows of a graph, C slots of the session in use, S slots of a graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.export import lower
from specdec.export.artifact import ArtifactModel
from specdec.export.manifest import PROGRAM, ArtifactError
from specdec.export.options import SWAP, Method
from specdec.export.plan import Run, plan
from specdec.export.step import HIDDEN
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult


class _Inputs:
    """A graph's input tensors, filled again for every step."""

    def __init__(self, method: Method, num_slots: int, num_masks: int):
        width = method.width
        self.tokens, self.positions, self.slots = (torch.zeros(width, dtype=torch.int64) for _ in range(3))
        self.row = [torch.zeros(1, dtype=torch.int64)] if method.one_logit else []
        self.masks = [torch.empty(width, num_slots + 1) for _ in range(num_masks)]

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (self.tokens, self.positions, self.slots, *self.row, *self.masks)


class _Program:
    """The loaded artefact: what all texts share, and whose keys and values its slots hold."""

    def __init__(self, model: ArtifactModel):
        lower.installed_version()
        lower.load_operators()
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        manifest = model.manifest
        self.model, self.options = model, manifest.options
        if portable_lib._threadpool_get_thread_count() != torch.get_num_threads() and not _loaded:
            portable_lib._unsafe_reset_threadpool(torch.get_num_threads())  # unsafe beside a program that runs
        program = Runtime.get().load_program(model.folder / PROGRAM)
        if lower.CONTRACT not in program.method_names:
            raise ArtifactError(f"{model.folder}: {PROGRAM} carries no contract; export the model again")
        manifest.check_contract(model.folder, _method(program, lower.CONTRACT, model.folder).execute(())[0])
        self.methods = self.options.methods
        names = (*(m.name for m in self.methods), SWAP)
        self._methods = {name: _method(program, name, model.folder) for name in names}
        self._program = program
        self.kinds: list[str] = manifest.model["attention_kinds"]
        self.window: int = manifest.model["sliding_window"] or 0
        slots = self.options.num_slots
        self._empty = tuple(
            torch.zeros(1, slots + 1, heads, size) for heads, *sizes in manifest.model["slots"] for size in sizes
        )
        self.inputs = {m.name: _Inputs(m, slots, len(self.kinds)) for m in self.methods}
        self.lock = threading.RLock()
        self._holder: weakref.ref[ExecutorchBackend] | None = None
        self.num_swaps = 0
        self._check_slots()
        _loaded.add(self)

    def _check_slots(self) -> None:
        """Raise unless what each graph writes is there for the others: without common buffers texts would be wrong."""
        self.execute(SWAP, self._empty)
        for method in self.methods:
            inputs = self.inputs[method.name]
            for tensor in inputs.all[:3]:
                tensor.zero_()
            inputs.slots[1:] = self.options.num_slots  # the bin
            for mask in inputs.masks:
                mask.fill_(HIDDEN)[:, 0] = 0
            self.execute(method.name, inputs.all)
            if not any(bool(held[0, 0].any()) for held in self.execute(SWAP, self._empty)):
                raise ArtifactError(
                    f"{self.model.folder}: what {method.name} writes is not there for the other graphs: the program "
                    "was exported without common buffers. Export the model again"
                )

    @property
    def slot_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._empty)

    def holder(self) -> ExecutorchBackend | None:
        return self._holder() if self._holder is not None else None

    def hold(self, backend: ExecutorchBackend) -> None:
        """From now on the slots are those of this text; what they held is kept by the one before, if it lives."""
        before = self.holder()
        if before is backend:
            return
        old = self.execute(SWAP, backend.kept or self._empty)
        self.num_swaps += 1
        if before is not None:
            before.kept = old
        backend.kept = None
        self._holder = weakref.ref(backend)

    def release(self, backend: ExecutorchBackend) -> tuple[Tensor, ...] | None:
        """What this text's slots hold, which nobody may write; None where it has not written any."""
        if self.holder() is backend:
            backend.kept = self.execute(SWAP, self._empty)
            self._holder = None
        return backend.kept

    def execute(self, name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(self._methods[name].execute(inputs))


_loaded: weakref.WeakSet[_Program] = weakref.WeakSet()


def _method(program: Any, name: str, folder: Path) -> Any:
    if name not in program.method_names:
        raise ArtifactError(f"{folder}: {PROGRAM} has no graph {name!r}, which the manifest promises; export again")
    return program.load_method(name)


class ExecutorchBackend(Backend):
    """Runs an artefact of `specdec export`; the model it is opened on is an `ArtifactModel`.

    Lossless: yes; float rounding differs between graphs, as between any two row counts of stock products.
    """

    def __init__(self, program: _Program):
        self._program = program
        self.kept: tuple[Tensor, ...] | None = None  # keys and values while another text is in the program
        self._places_S = torch.arange(program.options.num_slots)  # of the session's slots

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        if not isinstance(model, ArtifactModel):
            raise UnsupportedModelError(
                f"the executorch backend runs exported artefacts, not a loaded {type(model).__name__}: export it once, "
                "`specdec export TARGET --out DIR`, then use DIR in place of the model"
            )
        if options:
            raise InputError(f"the executorch backend takes no option, not {sorted(options)}")
        return cls(_Program(model))

    @property
    def capabilities(self) -> Capabilities:
        program = self._program
        return Capabilities(
            vocab_size=program.model.manifest.model["vocab_size"],
            context=program.options.max_seq_len,
            device=program.model.device,
            dtype=program.model.dtype,
            nodes=program.options.max_nodes,
            shares=False,
            hidden=program.options.hidden,
            widths=tuple(sorted({m.width for m in program.methods})),
        )

    @property
    def family(self) -> object:
        return self._program

    @property
    def describes(self) -> str:
        options = self._program.options
        widths = ", ".join(map(str, self.capabilities.widths or ()))
        return f"executorch on {options.delegate}, graphs of {widths} rows, {options.max_seq_len} positions"

    def expose(self, hidden: Sequence[int]) -> None:
        lacking = self.capabilities.lacks(hidden=hidden)
        if lacking is not None:
            wanted = ",".join(map(str, sorted({*hidden, *self._program.options.hidden})))
            raise InputError(f"this artefact {lacking}; export it with --hidden {wanted}")

    @torch.inference_mode()
    def forward(self, step: Step) -> StepResult:
        program = self._program
        if step.end > program.options.num_slots:
            raise InputError(f"the artefact has {program.options.num_slots} slots, and the step needs {step.end}")
        if step.hidden:
            self.expose(step.hidden)
        places_C = self._places_S[: step.end]
        bias_MC = [self._bias(step, kind) for kind in program.kinds]
        logits: list[Tensor] = []
        states: list[Tensor] = []
        with program.lock:
            program.hold(self)
            for run in plan(program.methods, step.num_rows, step.num_logits):
                out = self._run(run, step, places_C, bias_MC)
                count = run.end - run.start
                if run.num_logits:
                    logits.append(out[0][:1] if run.method.one_logit else out[0][count - run.num_logits : count])
                if step.hidden:
                    states.append(out[1][:count])
        return StepResult(_joined(logits), self._hidden_rows(_joined(states), step.hidden) if states else None)

    def _bias(self, step: Step, kind: str) -> Tensor:
        """0 where a row sees a slot of the session, `HIDDEN` elsewhere; `[M, C]`."""
        allowed = step.mask_MC
        if kind == "sliding_attention":
            allowed = allowed & (step.positions[:, None] - step.key_positions_C[None, :] < self._program.window)
        return torch.full(allowed.shape, HIDDEN).masked_fill_(allowed, 0.0)

    def _run(self, run: Run, step: Step, places_C: Tensor, bias_MC: Sequence[Tensor]) -> tuple[Tensor, ...]:
        inputs, count = self._program.inputs[run.method.name], run.end - run.start
        rows = slice(run.start, run.end)
        inputs.tokens[:count] = step.tokens[rows]
        inputs.positions[:count] = step.positions[rows]
        inputs.positions[count:] = 0
        inputs.slots[:count] = places_C[step.start + run.start : step.start + run.end]
        inputs.slots[count:] = self._program.options.num_slots  # the bin
        for row in inputs.row:
            row.fill_(count - 1)
        for mask, bias in zip(inputs.masks, bias_MC, strict=True):
            mask.fill_(HIDDEN)
            mask[:count].index_copy_(1, places_C, bias[rows])
        return self._program.execute(run.method.name, inputs.all)

    def _hidden_rows(self, states_MW: Tensor, wanted: Sequence[int]) -> Tensor:
        given = self._program.options.hidden
        if tuple(wanted) == given:
            return states_MW
        parts = states_MW.chunk(len(given), -1)
        return torch.cat([parts[given.index(i)] for i in wanted], -1)

    def gather(self, slots: Sequence[int], start: int) -> None:
        """A permutation of the table: the named slots' places come to stand in order, nothing is copied."""
        end = start + len(slots)
        if list(slots) == list(range(start, end)):
            return
        named = list(slots)
        touched = sorted({*named, *range(start, end)})
        rest = [slot for slot in touched if slot not in set(named)]
        order = [slot for slot in touched if not start <= slot < end]  # these get what is left over
        places = self._places_S.clone()
        places[start:end] = self._places_S[named]
        places[order] = self._places_S[rest]
        self._places_S = places

    def fork(self, length: int) -> Self:
        twin = type(self)(self._program)
        if length:
            with self._program.lock:
                twin.kept = self._program.release(self)
            twin._places_S = self._places_S.clone()
        return twin

    @property
    def bytes_per_token(self) -> int:
        return self._program.slot_bytes // (self._program.options.num_slots + 1)

    def bytes_for(self, length: int) -> int:
        """All of them: a graph's slots do not grow."""
        return self._program.slot_bytes

    @property
    def num_bytes(self) -> int:
        holds = self.kept is not None or self._program.holder() is self
        return self._program.slot_bytes if holds else 0


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
