"""Keys and values of a text on the host, for graphs that are given them: where rows are written, and what that costs.

A graph without state reads all slots and returns the rows that it made. The host writes those that were accepted, and
an updater says where. Two ways are known from NPU runners, and can be exchanged on the same artefact:

* smart-mask: slots stand where they are, a row is written in its place, and the mask shows what is filled.
* shift-pointer: the newest slot always stands last. The graph's input is a window that slides over a larger buffer by
  one slot per token, so that nothing that is cached moves; the row is written where the window now ends.

The third way, a graph that scatters the rows into slots of its own, needs no updater.

Shape suffixes: S slots, K heads, D their size, T rows of a graph.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError


@dataclass(frozen=True)
class Room:
    """One input of a graph: keys or values of a layer. `axis`: along which slots follow each other."""

    shape: tuple[int, ...]
    axis: int

    @property
    def num_slots(self) -> int:
        return self.shape[self.axis]

    @property
    def stride(self) -> int:
        """Elements from one slot to the next."""
        return math.prod(self.shape[self.axis + 1 :])

    @property
    def size(self) -> int:
        """Elements of one slot."""
        return math.prod(self.shape) // self.num_slots


def rooms_of(layers: Sequence[Sequence[int]], num_slots: int) -> tuple[Room, ...]:
    """Keys `[K, D, S]` and values `[K, S, D]` of each layer in turn; `layers`: K and the two sizes of each."""
    made: list[Room] = []
    for heads, key_size, value_size in layers:
        made += [Room((heads, key_size, num_slots), 2), Room((heads, num_slots, value_size), 1)]
    return tuple(made)


@dataclass
class Copied:
    """What updaters have done so far: those of all texts of a program count together."""

    rows: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class Updater(ABC):
    """The slots of one text. A slot's row stays until it is written again, also while `length` is less.

    Lossless: yes; where a row stands does not change what it holds.
    """

    name: ClassVar[str]

    def __init__(self, rooms: Sequence[Room], dtype: torch.dtype, copied: Copied | None = None):
        sizes = {room.num_slots for room in rooms}
        if len(sizes) != 1:
            raise InputError(f"keys and values of one graph have one number of slots, not {sorted(sizes)}")
        self.rooms, self.dtype = tuple(rooms), dtype
        self.num_slots: int = sizes.pop()
        self.length = 0
        self.buffers = [torch.zeros(self.elements(room), dtype=dtype) for room in self.rooms]
        self.copied = copied if copied is not None else Copied()

    @staticmethod
    @abstractmethod
    def elements(room: Room) -> int:
        """Of a buffer."""

    @abstractmethod
    def _offset(self, room: Room) -> int:
        """Elements before what the graph reads."""

    @property
    @abstractmethod
    def columns(self) -> slice:
        """Where slots 0 to `length` stand in what the graph reads."""

    def resize(self, length: int) -> None:
        """From now on so many slots count. Copies nothing. Raises `InputError` beyond the last slot."""
        if not 0 <= length <= self.num_slots:
            raise InputError(f"these graphs have {self.num_slots} slots, not {length}")
        self.length = length

    def views(self) -> tuple[Tensor, ...]:
        """What the graph reads: contiguous tensors of the rooms' shapes, on the buffers themselves."""
        return tuple(
            buffer[self._offset(room) :][: math.prod(room.shape)].view(room.shape)
            for room, buffer in zip(self.rooms, self.buffers, strict=True)
        )

    def _cells(self, slot: int, count: int) -> list[Tensor]:
        """Where `count` slots from `slot` on stand, in each buffer."""
        first = self.columns.start + slot
        return [
            buffer.as_strided(
                (*room.shape[: room.axis], count, *room.shape[room.axis + 1 :]),
                _strides(room.shape),
                self._offset(room) + first * room.stride,
            )
            for room, buffer in zip(self.rooms, self.buffers, strict=True)
        ]

    def write(self, slot: int, rows: Sequence[Tensor], picked: Sequence[int]) -> None:
        """Copy rows `picked` of a graph's outputs (shaped as the rooms, with T for S) to the slots from `slot` on."""
        started, count = time.perf_counter(), len(picked)
        first = picked[0]
        straight = list(picked) == list(range(first, first + count))
        index = None if straight else torch.tensor(picked)
        for room, cells, new in zip(self.rooms, self._cells(slot, count), rows, strict=True):
            chosen = new.narrow(room.axis, first, count) if index is None else new.index_select(room.axis, index)
            cells.copy_(chosen)
            self.copied.num_bytes += count * room.size * cells.itemsize
        self.copied.rows += count
        self.copied.seconds += time.perf_counter() - started

    def read(self, slot: int) -> tuple[Tensor, ...]:
        """A copy of one slot's row, as a graph of one row would have returned it."""
        return tuple(cells.clone(memory_format=torch.contiguous_format) for cells in self._cells(slot, 1))

    def duplicate(self) -> Self:
        twin = copy.copy(self)
        twin.buffers = [buffer.clone() for buffer in self.buffers]
        return twin

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class SmartMask(Updater):
    """In place: slot i stands at i."""

    name = "smart-mask"

    @staticmethod
    def elements(room: Room) -> int:
        return math.prod(room.shape)

    def _offset(self, room: Room) -> int:
        return 0

    @property
    def columns(self) -> slice:
        return slice(0, self.length)


