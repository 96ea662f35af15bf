"""Steps on the fixed-width graphs of an exported artefact: what all backends of artefacts do on the host.

A step runs in the narrowest graph that holds its rows; a wider one in several. Which slot of the graphs a slot of the
session stands in is a table on the host, so that a commit permutes the table and copies nothing.

Shape suffixes: M rows of a step, T rows of a graph, C slots of the session in use, S slots of a graph.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.export.artifact import ArtifactModel
from specdec.export.options import Method
from specdec.export.plan import Run, plan
from specdec.export.sections import spans
from specdec.export.step import HIDDEN
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult


class Inputs:
    """A graph's input tensors: tokens, positions, slots `[T]`, row `[1]`, masks `[T, S]`."""

    def __init__(self, method: Method, num_slots: int, num_masks: int):
        width = method.width
        self.tokens, self.positions, self.slots = (torch.zeros(width, dtype=torch.int64) for _ in range(3))
        self.row = [torch.zeros(1, dtype=torch.int64)] if method.one_logit else []
        self.masks = [torch.empty(width, num_slots + 1) for _ in range(num_masks)]

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (self.tokens, self.positions, self.slots, *self.row, *self.masks)


class Program(ABC):
    """A loaded artefact: what all texts on it share. What a text has of its own hangs on its backend's `state`.

    `execute` is called by one thread at a time.
    """

    def __init__(self, model: ArtifactModel):
        manifest = model.manifest
        self.model = model
        self.options: Any = manifest.options
        self.methods = self.options.methods
        self.parts = spans(len(manifest.model["slots"]), self.options.parts, self.options.hidden)
        self.kinds: list[str] = manifest.model["attention_kinds"]
        self.window: int = manifest.model["sliding_window"] or 0
        self.inputs = {m.name: Inputs(m, self.options.num_slots, len(self.kinds)) for m in self.methods}
        self.lock = threading.RLock()

    @abstractmethod
    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        """Logits `[T, V]` (of one row where the graph gives one) and hidden states `[T, W]` if there are any.

        The first `count` rows are real; the others' slot is the bin. What is written is there for the text's next call.
        """

    @abstractmethod
    def duplicate(self, text: ArtifactBackend) -> Any:
        """The state of a second text that begins with the slots of this one; both go on by themselves."""

    def gather(self, text: ArtifactBackend, slots: Sequence[int], start: int) -> bool:
        """Whether the program renames the text's slots itself, so that they always stand in order."""
        return False

    @property
    @abstractmethod
    def describes(self) -> str:
        """What runs the graphs, in a word or two."""

    @property
    def device(self) -> torch.device:
        """Where logits are wanted; not always where graphs run."""
        return torch.device("cpu")

    @property
    def empty(self) -> tuple[Tensor, ...]:
        """Keys and values of a text that has written nothing, `[1, S, K, D]` for each layer in turn."""
        slots = self.options.num_slots + 1
        shapes = self.model.manifest.model["slots"]
        return tuple(
            torch.zeros(1, slots, heads, size, dtype=self.slot_dtype) for heads, *sizes in shapes for size in sizes
        )

    @property
    def slot_dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def slot_bytes(self) -> int:
        """Of one text's keys and values."""
        shapes = self.model.manifest.model["slots"]
        per_slot = sum(int(heads) * (int(key) + int(value)) for heads, key, value in shapes)
        return per_slot * (int(self.options.num_slots) + 1) * self.slot_dtype.itemsize

    def holds(self, text: ArtifactBackend) -> bool:
        """Whether a text has keys and values anywhere."""
        return text.state is not None


class ArtifactBackend(Backend):
    """Runs an artefact of `specdec export`; the model it is opened on is an `ArtifactModel`. A subclass per runtime.

    Lossless: yes; float rounding differs between graphs, as between any two row counts of stock products.
    """

    name: ClassVar[str]

    def __init__(self, program: Program):
        self._program = program
        self.state: Any = None  # what this text has of its own; the program's matter
        self._places_S = torch.arange(program.options.num_slots)  # of the session's slots

    @staticmethod
    @abstractmethod
    def load(model: ArtifactModel, **options: Any) -> Program:
        """Open the program for running. Raises `InputError` for options that it does not take."""

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        artifact = check_artifact(model, cls.name)
        return cls(cls.load(artifact, **{**artifact.runtime_options, **options}))

    @property
    def capabilities(self) -> Capabilities:
        program = self._program
        return Capabilities(
            vocab_size=program.model.manifest.model["vocab_size"],
            context=program.options.max_seq_len,
            device=program.device,
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
        widths = ", ".join(map(str, self.capabilities.widths or ()))
        parts = f" in {len(self._program.parts)} parts" if len(self._program.parts) > 1 else ""
        positions = self._program.options.max_seq_len
        return f"{self._program.describes}, graphs of {widths} rows{parts}, {positions} positions"

    def expose(self, hidden: Sequence[int]) -> None:
        check_exposed(self.capabilities, hidden)

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
        return self._program.execute(self, run.method, inputs, count)

    def _hidden_rows(self, states_MW: Tensor, wanted: Sequence[int]) -> Tensor:
        given = self._program.options.hidden
        if tuple(wanted) == given:
            return states_MW
        parts = states_MW.chunk(len(given), -1)
        return torch.cat([parts[given.index(i)] for i in wanted], -1)

    def gather(self, slots: Sequence[int], start: int) -> None:
        """A permutation of the table: the named slots' places come to stand in order, nothing is copied."""
        end = start + len(slots)
        if list(slots) == list(range(start, end)) or self._program.gather(self, slots, start):
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
                twin.state = self._program.duplicate(self)
            twin._places_S = self._places_S.clone()
        return twin

    @property
    def bytes_per_token(self) -> int:
        return self._program.slot_bytes // (int(self._program.options.num_slots) + 1)

    def bytes_for(self, length: int) -> int:
        """All of them: a graph's slots do not grow."""
        return self._program.slot_bytes

    @property
    def num_bytes(self) -> int:
        return self._program.slot_bytes if self._program.holds(self) else 0


def check_artifact(model: Any, name: str) -> ArtifactModel:
    """Raise `UnsupportedModelError` for what is no artefact, or one for another backend than the one of that name."""
    if not isinstance(model, ArtifactModel):
        raise UnsupportedModelError(
            f"the {name} backend runs exported artefacts, not a loaded {type(model).__name__}: export it once, "
            f"`specdec export TARGET --backend {name} --out DIR`, then use DIR in place of the model"
        )
    if model.specdec_backend != name:
        raise UnsupportedModelError(
            f"{model.folder} is an artefact for the {model.specdec_backend} backend, not for {name}"
        )
    return model


def check_exposed(capabilities: Capabilities, hidden: Sequence[int]) -> None:
    """Raise `InputError` for hidden states that an artefact was exported without."""
    lacking = capabilities.lacks(hidden=hidden)
    if lacking is not None:
        wanted = ",".join(map(str, sorted({*hidden, *(capabilities.hidden or ())})))
        raise InputError(f"this artefact {lacking}; export it with --hidden {wanted}")


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
