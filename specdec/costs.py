"""What a round costs: drafting, and a forward by its number of rows, between and beyond the measured widths."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate


def cost_at(known: Mapping[int, float], width: int) -> float:
    """Seconds of `width` rows: linear between measured widths; beyond the widest, along the line from the narrowest.

    Below the narrowest it is constant: one row is never dearer than several, and how much cheaper is not known.
    """
    return _between(known, sorted(known), width)


def _between(known: Mapping[int, float], widths: Sequence[int], width: int) -> float:
    """`cost_at`, for a caller who has sorted the widths."""
    at = bisect_left(widths, width)
    if at == 0 or (at < len(widths) and widths[at] == width) or len(widths) == 1:
        return known[widths[min(at, len(widths) - 1)]]
    lower, upper = (widths[at - 1], widths[at]) if at < len(widths) else (widths[0], widths[-1])
    slope = (known[upper] - known[lower]) / (upper - lower)
    if width > upper:
        return known[upper] + max(slope, 0.0) * (width - upper)
    return known[lower] + slope * (width - lower)


@dataclass(frozen=True)
class Costs:
    """Seconds of a round's parts. Without measurements: verification is free of width, and a draft step is a tenth.

    `verify`: of the target's forward by its rows; no number of rows counts as dearer than a larger one, since where it
    is, it was measured while it was being compiled. `draft`: of one more level of drafting, by the proposal's origin;
    `draft_start`: of what comes before the first level; where an origin was not measured, those of all. `other`: of
    everything else in a round.
    """

    verify: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    draft: Mapping[str, float] = field(default_factory=dict)
    draft_average: float = 0.1
    other: float = 0.0
    draft_start: Mapping[str, float] = field(default_factory=dict)
    start_average: float = 0.0

    @cached_property
    def _widths(self) -> list[int]:
        return sorted(self.verify)

    @cached_property
    def _rising(self) -> dict[int, float]:
        """`verify`, bounded by what more rows take."""
        seconds = list(accumulate((self.verify[width] for width in reversed(self._widths)), min))
        return dict(zip(self._widths, reversed(seconds), strict=True))

    @cached_property
    def _verified(self) -> dict[int, float]:
        """Seconds by width, of those that were asked for: a round asks for most of them several times."""
        return {}

    def verified(self, width: int) -> float:
        """Seconds of a target forward over so many rows."""
        if width not in self._verified:
            self._verified[width] = _between(self._rising, self._widths, width)
        return self._verified[width]

    def round(self, nodes: int, levels: int, origin: str = "") -> float:
        """Seconds of a round that drafts `nodes` in `levels` steps."""
        return self.verified(nodes + 1) + self.drafted(levels, origin) + self.other

    def drafted(self, levels: int, origin: str = "") -> float:
        """Seconds of drafting so many levels."""
        if not levels:
            return 0.0
        if origin in self.draft:
            return self.draft_start.get(origin, 0.0) + levels * self.draft[origin]
        return self.start_average + levels * self.draft_average

    def best_length(self, survival: Sequence[float], origin: str = "", levels: int | None = None) -> tuple[int, float]:
        """The chain length with the most expected tokens per second, 0 included, and that rate.

        `survival[i]`: the probability that the chain's first i + 1 tokens are accepted. `levels`: draft steps whatever
        the length; None: one per token.
        """
        best, best_rate, expected = 0, 1.0 / self.round(0, 0), 1.0
        most = 1.0 + sum(survival)
        for length, probability in enumerate(survival, 1):
            seconds = self.round(length, length if levels is None else levels, origin)
            if most <= best_rate * seconds:  # neither this length nor a longer one can be better
                break
            expected += probability
            if expected > best_rate * seconds:
                best, best_rate = length, expected / seconds
        return best, best_rate
