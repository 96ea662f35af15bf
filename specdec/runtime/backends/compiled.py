"""The compiled backend: native kernels under one ahead-of-time graph for any number of rows and sequences."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import BackendWarning, InputError, UnsupportedModelError
from specdec.kernels import ops
from specdec.runtime import graph
from specdec.runtime.backend import stored_as
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.check import DRAFT_TOLERANCE, apart, check_step, compare, tolerance_of
from specdec.runtime.native import NativeModel, unsupported
from specdec.runtime.opened import NativeBackend, Opened
from specdec.runtime.worker import Worker

COMPILE = ("auto", "now", "never")
# Compiling takes about this long. It starts once as many seconds went into steps without a graph, which is at most
# twice what the best choice in hindsight would have cost.
SECONDS_BEFORE = 30.0


class _Shared(Opened):
    """A loaded model on the kernels, with the graph that it has or will have."""

    def __init__(self, model: Any, stock: EagerBackend, when: str, only_drafts: bool = False):
        self.native = NativeModel(model)
        super().__init__(self.native, stock.capabilities, len(self.native.windows), stock.kv_cache)
        self.stock, self.when = stock, when
        self.tolerance = DRAFT_TOLERANCE if only_drafts else tolerance_of(model, stock.capabilities.dtype)
        self.graph: graph.Graph | None = None
        self.worker: Worker | None = None
        self.failure: str | None = None
        self.looked = False  # for a graph that is there already
        self.at_once = when == "now"
        self.python_seconds = 0.0
        # Bits differ between the graph and the model's own Python: it comes by itself only where tokens hardly notice.
        self.may_switch = only_drafts or stock.capabilities.dtype in (torch.float32, torch.float64)

    def call(self, given: list[Tensor]) -> Sequence[Tensor]:
        if self.graph is not None and given[0].shape[1] <= graph.MAX_ROWS:
            return self.graph(*given)
        started = time.perf_counter()
        out: tuple[Tensor, ...] = self.native(*given)
        self.python_seconds += time.perf_counter() - started
        return out

    def expose(self, hidden: Sequence[int]) -> None:
        """A graph without them is given up for one that has them."""
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


class CompiledBackend(NativeBackend):
    """Steps on native kernels, compiled ahead of time when that pays.

    `compile`: "auto" takes a graph that is there already and makes one, in the background, once enough time went into
    steps without it; "now" compiles at once, as `warmup()` does; "never" stays without. `kv_cache`: how keys and values
    are stored (`specdec.quant.kv`); graphs do not depend on it.

    Lossless: yes. Where `numerics` is "invariant", a row has the same bits in every step of the same kind (with the
    graph, or without), however many rows, trees or other sequences ride along.
    """

    def __init__(self, shared: _Shared, slots: Any = None):
        super().__init__(shared, slots)
        self._shared = shared

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
    def numerics(self) -> str:
        return "fast" if self._shared.native.stock else "invariant"

    @property
    def describes(self) -> str:
        self._shared.adopt()
        kind = "one compiled graph" if self._shared.graph is not None else "the model's own Python"
        stock = f", stock products in {', '.join(self._shared.native.stock)}" if self._shared.native.stock else ""
        return f"native kernels ({ops.isa()}), {kind}{stock}{stored_as(self.kv_cache)}"

    def package(self) -> tuple[NativeModel, graph.Graph]:
        """The step as a graph, found or compiled now, and the module it was made of; `graph.path_of` names the file.

        Raises `UnsupportedModelError` when it cannot be compiled, or gives other logits.
        """
        shared = self._shared
        try:
            made = graph.find(shared.native) or graph.compile(shared.native, shared.handle)
            shared.take(made)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            name = type(shared.native.model).__name__
            raise UnsupportedModelError(f"the step of {name} could not be compiled: {first}") from error
        return shared.native, made

    def warmup(self) -> None:
        if self._shared.graph is None:
            self._shared.compile()

    def expose(self, hidden: Sequence[int]) -> None:
        self._shared.expose(hidden)
