"""What one text teaches the next: estimates, costs, and who may know of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from random import Random
from typing import Any

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from specdec.drafters import HybridDrafter, ModelDrafter, NgramDrafter, SuffixDrafter

import specdec
from specdec.costs import Costs, cost_at
from specdec.estimates import Average, Line, Meter, Track
from specdec.experience import Experience
from specdec.policy import Constant, Fixed, Plan, Policy, PolicyRun, Throughput, ThroughputRun
from specdec.tree_policy import AdaptiveTree, AdaptiveTreeRun


@dataclass
class Facts:
    num_nodes: int
    seconds: dict[str, float]
    num_accepted: int = 0
    drafter: str = "model"
    expected: float | None = None
    depth_proposed: int = field(init=False)
    num_evaluated: int = field(init=False)

    def __post_init__(self) -> None:
        self.depth_proposed = self.num_nodes
        self.num_evaluated = self.num_accepted + (self.num_accepted < self.num_nodes)


@dataclass(frozen=True)
class Priced(Policy):
    """Plans with costs that no clock has measured."""

    def start(self) -> PolicyRun:
        return Constant(Plan(4, costs=Costs({1: 1.0, 9: 1.0}, draft_average=0.05), limit=4))


def decoded(run: Any, rounds: int, accepts: int, plain: float = 1.0, level: float = 0.05) -> list[int]:
    """A text in a world where up to `accepts` tokens are accepted; the lengths that were chosen."""
    lengths = []
    for _ in range(rounds):
        k = run.plan().depth
        run.observe(Facts(k, {"verify": plain + 0.01 * k, "draft": level * k}, min(k, accepts)))
        lengths.append(k)
    return lengths


def test_the_next_text_does_not_measure_again() -> None:
    policy = Throughput(k=4)
    first = policy.start()
    assert decoded(first, 20, 3)[:3] == [4, 0, 4]
    second = policy.resume(first)
    assert isinstance(second, ThroughputRun)
    assert second.rounds == 3
    assert 0 not in decoded(second, 4, 3)
    assert decoded(policy.start(), 3, 3) == [4, 0, 4]  # somebody else's text


def test_the_next_text_may_be_another_kind() -> None:
    """What earlier texts showed gives way to a few rounds of the text itself."""
    policy = Throughput(k=4, probe_every=10)
    first = policy.start()
    decoded(first, 65, 0, level=0.3)
    second = policy.resume(first)
    lengths = decoded(second, 60, 16, level=0.3)
    assert lengths[0] == 0
    assert min(lengths[-30:]) >= 8
    worse = decoded(policy.resume(second), 40, 0, level=0.2)
    assert worse[0] > 0
    assert worse[-20:].count(0) >= 17


def test_probes_go_on_from_text_to_text() -> None:
    """Texts that are shorter than a probe's pause would never look again."""
    policy = Throughput(k=4, probe_every=24)
    run: Any = policy.start()
    decoded(run, 30, 0, level=0.5)
    looked = []
    for _ in range(8):
        run = policy.resume(run)
        looked += decoded(run, 10, 0, level=0.5)
    assert 2 <= sum(k > 0 for k in looked) <= 5


def test_acceptance_starts_near_all_texts_and_not_where_the_last_one_ended() -> None:
    track = Track(0.7, 64)
    for accepted in (1, 0):
        for _ in range(30):
            track.observe(accepted, 1)
        track = track.carried()
    assert 0.35 < track.acceptance(1)[0] < 0.6
    assert track.accepts[0].weight == pytest.approx(3.0)
    for _ in range(5):
        track.observe(1, 1)
    assert track.acceptance(1)[0] > 0.7


def test_a_step_that_was_being_compiled_is_soon_forgotten() -> None:
    meter = Meter()
    for seconds in (2.0, 0.004, 0.004):
        meter.observe(Facts(4, {"verify": seconds, "draft": 0.001}))
    assert meter.costs().verify[5] == pytest.approx(0.004)
    meter.observe(Facts(4, {"verify": 0.005, "draft": 0.001}))
    assert 0.004 < meter.costs().verify[5] < 0.005  # an ordinary sample is averaged
    assert meter.costs().draft["model"] == pytest.approx(0.00025)


def test_no_width_counts_as_dearer_than_a_wider_one() -> None:
    meter = Meter()
    for nodes, seconds in ((4, 0.004), (0, 2.0), (4, 0.004)):  # the plain step was compiled in its only round
        meter.observe(Facts(nodes, {"verify": seconds}))
    assert meter.costs().verify[1] == 2.0
    carried = meter.carried()
    assert carried.tells_plain
    assert carried.costs().verified(1) == meter.costs().verified(1) == pytest.approx(0.004)


