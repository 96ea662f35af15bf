"""Replays claim no more than they know: trees under filters, and policies that look at other things than the text."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_drafters
import tiny_models
from specdec.drafters import ModelDrafter

import specdec
from specdec.policy import Constant, Fixed, Plan, Policy, PolicyRun, RoundFacts, Throughput
from specdec.replay import Recording, record, replay
from specdec.replay.clock import Watched, is_known
from specdec.replay.recording import NEVER
from specdec.replay.view import Doubts
from specdec.trace import STAGES, Round
from specdec.tree_policy import StaticTree

PROMPTS = [tiny_drafters.PROMPT, *([i, 2 * i, 5] for i in range(2, 6))]
TREE = Fixed(3, (4, 2, 1))
TEXTS: dict[str, Any] = {"max_new_tokens": 16, "seed": 3}
FILTERS: dict[str, dict[str, Any]] = {"top_k": {"top_k": 2}, "min_p": {"min_p": 0.3}, "top_p": {"top_p": 0.5}}


@cache
def decoder() -> specdec.SpeculativeDecoder:
    """A draft so far from its target that filters leave either other tokens."""
    draft = tiny_models.noisy(tiny_drafters.target(), 0.3)
    return specdec.SpeculativeDecoder(tiny_drafters.target(), drafter=ModelDrafter(draft), policy=Fixed(3))


@cache
def recorded(**more: Any) -> Recording:
    return record(decoder(), PROMPTS, depth=6, top_m=8, costs=False, **TEXTS, **{"temperature": 1.0, **more})


def numbers(rounds: Sequence[Round]) -> list[tuple[int, ...]]:
    return [(r.num_nodes, r.depth_proposed, r.num_accepted, r.num_evaluated, r.num_emitted) for r in rounds]


def measured(policy: Policy, **more: Any) -> list[tuple[int, ...]]:
    options = {**TEXTS, "temperature": 1.0, **more}
    return [n for p in PROMPTS for n in numbers(decoder().generate(p, policy=policy, **options).trace.rounds)]


def changed(recording: Recording, **arrays: np.ndarray) -> Recording:
    return Recording({**recording.arrays, **arrays}, recording.meta)


@pytest.mark.parametrize("policy", [TREE, StaticTree((-1, -1, -1, 0, 0, 2, 5))], ids=lambda policy: policy.name)
@pytest.mark.parametrize("name", FILTERS)
def test_a_token_that_was_filtered_away_is_no_child(name: str, policy: Policy) -> None:
    recording, run = recorded(**FILTERS[name]), measured(policy, **FILTERS[name])
    found = replay(recording, policy)
    assert [n[2:] for n in numbers(found.rounds)] == [n[2:] for n in run]
    assert sum(n[2] for n in run) > 0
    # Fewer nodes than the tree has: how many, is not in the trace.
    assert [n[0] for n in numbers(found.rounds)] != [n[0] for n in run]
    assert (found.exact, found.bound) == (False, 0)
    assert "number of drafted tokens" in found.reasons[0]


@pytest.mark.parametrize("name", FILTERS)
def test_the_size_of_the_support_as_the_place_of_such_a_token_would_be_caught(name: str) -> None:
    recording = recorded(**FILTERS[name])
    arrays = recording.arrays
    support = np.isfinite(arrays["draft_logp_PM"]).sum(1, keepdims=True).astype(np.int32)
    place = np.where(arrays["place_PK"] == NEVER, support, arrays["place_PK"])
    assert numbers(replay(changed(recording, place_PK=place), TREE).rounds) != numbers(replay(recording, TREE).rounds)


def test_places_and_ranks_without_probability() -> None:
    arrays = recorded(top_k=2).arrays
    gone = arrays["text_q_PK"] == 0
    there = arrays["text_q_PK"] > 0
    assert gone.any()
    assert there.any()
    for name in ("place_PK", "rank_PK"):
        assert (arrays[name][gone] == NEVER).all()
        assert (arrays[name][there] < 2).all()


def test_as_many_children_as_a_filter_leaves_are_exact() -> None:
    found = replay(recorded(top_k=4), TREE)
    assert found.exact
    assert numbers(found.rounds) == measured(TREE, top_k=4)
    assert not replay(recorded(top_k=4), Fixed(1, (5,))).exact
    for name, more in FILTERS.items():
        chain = replay(recorded(**more), Fixed(3))
        assert chain.exact, name
        assert numbers(chain.rounds) == measured(Fixed(3), **more)


def test_filters_are_for_temperatures_above_0() -> None:
    more = {"temperature": 0.0, "top_k": 2, "min_p": 0.3}
    found = replay(recorded(**more), TREE)
    assert found.exact
    assert numbers(found.rounds) == measured(TREE, **more)


def test_top_tokens_without_probability_are_no_children_of_greedy_multi() -> None:
    recording = recorded()
    ranks, q = np.zeros_like(recording.arrays["rank_PK"]), recording.arrays["text_q_PK"]
    best = replay(changed(recording, rank_PK=ranks), Fixed(1, (3,)), "greedy-multi", repetitions=1)
    none = replay(
        changed(recording, rank_PK=ranks, text_q_PK=np.zeros_like(q)), Fixed(1, (3,)), "greedy-multi", repetitions=1
    )
    assert best.stats.num_accepted_draft_tokens > 0
    assert none.stats.num_accepted_draft_tokens == 0


def test_probabilities_that_round_to_0_and_processors_leave_the_number_open() -> None:
    recording = recorded()
    assert replay(recording, TREE).exact
    logs = recording.arrays["draft_logp_PM"].copy()
    logs[:, 3:] = -120.0
    peaked = changed(recording, draft_logp_PM=logs)
    assert not replay(peaked, TREE).exact
    assert replay(peaked, Fixed(2, (3, 2))).exact
    processed = Recording(recording.arrays, {**recording.meta, "processors": 1})
    assert not replay(processed, TREE).exact
    assert replay(processed, Fixed(3)).exact


READS: dict[str, Callable[[Any], Any]] = {
    "[]": lambda s: s["draft"],
    "get": lambda s: s.get("draft"),
    "dict": dict,
    "**": lambda s: {**s},
    "update": lambda s: {}.update(s),
    "copy": lambda s: s.copy(),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "list": list,
    "reversed": lambda s: list(reversed(s)),
    "keys": lambda s: s.keys(),
    "values": lambda s: sum(s.values()),
    "items": lambda s: s.items(),
    "or": lambda s: s | {},
    "ror": lambda s: {} | s,
    "equal": lambda s: s == {},
    "repr": repr,
    "json": json.dumps,
    "pop": lambda s: s.pop("draft"),
    "asdict": lambda s: asdict(_Facts(s)),
}


@dataclass
class _Facts:
    seconds: dict[str, float]


@pytest.mark.parametrize("way", READS)
def test_every_way_to_read_seconds_is_noticed(way: str) -> None:
    doubts = Doubts()
    seconds = Watched(dict.fromkeys(STAGES, 1.0), doubts)
    assert len(seconds) == len(STAGES)
    assert not doubts.clock
    READS[way](seconds)
    assert doubts.clock


@dataclass
class _Custom(PolicyRun):
    """Drafts by its own clock, by a copy of the seconds, or always alike."""

    way: str
    k: int = 2

    def plan(self) -> Plan:
        return Plan(1 + time.perf_counter_ns() % 3 if self.way == "clock" else self.k)

    def observe(self, facts: RoundFacts) -> None:
        if self.way == "copy":
            self.k = 3 if dict(facts.seconds)["draft"] > 1 else 2


@dataclass(frozen=True)
class Custom(Policy):
    way: str

    def start(self) -> PolicyRun:
        return _Custom(self.way)


class Derived(Fixed):
    def start(self) -> PolicyRun:
        return Constant(Plan(1 + time.perf_counter_ns() % 3))


@pytest.mark.parametrize("policy", [Custom("alike"), Custom("clock"), Custom("copy"), Derived(3)], ids=str)
def test_policies_of_ones_own_are_estimates_without_a_bound(policy: Policy) -> None:
    found = replay(recorded(), policy)
    assert not found.exact
    assert found.bound is None
    assert found.label == "estimated, no bound"
    assert "clock of its own" in found.reasons[-1]
    assert any("follows the clock" in reason for reason in found.reasons) == (policy == Custom("copy"))


def test_a_policy_of_ones_own_is_replayed_all_the_same() -> None:
    assert numbers(replay(recorded(), Custom("alike")).rounds) == measured(Fixed(2))


def test_policies_that_are_known() -> None:
    for name, make in tiny_drafters.POLICIES.items():
        if name in ("dynamic-tree", "adaptive-tree"):  # refused by replays
            continue
        policy = make()
        assert is_known(policy), name
        found = replay(recorded(), policy)
        assert found.exact == (name != "throughput"), found.reasons
        assert found.bound is not None
        if found.exact:
            assert numbers(found.rounds) == measured(policy), name


def test_rounds_of_a_replay_hold_plain_seconds() -> None:
    found = replay(recorded(), Throughput(limit=3))
    assert {type(r.seconds) for r in found.rounds} == {dict}
    assert replace(found.rounds[0]) == found.rounds[0]


def test_a_text_goes_on_from_the_one_before_as_in_a_decoder() -> None:
    found = replay(recorded(), Throughput(k=3, limit=3))
    first, *others = ([r.num_nodes for r in text[:3]] for text in found.texts)
    assert first[1] == 0  # measures what a plain round takes
    assert others
    assert all(0 not in nodes for nodes in others)
