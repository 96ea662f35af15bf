"""The compiled backend: native kernels under one ahead-of-time graph for any number of rows and sequences.

Shape suffixes: M rows of one step, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import BackendWarning, InputError, UnsupportedModelError
from specdec.kernels import ops
from specdec.runtime import graph
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult, stored_as
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.cache import bucket
from specdec.runtime.check import DRAFT_TOLERANCE, TOLERANCE, apart, check_step, compare
from specdec.runtime.native import NativeModel, unsupported
from specdec.runtime.worker import Worker

COMPILE = ("auto", "now", "never")
# Compiling takes about this long. It starts once as many seconds went into steps without a graph, which is at most
# twice what the best choice in hindsight would have cost.
SECONDS_BEFORE = 30.0


class _Shared:
    """What all sequences of one opened model share."""

    def __init__(self, model: Any, stock: EagerBackend, when: str, only_drafts: bool = False):
        self.stock, self.when = stock, when
        self.tolerance = DRAFT_TOLERANCE if only_drafts else TOLERANCE[stock.capabilities.dtype]
        self.native = NativeModel(model)
        self.steps = ops.steps()
        self.handle: Tensor = self.steps.handle()
        self.lock = threading.Lock()
        self.graph: graph.Graph | None = None
        self.worker: Worker | None = None
        self.failure: str | None = None
        self.looked = False  # for a graph that is there already
        self.at_once = when == "now"
        self.python_seconds = 0.0
        # Bits differ between the graph and the model's own Python: it comes by itself only where tokens hardly notice.
        self.may_switch = only_drafts or stock.capabilities.dtype in (torch.float32, torch.float64)

    def slots(self) -> Any:
        """Of a new sequence."""
        return ops.slots(len(self.native.windows), self.stock.kv_cache)

    def exact_slots(self) -> Any:
        """For comparisons: a difference in the last bit can move a stored code by a whole step."""
        return ops.slots(len(self.native.windows))

    def run(self, tokens: Tensor, positions: Tensor, rows: Tensor, inputs: Tensor | None) -> Sequence[Tensor]:
        """Logits `[L, V]`, then the exposed hidden states, `[M, W]` each."""
        given = [tokens[None], positions[None], rows, self.handle]
        if inputs is not None:
            given.append(inputs[None])
        if self.graph is not None and len(tokens) <= graph.MAX_ROWS:
            return self.graph(*given)
        started = time.perf_counter()
        out: tuple[Tensor, ...] = self.native(*given)
        self.python_seconds += time.perf_counter() - started
        return out

    def expose(self, hidden: Sequence[int]) -> None:
        """Return these hidden states too from now on. A graph without them is given up for one that has them."""
        with self.lock:
            if not self.native.expose(hidden):
                return
            # Whoever compiled the last one wants this one compiled.
            self.at_once = self.at_once or self.graph is not None
            self.graph, self.worker, self.failure, self.looked = None, None, None, False

    def adopt(self) -> None:
        """Between texts: load what a worker has compiled meanwhile, or start one when it pays."""
        if self.graph is not None or self.when == "never" or self.failure:
            return
        if not self.looked:
            self.looked = True
            if self.at_once:
                self.compile()
            else:
                self.find()
            return
        if self.when != "auto" or not self.may_switch:
            return
        if self.worker is None:
            if self.python_seconds > SECONDS_BEFORE:
                self.worker = Worker(self.native)
        elif self.worker.finished:
            self.failure = self.worker.failure
            if not self.failure:
                self.find()

    def take(self, made: graph.Graph | None) -> None:
        """Use a graph from now on. Raises when its logits are not those of the model's own Python."""
        if made is None:
            return
        step = check_step(self.stock.capabilities, self.native.input_width)
        python = CompiledBackend(self, self.exact_slots()).forward(step).logits
        self.graph = made
        try:
            share = apart(CompiledBackend(self, self.exact_slots()).forward(step).logits, python, self.tolerance)
            if share is not None:
                raise RuntimeError(f"the graph's logits are off by {share:.1e} of the largest")
        except Exception:
            self.graph = None
            raise

    def compile(self) -> None:
        self.obtain(lambda: graph.find(self.native) or graph.compile(self.native, self.handle))

    def find(self) -> None:
        self.obtain(lambda: graph.find(self.native))

    def obtain(self, make: Callable[[], graph.Graph | None]) -> None:
        """`take` what `make` gives; a failure is one warning."""
        try:
            self.take(make())
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.failure = f"{type(error).__name__}: {first}"
            warnings.warn(
                f"the step of {type(self.native.model).__name__} could not be compiled ({self.failure}); "
                "it runs without a graph, on the same kernels",
                BackendWarning,
                stacklevel=3,
            )