def test_widths_that_are_not_met_again_are_forgotten() -> None:
    meter = Meter()
    meter.observe(Facts(0, {"verify": 1.0}))
    texts = 0
    while 1 in meter.verify:
        for _ in range(20):
            meter.observe(Facts(3, {"verify": 1.2}))
        meter, texts = meter.carried(), texts + 1
    assert 3 <= texts <= 6
    assert not meter.tells_plain
    policy = Throughput(k=4)
    last = policy.start()
    last.meter = meter
    assert policy.resume(last).rounds == 0  # measures a plain round again
    assert meter.verify[4].weight == pytest.approx(8.0, rel=0.01)


def test_trees_go_on_too() -> None:
    policy = AdaptiveTree(k=4)
    first = policy.start()
    for _ in range(12):
        plan = first.plan()
        first.observe(Facts(plan.depth, {"verify": 1.0 + 0.01 * plan.depth, "draft": 0.02 * plan.depth}, plan.depth))
    second = policy.resume(first)
    assert isinstance(second, AdaptiveTreeRun)
    assert second.plan().costs is not None
    assert policy.start().plan().costs is None
    assert policy.resume(Throughput().start()).plan().costs is None  # of another policy: nothing to go on from
    assert Throughput().resume(policy.start()).rounds == 0


def test_who_goes_on_from_whom() -> None:
    experience = Experience()
    one, other = NgramDrafter(), SuffixDrafter()
    policy = Throughput()

    def begun(drafter: Any = one, greedy: bool = True, policy: Policy = policy) -> bool:
        """Decode a text; whether it went on from an earlier one."""
        run = experience.begin(drafter, greedy, policy)
        known = getattr(run, "rounds", 0) > 0
        decoded(run, 10, 2)
        return known

    assert not begun()
    assert begun()
    assert begun(policy=Throughput())  # an equal policy
    assert not begun(policy=Throughput(k=2))
    assert not begun(other)
    assert not begun(greedy=False)
    assert begun()
    assert begun(other)
    assert experience.begin(one, True, Fixed(3)) == Fixed(3).start()
    for _ in range(20):  # plain decoding makes a drafter each time, and learns nothing
        experience.begin(NgramDrafter(), True, Fixed(1))
    assert begun()
    for k in range(1, 9):
        begun(policy=Throughput(k=k))
    assert not begun(other)  # long ago
    assert len(experience.runs) == 8


@given(
    known=st.dictionaries(st.integers(1, 30), st.floats(0.1, 10.0), min_size=1, max_size=6),
    widths=st.lists(st.integers(1, 60), min_size=1, max_size=8),
)
def test_costs_that_are_remembered_are_those_that_were_measured(known: dict[int, float], widths: list[int]) -> None:
    costs = Costs(known)
    rising = {width: min(seconds for wider, seconds in known.items() if wider >= width) for width in known}
    for width in [*widths, *widths]:
        assert costs.verified(width) == cost_at(rising, width)
    assert all(cost_at(known, width) == seconds for width, seconds in known.items())
    narrowest, widest = min(known), max(known)
    assert cost_at(known, widest + 5) >= known[widest]
    assert cost_at(known, max(1, narrowest - 1)) == known[narrowest]


@given(
    known=st.dictionaries(st.integers(1, 30), st.floats(0.1, 10.0), min_size=1, max_size=6),
    acceptance=st.lists(st.floats(0.0, 1.0), max_size=16),
    level=st.floats(0.0, 2.0),
    levels=st.none() | st.integers(0, 3),
)
def test_the_best_length_is_the_best_of_all(
    known: dict[int, float], acceptance: list[float], level: float, levels: int | None
) -> None:
    """The search stops where no longer draft can be better; none that was left out is."""
    costs = Costs(known, draft_average=level)
    survival = list(accumulate(acceptance, mul))
    rates = [1 / costs.round(0, 0)]
    for length in range(1, len(survival) + 1):
        seconds = costs.round(length, length if levels is None else levels)
        rates.append((1 + sum(survival[:length])) / seconds)
    best, rate = costs.best_length(survival, levels=levels)
    assert rate == pytest.approx(max(rates))
    assert rates[best] == pytest.approx(rate)


def test_an_average_is_carried_with_less_weight() -> None:
    average = Average(32)
    for value in (1.0, 0.0, 1.0, 1.0):
        average.add(value)
    assert average.carried(2.0).mean() == pytest.approx(average.mean())
    assert average.carried(2.0).weight == pytest.approx(2.0)
    assert average.carried(100.0).weight == pytest.approx(average.weight)
    assert Average(8).carried(3.0).weight == 0.0


