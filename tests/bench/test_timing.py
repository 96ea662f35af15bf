"""The gate against other processes, and the bootstrap."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from specdec.bench.timing import MAX_OTHERS, Gate, Interval, Reading, bootstrap, others_share, read_load


def readings(*shares: float):
    """Pairs of readings one second apart, with other processes using `shares` of a core; own use is half a core."""
    busy = own = wall = 0.0
    made = []
    for share in shares:
        made.append(Reading(wall, busy, own))
        wall, busy, own = wall + 1, busy + share + 0.5, own + 0.5
        made.append(Reading(wall, busy, own))
    queue = iter(made)
    return lambda: next(queue)


def test_own_work_is_not_counted_as_others():
    assert others_share(Reading(0, 0, 0), Reading(1, 1.0, 1.0), tick=0) == 0
    assert others_share(Reading(0, 0, 0), Reading(2, 3.0, 2.0), tick=0) == pytest.approx(0.5)


def test_a_tick_of_doubt_does_not_make_a_slice_dirty():
    before, after = Reading(0, 0, 0), Reading(0.1, 0.12, 0.1)
    assert others_share(before, after, tick=0) > MAX_OTHERS
    assert others_share(before, after, tick=0.01) == pytest.approx(0, abs=1e-9)


def test_no_readings_no_gate():
    gate = Gate(read=lambda: None)
    assert gate.time(lambda: 7).result == 7
    assert not gate.watching
    assert (gate.num_clean, gate.num_slices, gate.num_retries) == (1, 1, 0)


def test_a_helpers_work_counts_as_own_in_the_calls_that_it_works_for():
    used = itertools.count()

    def helper() -> float:
        return 0.7 * next(used)  # between two readings

    assert Gate(retries=0, read=readings(0.7)).time(lambda: None, helper).others == 0
    assert Gate(retries=0, read=readings(0.7)).time(lambda: None).others == pytest.approx(0.7, abs=0.03)


def test_dirty_slices_are_repeated_and_a_clean_one_counts():
    results = itertools.count()
    gate = Gate(read=readings(0.9, 0.5, 0.0))
    timed = gate.time(lambda: next(results))
    assert (timed.result, timed.retries, timed.clean) == (2, 2, True)
    assert (gate.num_slices, gate.num_clean, gate.num_retries) == (1, 1, 2)


def test_after_the_retries_the_least_disturbed_try_counts_and_is_called_dirty():
    results = itertools.count()
    gate = Gate(retries=2, read=readings(0.9, 0.3, 0.6))
    timed = gate.time(lambda: next(results))
    assert (timed.result, timed.clean) == (1, False)
    assert timed.others == pytest.approx(0.3, abs=0.03)
    assert (gate.num_slices, gate.num_clean) == (1, 0)


def test_the_budget_bounds_all_retries_together():
    gate = Gate(retries=3, budget=1, read=readings(0.9, 0.9, 0.9, 0.9))
    for _ in range(3):
        gate.time(lambda: None)
    assert gate.num_retries == 1
    assert gate.num_slices == 3


def test_the_system_tells_or_says_that_it_does_not():
    first, second = read_load(), read_load()
    if first is None:
        pytest.skip("this system does not tell about other processes")
    assert second.wall >= first.wall
    assert second.busy >= first.busy
    assert second.own >= first.own


def test_interval_of_equal_values_is_a_point():
    interval = bootstrap([[2.0, 2.0], [2.0]])
    assert (interval.median, interval.low, interval.high) == (2.0, 2.0, 2.0)


def test_interval_against_a_known_case():
    """The median of n normal values has a standard error of about sqrt(pi / 2n)."""
    draw = random.Random(1)
    values = [draw.gauss(10, 1) for _ in range(400)]
    interval = bootstrap([[value] for value in values])
    assert interval.median == statistics.median(values)
    assert interval.low < interval.median < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * (3.1416 / 800) ** 0.5, rel=0.35)


def test_repetitions_of_one_prompt_are_not_independent_evidence():
    """The same values as eight prompts or as two prompts with four repetitions each: the second knows less."""
    many = bootstrap([[x] for x in (1.0, 1.1, 1.2, 1.3, 2.0, 2.1, 2.2, 2.3)])
    few = bootstrap([[1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]])
    assert few.median == many.median
    assert few.high - few.low > many.high - many.low


def test_no_values_no_interval():
    with pytest.raises(ValueError, match="no values"):
        bootstrap([[], []])


def test_intervals_widen_with_the_choice() -> None:
    own = Interval(1.2, 1.1, 1.5)
    assert own.among(1) == own
    # 0.05 / 20: the normal quantile 3.0233 instead of 1.9600
    assert own.among(20).low == pytest.approx(1.2 * (1.1 / 1.2) ** (3.0233 / 1.96), rel=1e-4)
    assert own.among(20).high == pytest.approx(1.2 * (1.5 / 1.2) ** (3.0233 / 1.96), rel=1e-4)
    assert own.among(2).low > own.among(20).low
    assert Interval(1.2, 1.2, 1.2).among(9) == Interval(1.2, 1.2, 1.2)
    assert Interval(0.5, 0.0, 1.0).among(9) == Interval(0.5, 0.0, 1.0)  # no logarithm
