"""Randomness, behind three primitives, so that every random decision can be replayed, shared, or enumerated.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.transfer import to_device

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Positions whose noise is made in one go: one set of small operations per block instead of per position.
_BLOCK = 8


class Chance(ABC):
    """What a drafter or verifier may ask of fate. Rows are independent of each other unless said otherwise."""

    def stream(self, name: str) -> Chance:
        """Chance whose draws are independent of this one's; races, which go by position, are the same."""
        return self

    @abstractmethod
    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        """Accept each entry with probability min(1, p/q); bool, same shape. `q` = 0 never divides."""

    @abstractmethod
    def draw(self, weights_RV: Tensor) -> Tensor:
        """One index per row with probability proportional to its weight; int64 `[R]`."""

    @abstractmethod
    def race(self, weights_RV: Tensor, positions: Sequence[int], k: int = 1) -> Tensor:
        """The first `k` of a race in which token v of row r arrives at e[position_r, v] / weight[r, v].

        The noise e depends on the position alone: rows of one position, and callers on either side of the loop,
        share it. The winner's law is the row, normalised. Absent places (weight 0) hold -1; int64 `[R, k]`.
        """

    def race_noise(self, positions: Sequence[int], vocab_size: int, device: torch.device | str) -> Tensor | None:
        """The noise `[len(positions), V]` of races at these positions; None where it is not known beforehand."""
        return None

    def draw_noise(self, count: int, vocab_size: int, device: torch.device | str) -> Tensor | None:
        """The noise `[count, V]` with which the next `count` rows are drawn, which it stands for; None as above."""
        return None


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def mix(value: int) -> int:
    """SplitMix64's finaliser on Python integers (Steele, Lea & Flood, 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(keys: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """`[len(keys), count]` float64 in (0, 1): output v+1 of the SplitMix64 stream that starts at each key.

    Integer arithmetic only up to the last step, hence the same numbers on every device.
    """
    step = torch.arange(1, count + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    x = to_device([_signed(key) for key in keys], device)[:, None] + step
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 11).double() + 0.5) * 2.0**-53


def exponentials(keys: Sequence[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """`[len(keys), count]` float64, unit exponential. log1p keeps full precision at the small values that win."""
    return -torch.log1p(-uniforms(keys, count, device))


def first(noise_RV: Tensor, weights_RV: Tensor, k: int) -> Tensor:
    """The first `k` of each row's race; see `Chance.race`."""
    arrival = noise_RV / weights_RV.double()  # weight 0: infinitely late
    if k == 1:
        return arrival.argmin(-1, keepdim=True)
    time, index = arrival.topk(min(k, arrival.shape[-1]), largest=False, sorted=True)
    return torch.where(time.isinf(), -1, index)


class CounterChance(Chance):
    """Counter-based noise: a pure function of (seed, stream, position or counter, token).

    Race noise ignores the stream, so that drafter, verifier, plain decoding, and every row of a batch share it.
    `draw` and `accept` advance a counter of the named stream and never meet each other's numbers.
    """

    def __init__(self, seed: int = 0, stream: str = "verify"):
        self.seed = seed
        self.counter = 0
        self._race_key = mix(mix(seed) ^ 0x5EED)
        self._stream_key = mix(mix(seed) + sum(byte << (8 * i) for i, byte in enumerate(stream.encode()[:8])))
        self._blocks: dict[tuple[int, int, torch.device], Tensor] = {}

    def stream(self, name: str) -> CounterChance:
        """Another stream of this seed, which makes the noise that both share only once."""
        other = CounterChance(self.seed, name)
        other._blocks = self._blocks
        return other

    def _next_keys(self, count: int) -> list[int]:
        first = self.counter
        self.counter += count
        return [mix(self._stream_key + mix(first + i)) for i in range(count)]

    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        u = uniforms(self._next_keys(1), p.numel(), p.device)[0].view(p.shape)
        return u * q.double() < p.double()

    def draw(self, weights_RV: Tensor) -> Tensor:
        count, vocab_size = weights_RV.shape
        return first(self.draw_noise(count, vocab_size, weights_RV.device), weights_RV, 1)[:, 0]

    def draw_noise(self, count: int, vocab_size: int, device: torch.device | str) -> Tensor:
        return exponentials(self._next_keys(count), vocab_size, device)

    def noise(self, position: int, vocab_size: int, device: torch.device | str = "cpu") -> Tensor:
        """The shared noise row of one absolute position: float64 `[V]`."""
        key = (position // _BLOCK, vocab_size, torch.device(device))
        if key not in self._blocks:
            for old in [k for k in self._blocks if k[0] < key[0] - 64 // _BLOCK]:
                del self._blocks[old]
            first = key[0] * _BLOCK
            keys = [mix(self._race_key + mix(first + i)) for i in range(_BLOCK)]
            self._blocks[key] = exponentials(keys, vocab_size, device)
        return self._blocks[key][position % _BLOCK]

    def race(self, weights_RV: Tensor, positions: Sequence[int], k: int = 1) -> Tensor:
        return first(self.race_noise(positions, weights_RV.shape[-1], weights_RV.device), weights_RV, k)

    def race_noise(self, positions: Sequence[int], vocab_size: int, device: torch.device | str) -> Tensor:
        return torch.stack([self.noise(n, vocab_size, device) for n in positions])


class GreedyChance(Chance):
    """Temperature 0: every row is one-hot, so fate has nothing to decide."""

    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        return (p >= q) & (p > 0)

    def draw(self, weights_RV: Tensor) -> Tensor:
        return weights_RV.argmax(-1)

    def race(self, weights_RV: Tensor, positions: Sequence[int], k: int = 1) -> Tensor:
        if k == 1:
            return weights_RV.argmax(-1, keepdim=True)
        weight, index = weights_RV.topk(min(k, weights_RV.shape[-1]))
        return torch.where(weight > 0, index, -1)
