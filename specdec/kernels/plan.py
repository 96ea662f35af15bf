"""What the kernels of a device are told about a step: one int64 tensor, so that a step needs one copy to the device.

It holds, for W rows (the step's, padded to a width): tokens `[W]`, positions `[W]`, rows `[W, FIELDS]`, tails `[W, T]`.
A row's fields are the address of its sequence's keys and values, their capacity, how many of the slots it sees first
have the number of their position ("plain"), how many it sees in all ("length"), and the slot that it is written to.
The slots that it sees behind the plain ones stand in its tail, by position. So what a row sees is numbered by
position, wherever it stands; a chain has no tails. A row that pads has length 0 and slot -1.

Addresses instead of tensors let one captured graph serve every sequence, at every capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

#: Of a row: address, capacity, plain, length, slot.
FIELDS = 5
#: Positions of one attention tile. Tiles lie at multiples of it, so that they depend on positions alone.
TILE = 64
#: Parts into which a row's keys are split at most; how many it takes follows from the row's own length.
PARTS = 32
# Launched parts come in few numbers, since each is a graph of its own; idle ones cost little.
_FEW_PARTS = 8


def num_parts(capacity: int) -> int:
    """Parts to launch for rows of at most `capacity` slots."""
    return _FEW_PARTS if capacity <= _FEW_PARTS * TILE else PARTS


@dataclass(frozen=True)
class Layout:
    """How one sequence's memory is laid out: per layer keys `[V, C, D]`, then values `[V, C, E]`, layer after layer.

    `heads`: (V, D, E) of each layer.
    """

    heads: tuple[tuple[int, int, int], ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Elements per slot that stand before each layer, and, last, before the end."""
        return tuple(accumulate((kv * (d + e) for kv, d, e in self.heads), initial=0))

    @property
    def width(self) -> int:
        """Elements per slot."""
        return self.offsets[-1]

    def planes(self, memory: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Views of a layer's keys `[V, C, D]` and values `[V, C, E]` in a memory `[width * C]`."""
        kv, d, e = self.heads[layer]
        capacity = memory.numel() // self.width
        keys, values = memory[self.offsets[layer] * capacity : self.offsets[layer + 1] * capacity].split(
            [kv * d * capacity, kv * e * capacity]
        )
        return keys.view(kv, capacity, d), values.view(kv, capacity, e)


class Plan(NamedTuple):
    tokens: Tensor
    positions: Tensor
    rows: Tensor  # [W, FIELDS]
    tail: Tensor  # [W, T]


def size(width: int, tail: int) -> int:
    return width * (2 + FIELDS + tail)


def views(flat: Tensor, width: int) -> Plan:
    tail = flat.numel() // width - 2 - FIELDS
    tokens, positions, rows, tails = flat.split([width, width, width * FIELDS, width * tail])
    return Plan(tokens, positions, rows.view(width, FIELDS), tails.view(width, tail))