class CompiledBackend(Backend):
    """Steps on native kernels, compiled ahead of time when that pays.

    `compile`: "auto" takes a graph that is there already and makes one, in the background, once enough time went into
    steps without it; "now" compiles at once, as `warmup()` does; "never" stays without. `kv_cache`: how keys and values
    are stored (`specdec.quant.kv`); graphs do not depend on it.

    Lossless: yes. Where `numerics` is "invariant", a row has the same bits in every step of the same kind (with the
    graph, or without), however many rows, trees or other sequences ride along.
    """

    def __init__(self, shared: _Shared, slots: Any = None):
        self._shared = shared
        self._slots = slots if slots is not None else shared.slots()

    @property
    def _capacity(self) -> int:
        return int(self._slots.capacity())

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        when, kv_cache = options.pop("compile", "auto"), options.pop("kv_cache", None)
        if options or when not in COMPILE:
            raise InputError(
                f"the compiled backend takes compile= one of {COMPILE}, and kv_cache=, not {options or when!r}"
            )
        backend = cls._checked(model, when, kv_cache=kv_cache)
        if when == "now":
            backend.warmup()
        return backend

    @classmethod
    def open_draft(cls, model: Any) -> Self:
        return cls._checked(model, "auto", only_drafts=True)

    @classmethod
    def _checked(cls, model: Any, when: str, only_drafts: bool = False, kv_cache: str | None = None) -> Self:
        stock = EagerBackend.open(model, kv_cache=kv_cache)
        reason = unsupported(model)
        if reason:
            raise UnsupportedModelError(f"{reason}; use backend='eager'")
        backend = cls(_Shared(model, stock, when, only_drafts))
        backend._check()
        return backend

    def _check(self) -> None:
        """Compare a few rows with the stock step: an attention layer may do what no argument tells."""
        shared = self._shared
        step = check_step(self.capabilities, shared.native.input_width)
        compare(
            lambda: type(self)(shared, shared.exact_slots()).forward(step).logits,
            lambda: EagerBackend(shared.stock.model).forward(step).logits,
            shared.stock.model,
            shared.tolerance,
        )

    @property
    def capabilities(self) -> Capabilities:
        return self._shared.stock.capabilities

    @property
    def family(self) -> object:
        return self._shared

    @property
    def kv_cache(self) -> str | None:
        return self._shared.stock.kv_cache

    @property
    def numerics(self) -> str:
        return "fast" if self._shared.native.stock else "invariant"

    @property
    def describes(self) -> str:
        self._shared.adopt()
        kind = "one compiled graph" if self._shared.graph is not None else "the model's own Python"
        stock = f", stock products in {', '.join(self._shared.native.stock)}" if self._shared.native.stock else ""
        return f"native kernels ({ops.isa()}), {kind}{stock}{stored_as(self.kv_cache)}"

    def warmup(self) -> None:
        if self._shared.graph is None:
            self._shared.compile()

    def expose(self, hidden: Sequence[int]) -> None:
        self._shared.expose(hidden)

    def forward(self, step: Step) -> StepResult:
        return type(self).forward_many([self], [step])[0]

    @classmethod
    @torch.inference_mode()
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """Rows of several sequences in one call of the model; each attends to its own slots."""
        shared = backends[0]._shared
        with shared.lock:
            shared.steps.clear()
            for backend, step in zip(backends, steps, strict=True):
                backend._place(step)
            if len(steps) == 1:
                tokens, positions = steps[0].tokens, steps[0].positions
                rows = _last_rows(len(tokens), steps[0].num_logits)
            else:
                tokens, positions = (torch.cat([getattr(s, name) for s in steps]) for name in ("tokens", "positions"))
                rows = _rows_of(tuple((s.num_rows, s.num_logits) for s in steps))
            inputs = None
            if shared.native.input_width:
                given = [step.inputs_MW for step in steps if step.inputs_MW is not None]
                inputs = torch.cat(given) if len(given) > 1 else given[0]
            logits, *exposed = shared.run(tokens, positions, rows, inputs)
            states = [h.split([s.num_rows for s in steps]) for h in exposed]
            # Still locked: another thread may expose other states, which then come in another order.
            hidden = [shared.native.hidden_rows(step.hidden, [h[i] for h in states]) for i, step in enumerate(steps)]
        parts = logits.split([s.num_logits for s in steps]) if len(steps) > 1 else (logits,)
        return [StepResult(part, rows) for part, rows in zip(parts, hidden, strict=True)]

    def _place(self, step: Step) -> None:
        """Name this sequence's rows and slots to the next call."""
        if step.end > self._capacity:
            self._slots.reserve(bucket(step.end, max(self.capabilities.context, step.end)))
        self._shared.steps.add(
            self._slots, step.start, step.num_rows, step.prefix, step.block_MB, step.block_positions_B
        )

    def gather(self, slots: Sequence[int], start: int) -> None:
        self._slots.gather(list(slots), start)

    def fork(self, length: int) -> Self:
        if length == 0:
            self._shared.adopt()
            return type(self)(self._shared)
        return type(self)(self._shared, self._slots.fork(length))

    def on_slots_of(self, other: Backend) -> Self:
        if not isinstance(other, CompiledBackend) or other._slots.num_layers() != self._slots.num_layers():
            return super().on_slots_of(other)
        return type(self)(self._shared, other._slots)

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
