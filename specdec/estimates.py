"""What a text's finished rounds say about the next one: how far drafts get, and what rounds cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from specdec.costs import Costs

if TYPE_CHECKING:
    from specdec.policy import RoundFacts

# Samples after which a measured cost, and an acceptance of all texts, has half its weight.
_HALF_LIFE, _HALF_LIFE_OF_ALL = 16.0, 256.0
# What earlier texts showed is worth so many samples in the next: of acceptance, which differs between texts, and of
# costs, which do not.
ACCEPTANCE_CARRIED, _COST_CARRIED = 3.0, 8.0
# What is not measured again loses so much of that from text to text, and goes when it is worth less than this.
_KEPT, _LEAST = 0.7, 0.2
# Costs are summed up anew after so many rounds, and after a round that measured what was measured less often.
_SUMMED_EVERY = 4
# A line through drafts of like depths is drawn toward an even price per level, as by depths that vary this much; and no
# level counts as less than this part of the average.
_EVEN, _LEAST_LEVEL = 0.1, 0.25
# A step that takes this part of its average has been compiled meanwhile: what it took before is over.
_FASTER = 1 / 3


@dataclass
class Average:
    """An average that forgets: the weight of a sample halves every `half_life` samples."""

    half_life: float
    total: float = 0.0
    weight: float = 0.0
    _keep: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._keep = 0.5 ** (1 / self.half_life)

    def add(self, value: float) -> None:
        self.total = self.total * self._keep + value
        self.weight = self.weight * self._keep + 1

    def mean(self, prior: float = 0.0, strength: float = 0.0) -> float:
        if not self.weight + strength:  # of nothing
            return prior
        return (self.total + prior * strength) / (self.weight + strength)

    def carried(self, most: float, half_life: float | None = None) -> Average:
        """The same average for a start: worth so many samples at most, so that what comes next counts for more."""
        share = min(1.0, most / self.weight) if self.weight else 0.0
        return Average(half_life or self.half_life, self.total * share, self.weight * share)


@dataclass
class Line:
    """Seconds by levels of drafting: what comes before the first one, and each. It forgets as `Average` does.

    A round's first level is dearer than the next: the drafter catches up with the text, and its weights have left the
    caches. Whoever takes the average for the price of one more level never drafts deep enough to learn better.
    """

    half_life: float
    weight: float = 0.0
    levels: float = 0.0  # sums, as are the next three
    seconds: float = 0.0
    levels_levels: float = 0.0
    levels_seconds: float = 0.0

    def add(self, levels: int, seconds: float) -> None:
        keep = 0.5 ** (1 / self.half_life)
        self.weight = self.weight * keep + 1
        self.levels = self.levels * keep + levels
        self.seconds = self.seconds * keep + seconds
        self.levels_levels = self.levels_levels * keep + levels * levels
        self.levels_seconds = self.levels_seconds * keep + levels * seconds

    @property
    def average(self) -> float:
        """Seconds per level."""
        return self.seconds / self.levels if self.levels else 0.0

    def fit(self) -> tuple[float, float]:
        """Seconds before the first level and of each, by least squares.

        Without different depths to learn from, each level takes its share.
        """
        if not self.levels:
            return 0.0, 0.0
        mean, average = self.levels / self.weight, self.average
        variance = self.levels_levels / self.weight - mean * mean
        covariance = self.levels_seconds / self.weight - mean * self.seconds / self.weight
        level = (covariance + _EVEN * average) / (variance + _EVEN)
        level = min(average, max(_LEAST_LEVEL * average, level))
        return (average - level) * mean, level

    def carried(self, most: float) -> Line:
        """The same line for a start, worth so many samples at most."""
        share = min(1.0, most / self.weight) if self.weight else 0.0
        sums = (self.weight, self.levels, self.seconds, self.levels_levels, self.levels_seconds)
        return Line(self.half_life, *(share * value for value in sums))


@dataclass(eq=False)
class Track:
    """How often drafts were accepted at each depth, among those that got there; newer ones count more.

    Estimates start from `prior`, and each is pulled to that of the depth before, by two samples' worth.
    """

    prior: float = 0.5
    half_life: float = 32
    accepts: list[Average] = field(default_factory=list)
    of_all: list[Average] = field(default_factory=list)  # the same of all texts so far, which forgets more slowly

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
        for averages, half_life in ((self.accepts, self.half_life), (self.of_all, _HALF_LIFE_OF_ALL)):
            while len(averages) < evaluated:
                averages.append(Average(half_life))
            for depth in range(evaluated):
                averages[depth].add(float(depth < accepted))

    def carried(self, most: float = ACCEPTANCE_CARRIED) -> Track:
        """One for the next text. Texts differ: it starts near all of them, and not where the last one ended."""
        start = [average.carried(most, self.half_life) for average in self.of_all]
        return Track(self.prior, self.half_life, start, self.of_all)


@dataclass(eq=False)
class Meter:
    """Seconds of rounds: verification by its rows, drafting by its levels (in all, and by who drafted), the rest."""

    verify: dict[int, Average] = field(default_factory=dict)
    draft: Line = field(default_factory=lambda: Line(_HALF_LIFE))
    draft_by: dict[str, Line] = field(default_factory=dict)
    other: Average = field(default_factory=lambda: Average(_HALF_LIFE))
    _summed: Costs | None = None
    _rounds: int = 0  # since then

    def observe(self, facts: RoundFacts) -> None:
        seconds = facts.seconds
        known = _measured(self.verify, facts.num_nodes + 1, seconds.get("verify", 0.0))
        if facts.depth_proposed:
            levels, drafting = facts.depth_proposed, seconds.get("draft", 0.0)
            self.draft = _drawn_on(self.draft, levels, drafting)
            line = _drawn_on(self.draft_by.get(facts.drafter), levels, drafting)
            self.draft_by[facts.drafter] = line
            known &= line.weight >= _SUMMED_EVERY
        self.other.add(seconds.get("commit", 0.0) + seconds.get("other", 0.0))
        self._rounds += 1
        if not known or self._rounds == _SUMMED_EVERY:
            self._summed = None

    @property
    def tells_plain(self) -> bool:
        """Whether it knows what a plain round takes, and one that drafts."""
        return 1 in self.verify and len(self.verify) > 1

    def costs(self) -> Costs:
        """As measured so far; what is well known is not summed up anew in each round."""
        if self._summed is None:
            self._rounds = 0
            lines = {origin: line.fit() for origin, line in self.draft_by.items()}
            start, level = self.draft.fit()
            self._summed = Costs(
                {width: average.mean() for width, average in self.verify.items()},
                {origin: level for origin, (_, level) in lines.items()},
                level,
                self.other.mean(),
                {origin: start for origin, (start, _) in lines.items()},
                start,
            )
        return self._summed

    def carried(self) -> Meter:
        """What another text may start from: what was measured seldom, and no more, is forgotten text by text."""
        verify: dict[int, Average] = {}
        for width, average in self.verify.items():
            kept = average.carried(min(_COST_CARRIED, _KEPT * average.weight))
            if kept.weight >= _LEAST:
                verify[width] = kept
        by = {origin: line.carried(_COST_CARRIED) for origin, line in self.draft_by.items()}
        return Meter(verify, self.draft.carried(_COST_CARRIED), by, self.other.carried(_COST_CARRIED))


def _drawn_on(line: Line | None, levels: int, seconds: float) -> Line:
    """The line with one more draft; one far below the average starts a new line."""
    if line is None or seconds < _FASTER * levels * line.average:
        line = Line(_HALF_LIFE)
    line.add(levels, seconds)
    return line


def _measured(known: dict[int, Average], key: int, seconds: float) -> bool:
    """Add a measurement; one far below the average starts a new one. Whether it was one among several."""
    average = known.get(key)
    if average is None or seconds < _FASTER * average.mean():
        average = known[key] = Average(_HALF_LIFE)
    average.add(seconds)
    return average.weight >= _SUMMED_EVERY
