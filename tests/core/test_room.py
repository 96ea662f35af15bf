"""How many nodes a round of a policy may have: known before the first, and what memory is counted for."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from test_policies import Facts
from tiny_drafters import POLICIES

import specdec
from specdec.errors import MemoryBudgetError
from specdec.goodput import Joined, Load
from specdec.policy import Fixed, Heuristic, Policy, Throughput
from specdec.runtime.backends.eager import EagerBackend
from specdec.tree_policy import AdaptiveTree

GROWING = ("adaptive-tree", "heuristic", "throughput")


def sizes(policy: Policy, rounds: int = 60) -> list[int]:
    """Nodes of the plans in a world where drafting is free and everything is accepted."""
    run, found = policy.start(), []
    for _ in range(rounds):
        plan = run.plan()
        found.append(max(plan.num_nodes, plan.deepest))
        seconds = {"draft": 1e-9, "verify": 1.0, "commit": 0.0, "other": 0.0}
        run.observe(Facts(plan.depth, plan.depth, plan.depth, plan.num_nodes, seconds, expected=float(plan.depth)))
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_no_round_has_more_nodes_than_the_policy_says(name: str) -> None:
    policy = POLICIES[name]()
    found = sizes(policy)
    assert max(found) == policy.most_nodes
    assert (found[0] < policy.most_nodes) == (name in GROWING), "a policy whose plans grow belongs into GROWING"


def test_asking_does_not_join_a_batch() -> None:
    load = Load()
    assert Joined(Throughput(limit=9), load).most_nodes == 9
    assert not load.runs


@pytest.mark.parametrize("growing", [Heuristic(1, limit=40), Throughput(k=1, limit=40)], ids=lambda policy: policy.name)
def test_memory_is_counted_for_the_longest_round(growing: Policy) -> None:
    """103 tokens and one drafted fit into a cache of 128, and with forty drafted they do not."""
    target: Any = tiny_models.tiny("gpt-neox")
    draft = tiny_models.noisy(target, 0.03)
    budget = 2 * EagerBackend.open(target).bytes_for(128)
    options = {"backend": "eager", "memory_budget": budget}
    small = specdec.SpeculativeDecoder(target, drafter=draft, policy=Fixed(1), **options)
    assert len(small.generate([3, 5, 7], max_new_tokens=100).tokens) == 100
    with pytest.raises(MemoryBudgetError, match="103 tokens"):
        specdec.SpeculativeDecoder(target, drafter=draft, policy=growing, **options).generate(
            [3, 5, 7], max_new_tokens=100
        )


def test_a_tree_that_grows_beyond_a_fixed_step_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    check = specdec.SpeculativeDecoder._check_backend

    def spying(self: Any, drafter: Any, policy: str, **wanted: Any) -> None:
        asked.append(wanted.get("nodes", 0))
        check(self, drafter, policy, **wanted)

    monkeypatch.setattr(specdec.SpeculativeDecoder, "_check_backend", spying)
    target: Any = tiny_models.tiny("gpt-neox")
    specdec.SpeculativeDecoder(target, drafter=target, policy=AdaptiveTree(budget=30, k=3), backend="eager")
    assert max(asked) == 30
