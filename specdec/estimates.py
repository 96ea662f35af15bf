"""What a text's finished rounds say about the next one: how far drafts get, and what rounds cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from specdec.costs import Costs

if TYPE_CHECKING:
    from specdec.policy import RoundFacts


@dataclass
class Average:
    """An average that forgets: the weight of a sample halves every `half_life` samples."""

    half_life: float
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        keep = 0.5 ** (1 / self.half_life)
        self.total, self.weight = self.total * keep + value, self.weight * keep + 1

    def mean(self, prior: float = 0.0, strength: float = 0.0) -> float:
        if not self.weight + strength:  # of nothing
            return prior
        return (self.total + prior * strength) / (self.weight + strength)


@dataclass(eq=False)
class Track:
    """How often drafts were accepted at each depth, among those that got there; newer ones count more.

    Estimates start from `prior`, and each is pulled to that of the depth before, by two samples' worth.
    """

    prior: float = 0.5
    half_life: float = 32
    accepts: list[Average] = field(default_factory=list)

    def survival(self, depth: int) -> list[float]:
        """P(accepted at each depth and all before it), down to `depth`."""
        return list(accumulate(self.acceptance(depth), mul))

    def acceptance(self, depth: int) -> list[float]:
        """P(accepted at each depth | reached it), down to `depth`."""
        estimate, estimates = self.prior, []
        for at in range(depth):
            if at < len(self.accepts):
                estimate = self.accepts[at].mean(estimate, 2.0)
            estimates.append(estimate)
        return estimates

    def observe(self, accepted: int, evaluated: int) -> None:
        for depth in range(evaluated):
            if depth == len(self.accepts):
                self.accepts.append(Average(self.half_life))
            self.accepts[depth].add(float(depth < accepted))


@dataclass(eq=False)
class Meter:
    """Seconds of rounds: verification by its rows, one level of drafting (in all, and by who drafted), the rest."""

    verify: dict[int, Average] = field(default_factory=dict)
    draft: Average = field(default_factory=lambda: Average(16))
    draft_by: dict[str, Average] = field(default_factory=dict)
    other: Average = field(default_factory=lambda: Average(16))

    def observe(self, facts: RoundFacts) -> None:
        seconds = facts.seconds
        self.verify.setdefault(facts.num_nodes + 1, Average(16)).add(seconds.get("verify", 0.0))
        if facts.depth_proposed:
            level = seconds.get("draft", 0.0) / facts.depth_proposed
            self.draft.add(level)
            self.draft_by.setdefault(facts.drafter, Average(16)).add(level)
        self.other.add(seconds.get("commit", 0.0) + seconds.get("other", 0.0))

    def costs(self) -> Costs:
        """As measured so far."""
        return Costs(
            {width: average.mean() for width, average in self.verify.items()},
            {origin: average.mean() for origin, average in self.draft_by.items()},
            self.draft.mean(),
            self.other.mean(),
        )
