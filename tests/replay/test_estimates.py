"""Where chance decides, a run lies within the bound of its estimate."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny_drafters

import specdec
from specdec.costs import Costs
from specdec.errors import InputError
from specdec.policy import Confidence, Fixed, Policy
from specdec.registry import create
from specdec.replay import Recording, record, replay
from specdec.replay.prices import read_costs
from specdec.trace import summarize

PROMPTS = [tiny_drafters.PROMPT, *([i, 2 * i, 5] for i in range(2, 9))]
TEXTS: dict[str, Any] = {"max_new_tokens": 16, "temperature": 1.0}


def seeds(first: int) -> list[int]:
    return [100 * first + i for i in range(len(PROMPTS))]


@cache
def decoder(name: str) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(tiny_drafters.target(), drafter=tiny_drafters.shared(name), policy=Fixed(3))


@cache
def recorded(name: str, seed: int, top_m: int = 16) -> Recording:
    return record(decoder(name), PROMPTS, depth=3, top_m=top_m, costs=False, seed=seeds(seed), **TEXTS)


def measured(name: str, rule: str, policy: Policy, seed: int) -> float:
    chosen = create("verifier", rule)
    pairs = zip(PROMPTS, seeds(seed), strict=True)
    made = [decoder(name).generate(p, verifier=chosen, policy=policy, seed=s, **TEXTS) for p, s in pairs]
    return summarize([r for one in made for r in one.trace.rounds], 0).mean_acceptance_length


@pytest.mark.parametrize(
    ("name", "rule", "policy"),
    [
        ("model", "ratio", Fixed(3)),
        ("model", "block", Fixed(3)),
        ("model", "match", Fixed(3)),
        ("model", "greedy-multi", Fixed(2, (3, 2))),
        ("eagle", "ratio", Fixed(3)),
        ("ngram", "match", Fixed(3)),
        ("model", "ratio", Confidence(0.3, k=3)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_run_lies_within_the_bound(name: str, rule: str, policy: Policy) -> None:
    found = [replay(recorded(name, seed), policy, rule, repetitions=8) for seed in range(2)]
    runs = [measured(name, rule, policy, seed) for seed in (10, 11)]
    off = []
    for one in found:
        assert not one.exact
        assert one.bound is not None
        assert 0 < one.bound < 1  # or it would say nothing
        off += [abs(run - one.stats.mean_acceptance_length) / one.bound for run in runs]
    # 95 % of runs, not all of them, lie within.
    assert sum(share <= 1 for share in off) >= 3
    assert max(off) <= 2


def test_rules_differ_as_theory_says() -> None:
    found = {rule: replay(recorded("model", 0), Fixed(3), rule) for rule in ("ratio", "block", "match")}
    length = {rule: one.stats.mean_acceptance_length for rule, one in found.items()}
    assert length["block"] >= length["ratio"] > length["match"]
    assert found["ratio"].repetitions > 1
    assert found["match"].repetitions == 1
    assert found["ratio"].label.startswith("estimated ± ")


def test_fewer_entries_widen_the_bound() -> None:
    wide = replay(recorded("model", 0, 2), Fixed(2, (3, 2)), "recursive")
    near = replay(recorded("model", 0, 64), Fixed(2, (3, 2)), "recursive")
    assert wide.bound is not None
    assert near.bound is not None
    assert wide.bound > near.bound + 0.01
    assert any("largest entries" in reason for reason in wide.reasons)
    assert abs(wide.stats.mean_acceptance_length - near.stats.mean_acceptance_length) <= wide.bound
    with pytest.raises(InputError, match="--top-m"):
        replay(recorded("model", 0, 2), Fixed(1, (4,)), "greedy-multi")


def test_every_text_has_its_own_seed() -> None:
    recording = recorded("model", 0)
    plain = [decoder("model").generate_plain(p, seed=s, **TEXTS).tokens for p, s in zip(PROMPTS, seeds(0), strict=True)]
    assert recording.arrays["tokens_P"].tolist() == [token for text in plain for token in text]
    with pytest.raises(InputError, match="seed"):
        record(decoder("model"), PROMPTS, seed=[1, 2])


def test_replays_repeat_themselves() -> None:
    one, two = (replay(recorded("model", 0), Fixed(3), "ratio") for _ in range(2))
    assert one.stats == two.stats


def test_steps_that_disagree_leave_no_exact_replay() -> None:
    recording = recorded("model", 0)
    doubtful = Recording(recording.arrays, {**recording.meta, "num_inconsistent": 2})
    found = replay(doubtful, Fixed(3))
    assert not found.exact
    assert found.bound
    assert replay(recording, Fixed(3)).exact


def test_speedup_is_rounds_at_their_costs() -> None:
    costs = Costs({1: 1.0, 4: 1.3}, {}, 0.1, 0.05)
    found = replay(recorded("model", 0), Fixed(3), costs=costs)
    seconds = sum(costs.round(r.num_nodes, r.depth_proposed) for r in found.rounds)
    assert found.speedup == pytest.approx(1.05 * found.stats.num_tokens / seconds, rel=0.05)
    assert sum(found.stats.seconds.values()) == pytest.approx(seconds)
    assert replay(recorded("model", 0), Fixed(3)).speedup is None  # nothing was timed


@pytest.mark.parametrize(
    "content",
    [
        {}, [], {"verify": {"2": 1.0}}, {"verify": {"1": 0.0}}, {"verify": {"1": 1.0}, "draft": -1},
        {"verify": {"one": 1.0}}, {"verify": {"1": 1.0}, "other": float("inf")}, {"verify": {"0": 1.0, "1": 1.0}},
        {"verify": {"1": float("nan")}},
    ],
)  # fmt: skip
def test_costs_that_are_none(content: Any) -> None:
    with pytest.raises(InputError, match="costs"):
        read_costs(content, "here")


def test_costs_are_timed_when_asked_for() -> None:
    made = record(decoder("model"), [[3, 5]], depth=2, top_m=2, max_new_tokens=6)
    costs = read_costs(made.meta["costs"], "it")
    assert {1, 2, 3} <= set(costs.verify)
    assert costs.draft_average > 0
    assert replay(made, Fixed(2)).speedup
    assert made.arrays["seconds_PF"][:, 1].min() > 0