class ShiftPointer(Updater):
    """A sliding window: the newest slot stands last.

    Slot i keeps one address whatever the length: S + i slots from the start of each run of slots. A run's cells behind
    its window are those of the next run before its own first slot, which no length shows.
    """

    name = "shift-pointer"

    @staticmethod
    def elements(room: Room) -> int:
        return math.prod(room.shape) + room.num_slots * room.stride

    def _offset(self, room: Room) -> int:
        return self.length * room.stride

    @property
    def columns(self) -> slice:
        return slice(self.num_slots - self.length, self.num_slots)


#: The graph writes into slots that it owns.
SCATTER = "scatter"
HOST_UPDATERS: dict[str, type[Updater]] = {kind.name: kind for kind in (SmartMask, ShiftPointer)}
UPDATERS = (SCATTER, *HOST_UPDATERS)


class HostSlots:
    """A text's slots under an updater, and the rows that graphs returned and nobody has needed yet.

    A row is written when a later step sees it: what was rejected is never copied, and choosing a branch of a tree
    renames rows that are still where the graph put them.
    """

    def __init__(self, updater: Updater):
        self.updater = updater
        self._waiting: dict[int, tuple[Sequence[Tensor], int]] = {}  # of a slot: outputs of a graph, and which row

    def show(self, start: int) -> tuple[Tensor, ...]:
        """What a graph reads whose rows begin at slot `start`: all slots before it, at `updater.columns`."""
        updater = self.updater
        updater.resize(start)
        ready = sorted(slot for slot in self._waiting if slot < start)
        # Neighbours out of one step are one copy.
        for _, found in groupby(enumerate(ready), lambda item: (item[1] - item[0], id(self._waiting[item[1]][0]))):
            slots = [slot for _, slot in found]
            picked = [self._waiting[slot] for slot in slots]
            updater.write(slots[0], picked[0][0], [row for _, row in picked])
        for slot in ready:
            del self._waiting[slot]
        return updater.views()

    def keep(self, start: int, count: int, rows: Sequence[Tensor]) -> None:
        """The first `count` rows of a graph's outputs belong to the slots from `start` on."""
        for row in range(count):
            self._waiting[start + row] = rows, row

    def gather(self, slots: Sequence[int], start: int) -> None:
        """Slots `start` and on become what `slots`, all different, were."""
        found = [self._waiting.get(slot) or (self.updater.read(slot), 0) for slot in slots]
        for place, row in enumerate(found, start):
            self._waiting[place] = row

    def duplicate(self) -> HostSlots:
        twin = HostSlots(self.updater.duplicate())
        twin._waiting = dict(self._waiting)
        return twin

    @property
    def num_bytes(self) -> int:
        return self.updater.num_bytes


@dataclass(frozen=True)
class Cost:
    """Elements of keys and of values, of one layer: copied per token, and held."""

    copied_keys: int
    copied_values: int
    held_keys: int
    held_values: int

    def as_bytes(self, itemsize: int, num_layers: int) -> Cost:
        return replace(self, **{name: value * itemsize * num_layers for name, value in vars(self).items()})


def published_cost(name: str, heads: int, size: int, context: int) -> Cost:
    """What ExecuTorch's runner for Qualcomm's NPU states for its two updaters: H heads of size D, L positions.

    With shift-pointer the graph's output for values is the buffer itself, hence one pointer instead of H D elements;
    buffers of keys have one more row per head, those of values one more head.
    """
    row = heads * size
    if name == SmartMask.name:
        return Cost(row, row, row * context, row * context)
    if name == ShiftPointer.name:
        return Cost(row, 1, heads * (size + 1) * context, (heads + 1) * size * (context - 1))
    raise InputError(f"costs are stated for {', '.join(HOST_UPDATERS)}, not for {name!r}")
