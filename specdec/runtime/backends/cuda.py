"""The CUDA backend: batch-invariant kernels, and one captured graph per width.

Shape suffixes: M rows of one step, V vocabulary, W width of hidden states or inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.kernels.plan import Layout, num_parts, size, views
from specdec.kernels.twin import TwinKernels
from specdec.quant.kv import kv_format
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.captured import Captured
from specdec.runtime.chain import Chain, Drafted, Rule, step_by_step
from specdec.runtime.chain_graphs import ChainGraphs
from specdec.runtime.check import check_step, compare
from specdec.runtime.device import DeviceKernels, DeviceSlots, place, sight, write_plan
from specdec.runtime.native import NativeModel, obstacle
from specdec.runtime.reductions import RowSums
from specdec.transfer import to_device

#: Rows of captured graphs. A step runs on the next wider one; wider steps run uncaptured.
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
# Slots of a tail in a captured graph: as many nodes as one path may have.
_TAIL = 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KERNELS = ("triton", "twin")


@dataclass(frozen=True)
class _Key:
    """What a captured graph is for."""

    width: int
    parts: int  # launched per row: follows from the capacity


class _Program(Captured):
    """A step of fixed width: its plan, and what its rows read besides tokens."""

    def __init__(self, shared: Shared, key: _Key):
        super().__init__()
        self.shared, self.key = shared, key
        device, dtype = shared.device, shared.stock.capabilities.dtype
        self.plan = torch.zeros(size(key.width, _TAIL), dtype=torch.int64, device=device)
        views(self.plan, key.width).rows[:, -1] = -1  # nothing is written while capturing
        width = shared.native.input_width
        self.inputs = torch.zeros(key.width, width, dtype=dtype, device=device) if width else None
        self.capture(device, shared.pool)

    def call(self) -> tuple[Tensor, ...]:
        """Logits `[M, V]` and exposed hidden states `[M, W]` of all rows."""
        self.shared.kernels.num_parts = self.key.parts
        return self.shared.call(self.plan, self.key.width, self.inputs)


class Shared:
    """What all sequences of one opened model share."""

    def __init__(self, model: Any, stock: EagerBackend, kernels: DeviceKernels):
        self.stock, self.kernels = stock, kernels
        self.device = stock.capabilities.device
        self.native = NativeModel(model, kernels=kernels)
        self.sums = RowSums(kernels.row_sum)
        self.lock = threading.Lock()
        self.programs: dict[_Key, _Program] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self.chains = ChainGraphs(self)
        # A model that reads inputs besides tokens cannot go on by itself.
        self.capabilities = replace(stock.capabilities, chains=not self.native.input_width)

    def call(self, plan: Tensor, width: int, inputs: Tensor | None, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """The model over a plan on the device: logits of `rows` (all), and exposed hidden states of all rows."""
        seen = views(plan, width)
        rows = torch.arange(width, device=plan.device) if rows is None else rows
        given = (seen.tokens[None], seen.positions[None], rows, plan)
        with self.sums:
            out: tuple[Tensor, ...] = self.native(*given, *(() if inputs is None else (inputs[None],)))
        return out

    def program(self, key: _Key) -> _Program:
        if key not in self.programs:
            self.programs[key] = _Program(self, key)
        return self.programs[key]

    def run(self, pairs: Sequence[tuple[DeviceSlots, Step]]) -> tuple[tuple[Tensor, ...], bool]:
        """Outputs of the steps' rows, one after another; and whether logits came for all rows or for those wanted."""
        sights = [sight(step) for _, step in pairs]
        count = sum(step.num_rows for _, step in pairs)
        tail = max(seen.tail_MT.shape[1] for seen in sights)
        parts = num_parts(max(slots.capacity for slots, _ in pairs))
        pinned = self.device.type == "cuda"
        if count <= WIDTHS[-1] and tail <= _TAIL:
            program = self.program(_Key(next(width for width in WIDTHS if width >= count), parts))
            plan = write_plan(pairs, program.key.width, _TAIL, pinned, sights)
            program.plan.copy_(plan, non_blocking=True)
            self._fill(program.plan, program.inputs, pairs)
            return tuple(out[:count].clone() for out in program.run()), True
        flat = to_device(write_plan(pairs, count, tail, pinned, sights), self.device)
        width, dtype = self.native.input_width, self.stock.capabilities.dtype
        inputs = torch.empty(count, width, dtype=dtype, device=self.device) if width else None
        self._fill(flat, inputs, pairs)
        self.kernels.num_parts = parts
        ends = 0
        wanted: list[int] = []
        for _, step in pairs:
            ends += step.num_rows
            wanted += range(ends - step.num_logits, ends)
        return self.call(flat, count, inputs, to_device(wanted, self.device)), False

    def _fill(self, plan: Tensor, inputs: Tensor | None, pairs: Sequence[tuple[DeviceSlots, Step]]) -> None:
        """What lies on the device already: a draft's tokens, and inputs."""
        at = 0
        for _, step in pairs:
            if step.tokens.device.type != "cpu":
                plan[at : at + step.num_rows].copy_(step.tokens)
            if inputs is not None:
                if step.inputs_MW is None:
                    raise InputError(
                        f"{type(self.stock.model).__name__} reads inputs besides tokens: the step has none"
                    )
                inputs[at : at + step.num_rows].copy_(to_device(step.inputs_MW, self.device))
            at += step.num_rows