def test_a_draft_starts_before_its_first_level() -> None:
    line = Line(16)
    assert line.fit() == (0.0, 0.0)
    for _ in range(10):
        line.add(2, 5.0)
    assert line.fit() == pytest.approx((0.0, 2.5))  # nothing tells a start from a level
    for levels in (1, 2, 4, 3, 1, 4) * 4:
        line.add(levels, 3.0 + levels)
    start, level = line.fit()
    assert start == pytest.approx(3.0, abs=0.25)
    assert level == pytest.approx(1.0, abs=0.1)
    carried = line.carried(4.0)
    assert carried.weight == pytest.approx(4.0)
    assert carried.fit() == pytest.approx(line.fit())
    costs = Costs({1: 1.0}, {"model": 1.0}, 2.0, 0.5, {"model": 3.0}, 4.0)
    assert (costs.drafted(0, "model"), costs.drafted(2, "model"), costs.drafted(2)) == (0.0, 5.0, 8.0)
    assert costs.round(2, 2, "model") == 6.5


@given(st.lists(st.tuples(st.integers(1, 16), st.floats(0.0, 10.0)), min_size=1, max_size=30))
def test_no_level_is_free_and_none_pays_for_the_start(drafts: list[tuple[int, float]]) -> None:
    line = Line(16)
    for levels, seconds in drafts:
        line.add(levels, seconds)
    start, level = line.fit()
    assert start >= -1e-9
    assert 0.25 * line.average - 1e-9 <= level <= line.average + 1e-9


def test_a_dear_start_does_not_keep_drafts_short() -> None:
    """Seven of ten tokens are accepted: four levels pay, of which the first costs four times as much as the next."""
    random, run = Random(0), Throughput().start()
    lengths = []
    for _ in range(400):
        k = run.plan().depth
        accepted = next((i for i in range(k) if random.random() > 0.7), k)
        run.observe(Facts(k, {"verify": 1.0 + 0.02 * k, "draft": 0.3 + 0.1 * k if k else 0.0}, accepted))
        lengths.append(k)
    rates = [sum(0.7**i for i in range(k + 1)) / (1.0 + 0.02 * k + (0.3 + 0.1 * k) * (k > 0)) for k in range(9)]
    best = rates.index(max(rates))
    assert best == 4
    assert sum(lengths[200:]) / 200 > best - 1


def test_a_decoder_learns_from_text_to_text_and_streams_in_between() -> None:
    target = tiny_models.tiny("llama")
    made = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(tiny_models.noisy(target, 0.05)))
    begun = []
    for seed in range(3):
        made.generate([3, 5, 7, seed], max_new_tokens=20, temperature=1.0, seed=seed)
        made.generate_plain([3, 5, 7, seed], max_new_tokens=4)
        begun.append(len(made.experience.runs))
    assert begun == [1, 1, 1]
    one, other = made.stream([3, 5], max_new_tokens=20), made.stream([4, 6], max_new_tokens=20)
    next(one)
    next(other)
    assert one.finish().tokens == tiny_models.reference(target, [3, 5], 20)
    assert other.finish().tokens == tiny_models.reference(target, [4, 6], 20)
    assert len(made.experience.runs) == 2  # greedy and sampled


def test_a_hybrid_learns_across_texts_only_where_rounds_follow_the_clock() -> None:
    """Under a policy without a clock a text's rounds are its own: the same after other texts as before them."""
    target = tiny_models.tiny("llama")
    prompt, others = [3, 5, 7, 3, 5, 7, 3], [[1, 2, 1, 2, 1, 2], [9, 9, 9, 9], [4, 8, 4, 8]]

    def shapes(policy: Policy) -> tuple[Any, Any, HybridDrafter]:
        hybrid = HybridDrafter(SuffixDrafter(), ModelDrafter(tiny_models.noisy(target, 0.05)))
        made = specdec.SpeculativeDecoder(target, drafter=hybrid, policy=policy)

        def rounds() -> list[Any]:
            trace = made.generate(prompt, max_new_tokens=40, temperature=1.0, seed=5).trace
            return [(r.drafter, r.num_nodes, r.num_accepted) for r in trace.rounds]

        before = rounds()
        for other in others:
            made.generate(other, max_new_tokens=40, temperature=1.0)
        return before, rounds(), hybrid

    before, after, hybrid = shapes(Fixed(4))
    assert before == after
    assert not hybrid._earlier[False]
    before, after, hybrid = shapes(Priced())
    assert sum(nodes > 0 for _, nodes, _ in before) < hybrid._earlier[False]["neural"].of_all[0].weight
