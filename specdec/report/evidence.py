"""What two runs of the same prompts can tell apart: sign flips by prompt, intervals, and what could have been seen.

Shapes: P prompts, C cells (settings), F sign flips.

A prompt is the unit of evidence: rounds within a text depend on each other. The statistic of a cell is the accepted
tokens per round, a ratio of two sums; its jackknife pseudo-values (Tukey, 1958) turn it into one number per prompt.
Signs are then flipped by prompt, for all cells at once, so that what prompts have in common over cells stays in common;
adjusted p-values are Westfall and Young's step-down max-T (1993), which holds the chance of one false alarm or more
among all cells at the level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from specdec.errors import InputError

Array = NDArray[np.float64]

# Up to here every pattern of signs is tried, so that p-values are exact; beyond it they are drawn.
MAX_EXACT = 14
NUM_FLIPS = 9999
NUM_RESAMPLES = 2000
POWER = 0.8
# Sums of the same numbers in another order must count as equal.
_SLACK = 1e-9


def check_level(level: float) -> None:
    if not 0 < level < 0.5:
        raise InputError(f"--level is a chance of a false alarm between 0 and 0.5, not {level:g}")


@dataclass(frozen=True)
class Counts:
    """Of one cell, by prompt. [P] each: tokens accepted, and rounds (at least one)."""

    accepted: Array
    rounds: Array

    @property
    def rate(self) -> float:
        """Accepted tokens per round, all prompts pooled: mean acceptance length - 1."""
        return float(self.accepted.sum() / self.rounds.sum())


def pseudo_values(before: Counts, after: Counts, keep: float = 1.0) -> Array:
    """[P] whose mean estimates `after.rate - keep * before.rate`, and whose spread tells how surely.

    One prompt has no spread: its single value is the difference itself.
    """

    def parts(counts: Counts) -> tuple[float, Array]:
        rest = counts.rounds.sum() - counts.rounds
        return counts.rate, (counts.accepted.sum() - counts.accepted) / np.where(rest > 0, rest, 1.0)

    (a, a_without), (b, b_without) = parts(before), parts(after)
    whole, num = b - keep * a, len(before.rounds)
    if num == 1:
        return np.array([whole])
    return np.asarray(num * whole - (num - 1) * (b_without - keep * a_without), dtype=np.float64)


def signs(num_prompts: int, seed: int = 0) -> Array:
    """[F, P] of +1 and -1, the first row all +1: every pattern up to 14 prompts, 9,999 drawn ones beyond."""
    if num_prompts <= MAX_EXACT:
        bits = np.arange(1 << num_prompts)[:, None] >> np.arange(num_prompts)[None, :]
        return np.asarray(1.0 - 2.0 * (bits & 1), dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, 2, size=(NUM_FLIPS, num_prompts))
    return np.vstack([np.ones((1, num_prompts)), 1.0 - 2.0 * drawn])


@dataclass(frozen=True)
class Family:
    """All cells, tested together. [C] each: p-values alone, and adjusted for all; `critical` is what the statistic
    has to reach for an adjusted p at the level in the first step, infinite when no data could reach it."""

    p: Array
    adjusted: Array
    critical: float


def _standardised(values: Array, flips: Array) -> Array:
    """[F, C]: sums of flipped values over the root of their sum of squares; monotone in Student's t."""
    norm = np.sqrt((values**2).sum(axis=0))
    # Prompts that a cell lacks, and differences of exactly nothing, are zeros and say nothing.
    return np.asarray(flips @ np.where(norm > 0, values / np.where(norm > 0, norm, 1.0), 0.0), dtype=np.float64)


def judge(values: Array, tail: Literal["lower", "upper", "both"], level: float, seed: int = 0) -> Family:
    """Is each column's mean below (above, other than) 0? `values`: [P, C], 0 where a cell lacks a prompt.

    Exact when pseudo-values are symmetric about their mean, which holds when nothing but noise tells two runs of a
    prompt apart.
    """
    num_prompts, num_cells = values.shape
    if not num_cells:
        return Family(np.zeros(0), np.zeros(0), math.inf)
    found = _standardised(values, signs(num_prompts, seed))
    found = np.abs(found) if tail == "both" else -found if tail == "lower" else found
    seen = found[0]
    p = (found >= seen - _SLACK).mean(axis=0)
    order = np.argsort(-seen, kind="stable")
    # Step down: a cell competes with those whose evidence is weaker, itself included.
    largest = np.maximum.accumulate(found[:, order[::-1]], axis=1)[:, ::-1]
    steps = np.maximum.accumulate((largest >= seen[order] - _SLACK).mean(axis=0))
    adjusted = np.empty(num_cells)
    adjusted[order] = steps
    return Family(p, adjusted, _critical(largest[:, 0], level))


def _critical(largest: Array, level: float) -> float:
    """The smallest value that at most a share `level` of all flips reach."""
    descending = np.sort(largest)[::-1]
    allowed = int(level * len(descending) + _SLACK)
    above = descending[descending > descending[allowed] + _SLACK]
    return float(above[-1]) if len(above) else math.inf


def smallest_visible(values: Array, critical: float, scale: float) -> float:
    """The difference that would have been called with 80 % chance, in units of `scale`; infinite: none would.

    `values`: [P] of one cell. By the normal approximation, from this very spread.
    """
    num = len(values)
    if scale <= 0 or num < 2 or critical**2 >= num:
        return math.inf
    needed = critical * math.sqrt((num - 1) / (num - critical**2))
    return float((needed + NormalDist().inv_cdf(POWER)) * values.std(ddof=1) / math.sqrt(num) / scale)


def relative_interval(before: Counts, after: Counts, level: float = 0.05, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over prompts (Efron, 1979) of `after.rate / before.rate - 1`."""
    num = len(before.rounds)
    weights: Any = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
    a = weights @ before.accepted / (weights @ before.rounds)
    b = weights @ after.accepted / (weights @ after.rounds)
    usable = a > 0
    if not usable.any():
        return math.nan, math.nan
    low, high = np.quantile(b[usable] / a[usable] - 1, [level / 2, 1 - level / 2])
    return float(low), float(high)


def mean_interval(values: Array, level: float = 0.05, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over prompts of the mean of `values`, [P]."""
    num = len(values)
    weights: Any = np.random.default_rng(seed).multinomial(num, np.full(num, 1 / num), size=NUM_RESAMPLES)
    low, high = np.quantile(weights @ values / num, [level / 2, 1 - level / 2])
    return float(low), float(high)
