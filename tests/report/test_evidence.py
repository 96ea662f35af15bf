"""Sign flips, max-T and the statement of what could have been seen, against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drift_documents import rates, rounds

from specdec.errors import InputError
from specdec.report.evidence import (
    Counts,
    check_level,
    judge,
    pseudo_values,
    relative_interval,
    signs,
    smallest_visible,
)

LEVEL = 0.05


def drawn(chances: np.ndarray, draw: np.random.Generator, num_tokens: int = 64) -> Counts:
    found = [rounds(float(c), num_tokens, 4, draw)["accepted"] for c in chances]
    return Counts(np.array([float(sum(one)) for one in found]), np.array([float(len(one)) for one in found]))


def simulate(num_runs: int, num_prompts: int, num_cells: int, drop: float, tail: str, keep: float = 1.0):
    """Share of runs in which any cell is called; and what would have been seen, of the first cell."""
    draw, called, seen = np.random.default_rng(7), 0, []
    for run in range(num_runs):
        columns = []
        for _ in range(num_cells):
            chances = rates(num_prompts, seed=int(draw.integers(1 << 30)))
            before, after = drawn(chances, draw), drawn(np.clip(chances - drop, 0.01, 1), draw)
            columns.append(pseudo_values(before, after, keep))
        family = judge(np.stack(columns, axis=1), tail, LEVEL, seed=run)
        called += bool((family.adjusted <= LEVEL).any())
        seen.append(smallest_visible(columns[0], family.critical, before.rate))
    return called / num_runs, float(np.median(seen))


# 300 runs: a rate of 0.05 gives 0.10 or more once in ten thousand times.
@pytest.mark.parametrize(("num_prompts", "num_cells", "tail"), [(8, 1, "lower"), (8, 5, "both"), (16, 5, "lower")])
def test_equal_runs_raise_alarms_no_more_often_than_the_level(num_prompts, num_cells, tail):
    rate, _ = simulate(300, num_prompts, num_cells, 0.0, tail)
    assert rate < 0.10


def test_without_adjustment_many_cells_would_raise_false_alarms():
    """The negative control of the adjustment: the same runs, p-values taken alone."""
    draw, alone = np.random.default_rng(3), 0
    for run in range(100):
        columns = [pseudo_values(*(drawn(chances, draw) for _ in range(2))) for chances in [rates(8)] * 10]
        alone += bool((judge(np.stack(columns, axis=1), "both", LEVEL, seed=run).p <= LEVEL).any())
    assert alone > 25


def test_what_is_said_to_be_visible_is_seen_about_as_often_as_said():
    _, visible = simulate(60, 24, 1, 0.0, "lower")
    chance = 0.7
    # E[accepted | chance a, k = 4] = a + a^2 + a^3 + a^4: the drop of `a` that loses the share `visible` of it.
    lost = next(d for d in np.arange(0, 0.5, 0.001) if _accepted(chance - d) <= (1 - visible) * _accepted(chance))
    caught, _ = simulate(150, 24, 1, float(lost), "lower")
    assert 0.6 < caught < 0.95


def _accepted(a: float) -> float:
    return sum(a**i for i in range(1, 5))


def test_pseudo_values_average_to_the_difference_of_rates_up_to_bias():
    draw = np.random.default_rng(0)
    chances = rates(60)
    before, after = drawn(chances, draw), drawn(chances - 0.1, draw)
    values = pseudo_values(before, after, keep=0.9)
    assert values.mean() == pytest.approx(after.rate - 0.9 * before.rate, abs=0.01)
    assert values.std() > 0


def test_a_single_prompt_has_a_difference_and_no_spread():
    values = pseudo_values(Counts(np.array([8.0]), np.array([4.0])), Counts(np.array([6.0]), np.array([4.0])))
    assert values.tolist() == [-0.5]
    assert math.isinf(smallest_visible(values, 1.0, 2.0))


def test_every_pattern_of_signs_up_to_fourteen_prompts_and_the_observed_one_first():
    few, many = signs(3), signs(20)
    assert len(np.unique(few, axis=0)) == 8
    assert (few[0] == 1).all()
    assert (many[0] == 1).all()
    assert len(many) == 10_000


def test_the_smallest_p_of_few_prompts_and_the_critical_value_say_the_same():
    """Four prompts: one pattern of sixteen is as extreme as any data can be, so that 0.05 is out of reach."""
    column = np.array([[-1.0], [-1.1], [-0.9], [-1.2]])
    family = judge(column, "lower", LEVEL)
    assert family.p[0] == pytest.approx(1 / 16)
    assert math.isinf(smallest_visible(column[:, 0], family.critical, 1.0))
    five = np.vstack([column, [[-1.05]]])
    assert judge(five, "lower", LEVEL).p[0] == pytest.approx(1 / 32)


def test_zeros_say_nothing_and_change_nothing():
    column = np.random.default_rng(1).normal(0.5, 1, (12, 1))
    alone = judge(column, "both", LEVEL)
    beside = judge(np.hstack([column, np.zeros((12, 1))]), "both", LEVEL)
    assert beside.adjusted[0] == alone.adjusted[0]
    assert beside.p[1] == 1


def test_cells_that_say_the_same_are_not_adjusted_away():
    """Max-T knows what cells have in common; Bonferroni would multiply by their number."""
    column = np.random.default_rng(5).normal(0.6, 1, (12, 1))
    alone, ten = judge(column, "both", LEVEL), judge(np.repeat(column, 10, axis=1), "both", LEVEL)
    assert ten.adjusted[0] == pytest.approx(alone.adjusted[0])


def test_adjusted_p_values_never_fall_below_those_alone_and_keep_their_order():
    columns = np.random.default_rng(2).normal(0.4, 1, (12, 6))
    family = judge(columns, "both", LEVEL)
    assert (family.adjusted >= family.p - 1e-12).all()
    ordered = family.adjusted[np.argsort(family.p, kind="stable")]
    assert (np.diff(ordered) >= -1e-12).all()


def test_the_interval_covers_a_known_change():
    draw = np.random.default_rng(11)
    chances = rates(60)
    low, high = relative_interval(drawn(chances, draw, 256), drawn(chances - 0.1, draw, 256))
    true = np.mean([_accepted(c - 0.1) for c in chances]) / np.mean([_accepted(c) for c in chances]) - 1
    assert low < true < high < 0


@pytest.mark.parametrize("level", [0, 0.5, -1, 2])
def test_levels_out_of_range_are_refused(level):
    with pytest.raises(InputError, match="level"):
        check_level(level)
