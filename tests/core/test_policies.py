"""How many tokens to draft: arithmetic on rounds made by hand, without a clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from specdec.policy import Confidence, Fixed, Heuristic, Plan, Policy, Throughput, ThroughputRun


@dataclass
class Facts:
    depth_proposed: int
    num_accepted: int
    num_evaluated: int
    num_nodes: int
    seconds: dict[str, float] = field(default_factory=dict)
    drafter: str = "model"
    expected: float | None = None


def play(run: ThroughputRun, rounds: int, accept: list[int], draft: float, verify: float, per_row: float) -> list[int]:
    """Rounds in a world with fixed costs, where round i would accept up to `accept[i]`; returns the lengths chosen."""
    chosen = []
    for i in range(rounds):
        k = run.plan().depth
        accepted = min(k, accept[i % len(accept)])
        seconds = {"draft": draft * k, "verify": verify + per_row * k, "commit": 0.0, "other": 0.0}
        run.observe(Facts(k, accepted, accepted + (accepted < k), k, seconds))
        chosen.append(k)
    return chosen


def settled(chosen: list[int]) -> list[int]:
    return chosen[len(chosen) // 2 :]


def test_throughput_does_not_draft_when_drafting_is_dear() -> None:
    chosen = play(Throughput(probe_every=10).start(), 80, [3], draft=5.0, verify=1.0, per_row=0.0)
    assert settled(chosen).count(0) >= 34  # of 40; the rest are probes
    assert set(settled(chosen)) == {0, 2}


def test_throughput_does_not_draft_when_nothing_is_accepted() -> None:
    chosen = play(Throughput(probe_every=10).start(), 80, [0], draft=0.2, verify=1.0, per_row=0.05)
    assert settled(chosen).count(0) >= 34


def test_throughput_drafts_as_far_as_it_may_when_drafting_is_free() -> None:
    chosen = play(Throughput(limit=9).start(), 80, [99], draft=0.0, verify=1.0, per_row=0.0)
    assert set(settled(chosen)) == {9}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_throughput_finds_the_length_where_acceptance_ends(depth: int) -> None:
    chosen = play(Throughput(probe_every=12).start(), 200, [depth], draft=0.05, verify=1.0, per_row=0.01)
    late = settled(chosen)
    assert max(set(late), key=late.count) == depth


def test_throughput_probes_deeper_now_and_then() -> None:
    chosen = play(Throughput(probe_every=10).start(), 100, [1], draft=0.05, verify=1.0, per_row=0.3)
    late = settled(chosen)
    usual = max(set(late), key=late.count)
    assert late.count(usual + 2) >= 4
    assert late.count(usual) + late.count(usual + 2) == len(late)


def test_throughput_comes_back_when_acceptance_does() -> None:
    run = Throughput(probe_every=8).start()
    dear = play(run, 80, [0], draft=0.1, verify=1.0, per_row=0.05)
    assert settled(dear).count(0) > 30
    assert settled(play(run, 400, [6], draft=0.1, verify=1.0, per_row=0.05)).count(0) < 50


def test_throughput_learns_acceptance_from_evaluated_positions_only() -> None:
    run = Throughput(k=8, limit=8).start()
    for _ in range(60):  # five of eight accepted, depth six rejected, seven and eight never looked at
        run.observe(Facts(8, 5, 6, 8, {"verify": 1.0}))
    estimates = run.track.acceptance(run.limit)
    assert all(estimate > 0.95 for estimate in estimates[:5])
    assert estimates[5] < 0.05
    assert len(run.track.accepts) == 6  # depths 7 and 8 have no sample of their own
    run = Throughput().start()
    run.observe(Facts(0, 0, 0, 0, {"verify": 1.0}))
    assert run.track.accepts == []  # a round without a draft says nothing about acceptance


def test_throughput_measures_a_plain_round_before_it_decides() -> None:
    run = Throughput(k=4).start()
    assert play(run, 3, [4], 0.0, 1.0, 0.0) == [4, 0, 4]
    assert sorted(run.meter.verify) == [1, 5]


def test_throughput_interpolates_what_it_measured() -> None:
    run = Throughput(k=4).start()
    play(run, 3, [4], 0.5, 1.0, 0.25)
    costs = run.meter.costs()
    assert costs.round(0, 0) == pytest.approx(1.0)
    assert costs.round(2, 2) == pytest.approx(1.5 + 2 * 0.5)
    assert costs.round(2, 2, "model") == costs.round(2, 2, "somebody else") == costs.round(2, 2)
    survival = run.survival()
    accepted = run.track.acceptance(run.limit)
    assert survival[1] == pytest.approx(accepted[0] * accepted[1])
    best, rate = costs.best_length(survival)
    rates = [(1 + sum(survival[:k])) / costs.round(k, k) for k in range(len(survival) + 1)]
    assert (best, rate) == (rates.index(max(rates)), pytest.approx(max(rates)))


def test_heuristic_goes_two_up_and_one_down() -> None:
    run = Heuristic(5, limit=8).start()
    chosen = []
    for accepted in (5, 7, 8, 3, 0, 0):
        chosen.append(run.plan().depth)
        run.observe(Facts(chosen[-1], accepted, 0, chosen[-1]))
    assert chosen == [5, 7, 8, 8, 7, 6]
    run.observe(Facts(0, 0, 0, 0))  # nothing was proposed: nothing is learnt
    assert run.plan().depth == 5
    for _ in range(10):
        run.observe(Facts(5, 0, 1, 5))
    assert run.plan().depth == 1


def test_runs_do_not_share_what_they_learnt() -> None:
    policy = Heuristic(5)
    first, second = policy.start(), policy.start()
    first.observe(Facts(5, 5, 5, 5))
    assert (first.plan().depth, second.plan().depth) == (7, 5)


def test_plans_are_cut_to_what_is_left() -> None:
    plan = Plan(3, (4, 2, 1), 0.5)
    assert plan.limited(9) is plan
    assert plan.limited(2) == Plan(2, (4, 2), 0.5)
    assert plan.limited(-1) == Plan(0, (), 0.5)
    assert [plan.children(d) for d in range(5)] == [4, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("policy", "name", "branches"),
    [
        (Fixed(3), "fixed(k=3)", False),
        (Fixed(3, (1, 1)), "fixed(k=3)", False),
        (Fixed(3, (4, 2)), "fixed(k=3, tree 4x2)", True),
        (Confidence(0.3, 7), "confidence(threshold=0.3, k=7)", False),
        (Heuristic(4), "heuristic(k=4)", False),
        (Throughput(), "throughput", False),
    ],
)
def test_names_and_shapes(policy: Policy, name: str, branches: bool) -> None:
    assert (policy.name, policy.branches) == (name, branches)