def _layout(stock: EagerBackend, step: Step) -> tuple[Layout, StepResult]:
    """Sizes of every layer's keys and values, as the stock step makes them."""
    twin = stock.fork(0)
    result = twin.forward(step)
    layers = twin.cache.layers
    made = [(k.keys.shape[1], k.keys.shape[3], k.values.shape[3]) if k.is_initialized else None for k in layers]
    sizes = {heads for heads in made if heads is not None}
    if not sizes or (None in made and len(sizes) > 1):
        raise UnsupportedModelError(
            f"{type(stock.model).__name__} has layers without keys and values of their own; use backend='eager'"
        )
    # A part of a model leaves layers out; on the slots of the whole they have their place.
    return Layout(tuple(heads or next(iter(sizes)) for heads in made)), result


def unsupported(model: Any, kernels: str) -> str | None:
    """Why this backend cannot run a model with these kernels, in one line; None when it may."""
    devices = {p.device for p in model.parameters()}
    kinds = {device.type for device in devices}
    if len(devices) > 1:
        return f"the model is spread over {', '.join(sorted(map(str, devices)))}, and graphs run on one device"
    if kernels == "triton":
        if find_spec("triton") is None:
            return "triton is not installed (pip install triton, on Linux)"
        from specdec.kernels import triton_ops

        if kinds != {"cuda"} and not triton_ops.INTERPRETED:
            return f"the model is on {', '.join(kinds)}, not on a CUDA device"
    elif kinds != {"cpu"}:
        return "the twin kernels are for tests on the CPU"
    if model.dtype not in DTYPES:
        return f"the device kernels know float16, bfloat16, float32 and float64, not {model.dtype}"
    return obstacle(model)


def _make(kernels: str, layout: Layout) -> DeviceKernels:
    if kernels == "twin":
        return TwinKernels(layout)
    from specdec.kernels.triton_ops import TritonKernels

    return TritonKernels(layout)


