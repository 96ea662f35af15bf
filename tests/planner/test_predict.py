"""Predicted speed-up against the closed form, against simulation, and against costs that are set by hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost
from specdec.planner.predict import (
    Once,
    Prediction,
    Setting,
    TextCost,
    best,
    break_even,
    plan,
    speedup_at,
    uniform_acceptance,
)
from specdec.planner.verdict import Roofline, verdict
from specdec.planner.work import (
    Seen,
    SeenText,
    Work,
    expected_work,
    geometric,
    recut,
    survival,
    survival_of,
    tokens_per_round,
    work_of,
)


def written(bits: list[bool], k: int, limit: int | None = None) -> SeenText:
    """The rounds of chains of k tokens over a text at whose position i the draft is right if bits[i].

    `limit`: what the drafter has at most, whatever it is asked for.
    """
    rounds, at = [], 0
    while at < len(bits):
        proposed = min(k, len(bits) - at - 1, limit if limit is not None else k)
        accepted = 0
        while accepted < proposed and bits[at + accepted]:
            accepted += 1
        rounds.append(Seen(proposed, accepted))
        at += accepted + 1
    return SeenText(k, 7, len(bits), len(bits), tuple(rounds))


@pytest.mark.parametrize("k", [1, 2, 5, 16, 50])
@pytest.mark.parametrize("a", [0.0, 0.3, 0.8, 0.999])
def test_tokens_per_round_is_the_sum_of_the_survival(a: float, k: int) -> None:
    assert tokens_per_round(a, k) == pytest.approx(1 + sum(geometric(a, k)))
    assert tokens_per_round(1.0, k) == k + 1


def test_long_texts_have_the_closed_forms_rounds() -> None:
    for a, k in ((0.8, 5), (0.5, 2), (0.95, 16)):
        work = expected_work(geometric(a, k), 20_000)
        assert work.tokens_per_round == pytest.approx(tokens_per_round(a, k), rel=2e-3)


@pytest.mark.parametrize(("num_tokens", "k"), [(1, 4), (2, 4), (24, 3), (24, 40)])
def test_expected_rounds_are_those_of_simulated_texts(num_tokens: int, k: int) -> None:
    draw, a, times = random.Random(1), 0.7, 4000
    rounds: dict[tuple[int, int, int], int] = {}
    for _ in range(times):
        left = num_tokens
        while left:
            depth = min(k, left - 1)
            accepted = 0
            while accepted < depth and draw.random() < a:
                accepted += 1
            rounds[depth, depth, depth] = rounds.get((depth, depth, depth), 0) + 1
            left -= accepted + 1
    work = expected_work(geometric(a, k), num_tokens)
    assert set(work.rounds) >= set(rounds)
    for size, expected in work.rounds.items():
        assert expected == pytest.approx(rounds.get(size, 0) / times, abs=5 * (expected / times) ** 0.5 + 0.01)
    assert work.num_tokens == num_tokens


def test_a_trees_last_rounds_are_cut() -> None:
    shape = (-1, -1, 0, 0, 2)
    work = expected_work([0.9, 0.5, 0.2], 4, shape=shape)
    assert set(work.rounds) == {(5, 3, 3), (4, 2, 2), (2, 1, 1), (0, 0, 0)}
    assert work.rounds[5, 3, 3] == 1  # the first round
    assert work.rounds[4, 2, 2] == pytest.approx(0.1)  # three tokens are left after nothing was accepted


@pytest.mark.parametrize("curve", [[0.5, 0.6], [1.2], [0.5, -0.1]])
def test_curves_that_are_none_are_refused(curve: list[float]) -> None:
    with pytest.raises(InputError, match="falls from at most 1"):
        expected_work(curve, 10)
    with pytest.raises(InputError, match="acceptance is a probability"):
        tokens_per_round(1.1, 3)


@settings(max_examples=200, deadline=None)
@given(bits=st.lists(st.booleans(), min_size=1, max_size=60), k=st.integers(1, 9), limit=st.integers(1, 20))
def test_recut_rounds_are_those_of_a_run(bits: list[bool], k: int, limit: int) -> None:
    """At most as long as the recorded chains: exact, but for the tokens that were never drafted."""
    text = written(bits, max(k, limit))
    right = list(bits)
    at = 0
    for seen in text.rounds:  # the token behind a whole accepted chain was not drafted: it is taken to be right
        at += seen.accepted
        if seen.accepted == seen.proposed and at < len(bits):
            right[at] = True
        at += 1
    assert recut(text, k) == list(written(right, k).rounds)
    assert recut(text, text.limit) == list(text.rounds)


def test_longer_chains_go_on_as_the_following_rounds_did() -> None:
    bits = [True] * 11 + [False] + [True] * 3 + [False, True, True]
    text = written(bits, 4)
    assert recut(text, 16) == [Seen(16, 11), Seen(5, 3), Seen(1, 1)]


def test_what_a_drafter_did_not_have_is_not_asked_for() -> None:
    text = SeenText(8, 3, 9, 9, (Seen(0, 0), Seen(3, 3), Seen(2, 1), Seen(0, 0), Seen(0, 0)))
    assert recut(text, 8) == list(text.rounds)
    assert recut(text, 1) == [Seen(0, 0), Seen(1, 1), Seen(1, 1), Seen(1, 1), Seen(0, 0), Seen(0, 0)]
    with pytest.raises(InputError, match="k is the number of drafted tokens"):
        recut(text, 0)


def test_an_end_of_text_cuts_the_last_round() -> None:
    text = SeenText(4, 3, 3, 100, (Seen(4, 4),))
    assert recut(text, 2) == [Seen(2, 2)]
    assert work_of(text, 2).num_tokens == 3


def test_survival_counts_what_was_decided() -> None:
    rounds = [(4, Seen(4, 1)), (4, Seen(4, 4)), (2, Seen(2, 2)), (4, Seen(2, 2)), (1, Seen(1, 0)), (0, Seen(0, 0))]
    # depth 1: 4 of 5; depth 2: 3 of 4; depth 3: 1 of 2, as one drafter had no more and one text ended; depth 4: 1 of 1
    assert survival(rounds, 4) == pytest.approx([4 / 5, 4 / 5 * 3 / 4, 0.3, 0.3])
    assert survival([], 2) == [0.0, 0.0]
    assert survival_of([written([True] * 30, 4)], 3) == [1.0] * 3


def costs(draft: float, verify: float = 0.0, other: float = 0.0) -> TextCost:
    """A plain step takes 1 ms; `verify`: what each further row adds to it."""
    rows = {1: 1e-3, 65: 1e-3 * (1 + 64 * verify)}
    return TextCost(RoundCost(rows, level=1e-3 * draft, other=1e-3 * other, plain=0.0))


def works(
    a: float, lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 50), num_tokens: int = 400
) -> dict[Setting, list[Work]]:
    found = {Setting(): [Work(0, num_tokens)]}
    found.update({Setting(k): [expected_work(geometric(a, k), num_tokens)] for k in lengths})
    return found


def test_speedup_is_the_closed_forms_ratio() -> None:
    cost = costs(draft=0.1, verify=0.01, other=0.05)
    rows = {row.setting.k: row for row in plan(cost, works(0.8, num_tokens=20_000))}
    for k in (1, 4, 16):
        expected = tokens_per_round(0.8, k) / (1 + 0.11 * k + 0.05)
        assert rows[k].speedup == pytest.approx(expected, rel=5e-3)
        assert speedup_at(cost.round, 0.8, k) == pytest.approx(expected)
        assert rows[k].acceptance == pytest.approx(0.8, abs=2e-3)
        assert rows[k].cost == pytest.approx(1 + 0.11 * k + 0.05)
    assert rows[0].speedup == rows[0].low == rows[0].high == 1
    assert rows[0].milliseconds_per_token == pytest.approx(1.0)
    assert rows[50].speedup < 1 < rows[4].speedup  # a peak, then a loss


def test_break_even_is_where_the_speedup_is_one() -> None:
    cost = costs(draft=0.2, verify=0.02)
    for k in (1, 4, 16):
        even = break_even(cost.round, k)
        assert even is not None
        assert speedup_at(cost.round, even, k) == pytest.approx(1.0)
    assert break_even(costs(draft=1.5).round, 2) is None  # 4 plain steps for at most 3 tokens
    assert uniform_acceptance(1.0, 4) == pytest.approx(0.0, abs=1e-12)
    assert uniform_acceptance(5.5, 4) is None


def test_what_a_text_pays_once_dilutes_the_speedup() -> None:
    cost = costs(draft=0.05)
    paid = TextCost(cost.round, Once(0.0, 1e-3), Once(2e-3, 1e-3))
    text = {Setting(): [Work(100, 50)], Setting(4): [Work(100, 50, {(4, 4, 4): 20.0})]}
    (_, row) = plan(paid, text)
    assert row.speedup == pytest.approx((0.1 + 50 * 1e-3) / (0.102 + 20 * 1.2e-3))
    assert plan(cost, text)[1].speedup == pytest.approx(50 / 24)


def test_intervals_hold_texts_and_costs() -> None:
    cost = costs(draft=0.1)
    texts = [Work(0, 60, {(4, 4, 4): float(n)}) for n in (15, 20, 30, 40)]
    found = {Setting(): [Work(0, 60)] * 4, Setting(4): texts}
    (_, row) = plan(cost, found)
    assert row.low < row.speedup < row.high
    assert row.speedup == pytest.approx(240 / (1.4 * (15 + 20 + 30 + 40)))  # all texts together
    assert row.median == pytest.approx((60 / 28 + 60 / 42) / 2)
    same = {Setting(): [Work(0, 60)], Setting(4): texts[:1]}
    assert plan(cost, same)[1].low == plan(cost, same)[1].high
    noisy = plan(cost, same, [costs(draft=0.05), costs(draft=0.2)])[1]
    assert noisy.low < noisy.speedup < noisy.high
    with pytest.raises(InputError, match="the same texts"):
        plan(cost, {Setting(): [], Setting(1): []})
    with pytest.raises(InputError, match="the same texts"):
        plan(cost, {Setting(): texts[:1], Setting(4): texts})


def test_of_equal_settings_the_smaller_is_best() -> None:
    rows = plan(costs(draft=0.0), {Setting(): [Work(0, 9)], Setting(4): [Work(0, 9, {(4, 4, 4): 4})],
                                   Setting(8): [Work(0, 9, {(4, 4, 4): 4})]})  # fmt: skip
    assert best(rows).setting.k == 4


def test_a_draft_as_slow_as_the_target_must_lose() -> None:
    """Even one that is always right."""
    cost = costs(draft=1.0, verify=0.01)
    for a in (0.3, 0.9, 1.0):
        found = verdict(plan(cost, works(a)), cost, "model", a)
        assert not found.speculate
        assert found.sure
        assert found.sentence.startswith("do not speculate here")
    assert "a drafted token of model costs 100% of a plain step" in found.reason
    assert f"{1.0:.0%} of first drafted tokens" in found.reason


def test_a_good_draft_that_costs_little_must_win() -> None:
    cost = costs(draft=0.05, verify=0.01)
    found = verdict(plan(cost, works(0.85)), cost, "model", 0.85)
    assert found.speculate
    assert found.sure
    assert found.sentence.startswith("speculate with k = 8 (--k 8)")


def test_a_draft_that_is_never_right_must_lose() -> None:
    cost = costs(draft=0.05)
    found = verdict(plan(cost, works(0.0)), cost, "model", 0.0)
    assert not found.speculate
    assert "k = 1, the best, a text takes 1.05 times as long" in found.sentence


def test_a_doubtful_gain_is_called_one() -> None:
    cost = costs(draft=0.1)
    texts = [Work(0, 60, {(2, 2, 2): float(n)}) for n in (30, 40, 60, 60)]
    found = verdict(plan(cost, {Setting(): [Work(0, 60)] * 4, Setting(2): texts}), cost, "model", 0.5)
    assert found.speculate
    assert not found.sure
    assert "not sure" in found.sentence


def row(k: int, low: float, speedup: float, high: float) -> Prediction:
    return Prediction(Setting(k), speedup, low, high, speedup, 2.0, 0.5, 1.0)


PLAIN = row(0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "sure", "said"),
    [
        ([row(2, 0.7, 0.8, 0.9), row(4, 0.5, 0.6, 0.7)], True, "times as long"),
        ([row(2, 0.7, 0.95, 1.3)], False, "not sure, for the interval of k = 2 reaches 1.30x"),
        ([row(2, 0.9, 0.95, 1.0), row(4, 0.5, 0.8, 1.2)], False, "not sure, for the interval of k = 4 reaches 1.20x"),
        ([row(2, 1.0, 1.01, 1.015)], True, "no less than 99 % of its time"),
    ],
)
def test_that_it_does_not_pay_is_sure_only_where_no_interval_reaches_a_gain(
    rows: list[Prediction], sure: bool, said: str
) -> None:
    found = verdict([PLAIN, *rows], costs(draft=0.1), "model", 0.5)
    assert (found.speculate, found.sure) == (False, sure)
    assert said in found.sentence
    assert ("not sure" in found.sentence) == (not sure)


def test_the_best_of_many_needs_more_than_its_own_interval() -> None:
    top, cost = row(4, 1.02, 1.2, 1.4), costs(draft=0.1)
    others = [row(k, 0.9, 1.0, 1.1) for k in range(5, 21)]
    alone, among = verdict([PLAIN, top], cost, "model", 0.5), verdict([PLAIN, top, *others], cost, "model", 0.5)
    assert alone.sure
    assert alone.sentence.endswith("1.20x (1.02 to 1.40)")
    assert among.speculate
    assert not among.sure
    assert "the best of 17 settings, chosen by the same data; not sure, for an interval that allows" in among.sentence
    clear = verdict([PLAIN, row(4, 1.15, 1.2, 1.25), *others], cost, "model", 0.5)
    assert clear.sure
    assert clear.sentence.endswith("chosen by the same data")


def test_the_roofline_says_what_would_help() -> None:
    def line(step: float) -> Roofline:
        return Roofline(step, step, 1_000_000, 1e9)

    assert line(1e-3).share == pytest.approx(1.0)
    assert "fewer bits (--quantize" in line(1.2e-3).advice()
    assert "half of the time" in line(2e-3).advice()
    assert "something else than memory" in line(9e-3).advice()
    assert "in a cache" in line(0.5e-3).advice()
