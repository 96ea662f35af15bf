"""Keys and values of a sequence on a device, and the plan of a step for its kernels (`specdec/kernels/plan.py`).

Shape suffixes: M rows of one step, B slots of its block, T slots of a tail, P planes, C slots of a cache, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError
from specdec.kernels.plan import FIELDS, Layout, size, views
from specdec.runtime.backend import Step
from specdec.runtime.cache import bucket
from specdec.transfer import to_device

# Blocks of at most this many slots are kept for the next step of the same shape.
_SMALL_BLOCK = 128


class DeviceKernels(Protocol):
    """What runs a step on a device: `TritonKernels`, or its twin in plain torch."""

    layout: Layout
    num_parts: int

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def row_sum(self, x: Tensor) -> Tensor: ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor: ...

    def register(self, memory: Tensor) -> None: ...


class DeviceSlots:
    """Keys and values of one sequence in one piece of device memory, rolled back by index."""

    def __init__(self, kernels: DeviceKernels, dtype: torch.dtype, device: torch.device):
        self._kernels = kernels
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self.capacity = 0

    @property
    def address(self) -> int:
        return self._memory.data_ptr()

    @property
    def num_bytes(self) -> int:
        return self._memory.nbytes

    def _planes(self) -> list[Tensor]:
        """The memory as `[P, C, size]` blocks: one where all layers' keys and values have one size."""
        sizes = [(kv, size) for kv, d, e in self._kernels.layout.heads for size in (d, e)]
        blocks = [(width, sum(kv for kv, _ in run)) for width, run in groupby(sizes, key=lambda pair: pair[1])]
        parts = self._memory.split([planes * width * self.capacity for width, planes in blocks])
        return [part.view(n, self.capacity, width) for part, (width, n) in zip(parts, blocks, strict=True)]

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots; what is held stays. Never shrinks."""
        if capacity <= self.capacity:
            return
        old = self._planes() if self.capacity else []
        held, self.capacity = self.capacity, capacity
        self._memory = self._memory.new_empty(self._kernels.layout.width * capacity)
        self._kernels.register(self._memory)
        for mine, its in zip(self._planes(), old, strict=False):
            mine[:, :held] = its

    def gather(self, slots: Sequence[int], start: int) -> None:
        """`slots` become the slots from `start` on. Nothing moves when they already are."""
        if list(slots) == list(range(start, start + len(slots))):
            return
        index = to_device(slots, self._memory.device)
        for plane in self._planes():
            plane[:, start : start + len(slots)] = plane.index_select(1, index)

    def fork(self, length: int) -> Self:
        """An independent copy of the first `length` slots."""
        twin = type(self)(self._kernels, self._memory.dtype, self._memory.device)
        if length:
            twin.reserve(self.capacity)
            for its, mine in zip(twin._planes(), self._planes(), strict=True):
                its[:, :length] = mine[:, :length]
        return twin


class Sight(NamedTuple):
    """What the rows of a block see, relative to the prefix (see `specdec.kernels.plan`); made once per shape."""

    plain_M: Tensor
    length_M: Tensor
    tail_MT: Tensor  # padded with 0


def sight(step: Step) -> Sight:
    """Of a step's rows. Raises `InputError` when what a row sees does not stand at neighbouring positions."""
    offsets = tuple((step.block_positions_B - step.prefix).tolist())
    make = _small_sight if len(offsets) <= _SMALL_BLOCK else _sight
    return make(step.block_MB, offsets)


def _sight(block_MB: Tensor, offsets_B: tuple[int, ...]) -> Sight:
    num_rows, num_slots = block_MB.shape
    place_B = torch.tensor(offsets_B)
    length_M = block_MB.sum(1)
    rank_B = torch.arange(num_slots)
    used_MB = rank_B < length_M[:, None]
    if torch.equal(place_B, rank_B) and torch.equal(block_MB, used_MB):  # a chain
        return Sight(length_M, length_M, length_M.new_zeros(num_rows, 0))
    # Slots of each row by position, those that it does not see at the end.
    order_MB = torch.where(block_MB, place_B, int(place_B.max()) + 1).argsort(dim=1, stable=True)
    if not bool((place_B[order_MB] == rank_B)[used_MB].all()):
        raise InputError("a row must see neighbouring positions, one slot each: this step's block has gaps")
    plain_M = ((order_MB == rank_B) & used_MB).long().cumprod(1).sum(1)
    rest_MT = plain_M[:, None] + torch.arange(int((length_M - plain_M).max()))
    late_MT = order_MB.gather(1, rest_MT.clamp_max(num_slots - 1))
    return Sight(plain_M, length_M, torch.where(rest_MT < length_M[:, None], late_MT, 0))


_small_sight = lru_cache(maxsize=4096)(_sight)


def write_plan(
    pairs: Sequence[tuple[DeviceSlots, Step]], width: int, tail: int, pinned: bool, sights: Sequence[Sight]
) -> Tensor:
    """The plan of some sequences' steps on the host, their rows one after another, padded to `width` rows.

    Tokens that lie on the device are left out: they are copied into the plan there.
    """
    flat = torch.zeros(size(width, tail), dtype=torch.int64, pin_memory=pinned)
    plan = views(flat, width)
    at = 0
    for (slots, step), seen in zip(pairs, sights, strict=True):
        here = slice(at, at + step.num_rows)
        if step.tokens.device.type == "cpu":
            plan.tokens[here] = step.tokens
        plan.positions[here] = step.positions
        rows = plan.rows[here]
        rows[:, 0], rows[:, 1] = slots.address, slots.capacity
        rows[:, 2], rows[:, 3] = seen.plain_M + step.prefix, seen.length_M + step.prefix
        rows[:, 4] = torch.arange(step.start, step.end)
        if seen.tail_MT.shape[1]:
            plan.tail[here, : seen.tail_MT.shape[1]] = seen.tail_MT + step.prefix
        at = here.stop
    plan.rows[at:, FIELDS - 1] = -1
    return flat


def place(slots: DeviceSlots, end: int, context: int) -> None:
    """Room for the slots before `end`, in the buckets of lengths."""
    if end > slots.capacity:
        slots.reserve(bucket(end, max(context, end)))