class CudaBackend(Backend):
    """Steps on Triton kernels, captured as CUDA graphs: one per width of a step (1, 2, 4, … 64 rows).

    Tokens, positions and what rows see go to the device in one copy that nobody waits for; tokens that a draft left
    there stay there. Steps of more than 64 rows, such as those of a prefill, run on the same kernels without a graph.
    A chain that a draft asks for at once is one graph of all its steps.

    `kernels`: "triton", or "twin", the same in plain torch on the CPU, which is for tests; on a CPU without a graph
    everything else is as it is on the device.

    Lossless: yes. Where `numerics` is "invariant", a row has the same bits however many rows, trees or other sequences
    ride along.
    """

    def __init__(self, shared: Shared, slots: DeviceSlots | None = None):
        self._shared = shared
        self._slots = slots or DeviceSlots(shared.kernels, shared.stock.capabilities.dtype, shared.device)

    @classmethod
    @torch.inference_mode()
    def open(cls, model: Any, **options: Any) -> Self:
        kernels, format = options.pop("kernels", "triton"), kv_format(options.pop("kv_cache", None))
        if options or kernels not in KERNELS:
            raise InputError(f"the cuda backend takes kernels= one of {KERNELS}, not {options or kernels!r}")
        if format is not None:
            raise UnsupportedModelError(
                f"the cuda backend stores keys and values as they are computed, not in {format.name}; use "
                "backend='eager' with this kv_cache, or none"
            )
        stock = EagerBackend.open(model)
        reason = unsupported(model, kernels)
        if reason:
            raise UnsupportedModelError(f"{reason}; use backend='eager'")
        step = check_step(stock.capabilities, int(getattr(model, "input_width", 0)))
        layout, reference = _layout(stock, step)
        shared = Shared(model, stock, _make(kernels, layout))
        compare(lambda: cls(shared).forward(step).logits, lambda: reference.logits, model)
        return cls(shared)

    @property
    def capabilities(self) -> Capabilities:
        return self._shared.capabilities

    @property
    def family(self) -> object:
        return self._shared

    @property
    def _stock(self) -> list[str]:
        return sorted({*self._shared.native.stock, *self._shared.sums.stock})

    @property
    def numerics(self) -> str:
        return "fast" if self._stock else "invariant"

    @property
    def describes(self) -> str:
        kind = "Triton kernels" if not isinstance(self._shared.kernels, TwinKernels) else "kernels in plain torch"
        graphs = "CUDA graphs" if self._shared.device.type == "cuda" else "no graphs"
        return f"{kind}, {graphs}" + (f", stock products in {', '.join(self._stock)}" if self._stock else "")

    def warmup(self) -> None:
        """Capture the graphs of steps up to 16 rows, for short texts and for long ones."""
        with self._shared.lock, torch.inference_mode():
            for parts in sorted({num_parts(1), num_parts(self.capabilities.context)}):
                for width in WIDTHS[:5]:
                    self._shared.program(_Key(width, parts))

    def expose(self, hidden: Sequence[int]) -> None:
        shared = self._shared
        with shared.lock:
            if shared.native.expose(hidden):
                shared.programs.clear()
                shared.chains.clear()

    def forward(self, step: Step) -> StepResult:
        return type(self).forward_many([self], [step])[0]

    @classmethod
    @torch.inference_mode()
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """Rows of several sequences in one call of the model; each attends to its own slots."""
        shared = backends[0]._shared
        with shared.lock:
            for backend, step in zip(backends, steps, strict=True):
                place(backend._slots, step.end, backend.capabilities.context)
            pairs = [(backend._slots, step) for backend, step in zip(backends, steps, strict=True)]
            (logits, *exposed), all_rows = shared.run(pairs)
            rows = [step.num_rows for step in steps]
            states = [h.split(rows) for h in exposed]
            # Still locked: another thread may expose other states, which then come in another order.
            hidden = [shared.native.hidden_rows(step.hidden, [h[i] for h in states]) for i, step in enumerate(steps)]
        parts = logits.split(rows if all_rows else [step.num_logits for step in steps])
        return [StepResult(part[-step.num_logits :], own) for part, step, own in zip(parts, steps, hidden, strict=True)]

    @classmethod
    @torch.inference_mode()
    def draft_many(cls, backends: Sequence[Self], steps: Sequence[Step], chains: Sequence[Chain]) -> list[Drafted]:
        """One replay for all chains of one rule, once their like was asked for a few times; step by step before."""
        shared = backends[0]._shared
        by_rule: dict[Rule, list[int]] = {}
        for i, chain in enumerate(chains):
            by_rule.setdefault(chain.rule, []).append(i)
        drafted: dict[int, Drafted] = {}
        for group in by_rule.values():
            mine, own = [steps[i] for i in group], [chains[i] for i in group]
            with shared.lock:
                for i in group:
                    end = steps[i].end + chains[i].count - 1
                    place(backends[i]._slots, end, shared.capabilities.context)
                pairs = [(backends[i]._slots, steps[i]) for i in group]
                made = shared.chains.run(pairs, own, WIDTHS)
            if made is None:
                made = step_by_step(cls.forward_many, [backends[i] for i in group], mine, own)
            drafted.update(zip(group, made, strict=True))
        return [drafted[i] for i in range(len(chains))]

    @torch.inference_mode()
    def gather(self, slots: Sequence[int], start: int) -> None:
        self._slots.gather(slots, start)

    @torch.inference_mode()
    def fork(self, length: int) -> Self:
        return type(self)(self._shared, self._slots.fork(length) if length else None)

    def on_slots_of(self, other: Backend) -> Self:
        mine = self._shared
        if not isinstance(other, CudaBackend) or other._shared.kernels.layout != mine.kernels.layout:
            return super().on_slots_of(other)
        return type(self)(mine, other._slots)

    @property
    def num_bytes(self) -> int:
        return self._slots.num_bytes
