"""Steps on the native kernels: what all sequences of an opened model share, and what each has of its own.

Shape suffixes: M rows of one step, L rows with logits, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.kernels import ops
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.cache import bucket
from specdec.runtime.native import Exposing


class Opened(ABC):
    """`exposing`: the hidden states that come with the logits."""

    def __init__(self, exposing: Exposing, capabilities: Capabilities, num_layers: int, kv_cache: str | None):
        self.exposing, self.capabilities, self.kv_cache = exposing, capabilities, kv_cache
        self._num_layers = num_layers
        self.steps = ops.steps()
        self.handle: Tensor = self.steps.handle()
        self.lock = threading.Lock()

    def slots(self) -> Any:
        """Of a new sequence."""
        return ops.slots(self._num_layers, self.kv_cache)

    def exact_slots(self) -> Any:
        """For comparisons: a difference in the last bit can move a stored code by a whole step."""
        return ops.slots(self._num_layers)

    def run(self, tokens: Tensor, positions: Tensor, rows: Tensor, inputs: Tensor | None) -> Sequence[Tensor]:
        """Logits `[L, V]`, then the exposed hidden states, `[M, W]` each."""
        given = [tokens[None], positions[None], rows, self.handle]
        if inputs is not None:
            given.append(inputs[None])
        return self.call(given)

    @abstractmethod
    def call(self, given: list[Tensor]) -> Sequence[Tensor]:
        """The step itself."""

    def adopt(self) -> None:
        """Between texts: do what makes later steps faster, where there is something to do."""
        return None


class NativeBackend(Backend):
    """Slots in native memory, and calls that take the rows of many sequences at once."""

    def __init__(self, opened: Opened, slots: Any = None):
        self._opened = opened
        self._slots = slots if slots is not None else opened.slots()

    @property
    def _capacity(self) -> int:
        return int(self._slots.capacity())

    @property
    def capabilities(self) -> Capabilities:
        return self._opened.capabilities

    @property
    def family(self) -> object:
        return self._opened

    @property
    def kv_cache(self) -> str | None:
        return self._opened.kv_cache

    def forward(self, step: Step) -> StepResult:
        return type(self).forward_many([self], [step])[0]

    @classmethod
    @torch.inference_mode()
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """Rows of several sequences in one call of the model; each attends to its own slots."""
        opened = backends[0]._opened
        with opened.lock:
            opened.steps.clear()
            for backend, step in zip(backends, steps, strict=True):
                backend._place(step)
            if len(steps) == 1:
                tokens, positions = steps[0].tokens, steps[0].positions
                rows = _last_rows(len(tokens), steps[0].num_logits)
            else:
                tokens, positions = (torch.cat([getattr(s, name) for s in steps]) for name in ("tokens", "positions"))
                rows = _rows_of(tuple((s.num_rows, s.num_logits) for s in steps))
            inputs = None
            if opened.capabilities.input_width:
                given = [step.inputs_MW for step in steps if step.inputs_MW is not None]
                inputs = torch.cat(given) if len(given) > 1 else given[0]
            logits, *exposed = opened.run(tokens, positions, rows, inputs)
            states = [h.split([s.num_rows for s in steps]) for h in exposed]
            # Still locked: another thread may expose other states, which then come in another order.
            hidden = [opened.exposing.hidden_rows(step.hidden, [h[i] for h in states]) for i, step in enumerate(steps)]
        parts = logits.split([s.num_logits for s in steps]) if len(steps) > 1 else (logits,)
        return [StepResult(part, rows) for part, rows in zip(parts, hidden, strict=True)]

    def _place(self, step: Step) -> None:
        """Name this sequence's rows and slots to the next call."""
        if step.end > self._capacity:
            self._slots.reserve(bucket(step.end, max(self.capabilities.context, step.end)))
        self._opened.steps.add(
            self._slots, step.start, step.num_rows, step.prefix, step.block_MB, step.block_positions_B
        )

    def gather(self, slots: Sequence[int], start: int) -> None:
        self._slots.gather(list(slots), start)

    def fork(self, length: int) -> Self:
        if length == 0:
            self._opened.adopt()
            return type(self)(self._opened)
        return type(self)(self._opened, self._slots.fork(length))

    def on_slots_of(self, other: Backend) -> Self:
        if not isinstance(other, NativeBackend) or other._slots.num_layers() != self._slots.num_layers():
            return super().on_slots_of(other)
        return type(self)(self._opened, other._slots)

    @property
    def num_bytes(self) -> int:
        return int(self._slots.num_bytes())


@lru_cache(maxsize=4096)
def _last_rows(count: int, wanted: int) -> Tensor:
    return torch.arange(count - wanted, count)


@lru_cache(maxsize=4096)
def _rows_of(sizes: tuple[tuple[int, int], ...]) -> Tensor:
    """Which rows of a packed step have logits: the last of each sequence's."""
    ends = list(accumulate(count for count, _ in sizes))
    return torch.cat([torch.arange(end - wanted, end) for end, (_, wanted) in zip(ends, sizes, strict=True)])
