"""Every outcome of a random program, with its probability: a `Chance` that replays decisions instead of taking them.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import TypeVar

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.errors import SpecdecError

Outcome = TypeVar("Outcome")
# What is still open about the noise of each position: a subinterval of [0, 1).
Intervals = Mapping[int, tuple[float, float]]
# Breakpoints of one row, normalised twice, may differ by rounding.
_SLACK = 1e-13


class OracleError(SpecdecError, RuntimeError):
    """A program cannot be enumerated: its weights are malformed, or it draws randomness from somewhere else."""


class EnumeratedChance(Chance):
    """Follows `script`, a prefix of forced choices, then always takes the first; records where it could branch.

    `accept` and `draw` branch on each entry or row by itself. `race` needs a coupling: each position has one uniform
    number, the winner of a row is its inverse distribution function at that number, and the interval in which the
    number is known to lie is cut, as late as possible, at the breakpoints of all rows asked about. Further places
    read the same number on what is left of the row. Any coupling with the right marginals will do for the emitted
    text, since a rule that is exact under shared noise cannot depend on it; the *number* of accepted tokens does.
    """

    def __init__(self, script: Sequence[int] = (), intervals: Intervals | None = None):
        self._script = script
        self.choices: list[tuple[int, int]] = []  # (taken, number of options), where there was a choice
        self.weight = 1.0
        self.intervals = dict(intervals or {})

    def _branch(self, weights: Sequence[float]) -> int:
        """An index of `weights`; those without weight are no options, and a sure thing is no choice."""
        total = sum(weights)
        options = [index for index, weight in enumerate(weights) if weight > 0]
        if not options or not total < float("inf"):
            raise OracleError(f"a choice needs finite weights, one of them positive, not {list(weights)}")
        taken = 0
        if len(options) > 1:
            if len(self.choices) < len(self._script):
                taken = self._script[len(self.choices)]
            if taken >= len(options):
                raise OracleError("a replay met other choices: the program uses randomness that is not from `chance`")
            self.choices.append((taken, len(options)))
        self.weight *= weights[options[taken]] / total
        return options[taken]

    def accept(self, p: Tensor, q: Tensor) -> Tensor:
        decided = []
        for p_i, q_i in zip(p.flatten().tolist(), q.flatten().tolist(), strict=True):
            probability = 0.0 if p_i <= 0 else 1.0 if p_i >= q_i else p_i / q_i
            decided.append(self._branch([1 - probability, probability]) == 1)
        return torch.tensor(decided, dtype=torch.bool, device=p.device).view(p.shape)

    def draw(self, weights_RV: Tensor) -> Tensor:
        # A row without weight has nothing to draw: index 0, as from the real generator.
        drawn = [self._branch(row) if sum(row) != 0 else 0 for row in weights_RV.tolist()]
        return torch.tensor(drawn, dtype=torch.int64, device=weights_RV.device)

    def race(self, weights_RV: Tensor, positions: Sequence[int], k: int = 1) -> Tensor:
        left = weights_RV.double().tolist()
        places = []
        for _ in range(min(k, weights_RV.shape[-1])):
            self._refine(left, positions)
            winners = [self._winner(row, position) for row, position in zip(left, positions, strict=True)]
            for row, winner in zip(left, winners, strict=True):
                row[winner] = 0.0  # harmless for -1: that row has no weight left
            places.append(winners)
        return torch.tensor(places, dtype=torch.int64, device=weights_RV.device).T

    def _refine(self, rows: Sequence[Sequence[float]], positions: Sequence[int]) -> None:
        asked = sorted(zip(positions, rows, strict=True), key=lambda item: item[0])
        for position, group in groupby(asked, key=lambda item: item[0]):
            low, high = self.intervals.get(position, (0.0, 1.0))
            inside = {cut for _, row in group for cut in _cumulative(row)[:-1] if low < cut < high}
            edges = [low, *sorted(inside), high]
            piece = self._branch([b - a for a, b in pairwise(edges)])
            self.intervals[position] = edges[piece], edges[piece + 1]

    def settled(self, row_V: Tensor, position: int) -> int | None:
        """The winner of the row's race at `position`, if what was asked so far decides it. Never branches."""
        low, high = self.intervals.get(position, (0.0, 1.0))
        cuts = [0.0, *_cumulative(row_V.tolist())]
        for token, (start, end) in enumerate(pairwise(cuts)):
            if start - _SLACK <= low and high <= end + _SLACK:
                return token
        return None

    def _winner(self, row: Sequence[float], position: int) -> int:
        middle = sum(self.intervals[position]) / 2
        candidates = [token for token, cut in enumerate(_cumulative(row)) if row[token] > 0 and middle < cut]
        # Rounding may leave the last cut just below 1.
        return candidates[0] if candidates else max((t for t, weight in enumerate(row) if weight > 0), default=-1)


def _cumulative(row: Sequence[float]) -> list[float]:
    total, so_far, cuts = sum(row), 0.0, []
    for weight in row:
        so_far += weight
        cuts.append(so_far / total if total > 0 else 0.0)
    return cuts


def enumerate_outcomes(
    program: Callable[[EnumeratedChance], Outcome], intervals: Intervals | None = None
) -> Iterator[tuple[float, Outcome, Intervals]]:
    """Run `program` once for every sequence of choices; yields (probability, its result, the noise's intervals).

    Depth first, by replaying prefixes. Raises `OracleError` when the probabilities do not add up to 1, which happens
    when the program is not a function of what `chance` tells it.
    """
    script: list[int] = []
    total = 0.0
    while True:
        chance = EnumeratedChance(script, intervals)
        result = program(chance)
        total += chance.weight
        yield chance.weight, result, chance.intervals
        choices = chance.choices
        while choices and choices[-1][0] + 1 == choices[-1][1]:
            choices.pop()
        if not choices:
            break
        script = [taken for taken, _ in choices]
        script[-1] += 1
    if abs(total - 1) > 1e-9:
        raise OracleError(f"the outcomes' probabilities add up to {total}: randomness that is not from `chance`")
