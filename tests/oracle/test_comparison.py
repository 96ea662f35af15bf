"""The table of tree rules: against closed forms, and against what the rules are known for."""

from __future__ import annotations

import pytest

from specdec import registry
from specdec.oracle import LAWS, Cell, compare_trees, measure
from specdec.oracle.comparison import _law, _simulated
from specdec.policy import Plan
from specdec.proposal import Draw

VERIFIERS = {name: registry.create("verifier", name) for name in registry.available("verifier")}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, Cell]]:
    return compare_trees(VERIFIERS, pairs=2, repetitions=400)


def test_every_rule_stands_beside_the_others(table: dict[str, dict[str, Cell]]) -> None:
    for row in table.values():
        assert set(row) == {"recursive", "traversal", "greedy-multi", "match", "coupled"}
        assert row["traversal"].tokens >= row["recursive"].tokens - 1e-12
        assert row["recursive"].tokens > row["match"].tokens
        assert row["coupled"].error > 0
        assert row["coupled"].tokens > row["match"].tokens
    assert table["3 siblings"]["greedy-multi"].tokens > table["3 siblings"]["recursive"].tokens
    assert table["chain of 2"]["greedy-multi"].tokens == pytest.approx(table["chain of 2"]["recursive"].tokens)


@pytest.mark.parametrize("number", range(4))
def test_greedy_multi_attains_its_bound(number: int) -> None:
    """One round of three siblings accepts the top two's p, and of the rest what p and q share."""
    law = next(law for law in LAWS if law.name == "mixed siblings (3)")
    toy = law.toy(number)
    p, q = toy.p(()), toy.q(())
    top = q.topk(2).indices
    rest = q.clone()
    rest[top] = 0
    rest = rest / rest.sum()
    others = p.clone()
    others[top] = 0
    accepted = float(p[top].sum() + others.minimum(rest).sum())
    found = measure(VERIFIERS["greedy-multi"], law, toy).expected_tokens
    assert found == pytest.approx(1 + accepted, abs=1e-12)


def test_simulated_acceptance_is_that_of_the_closed_form() -> None:
    """Two races on one noise have the same winner x with probability 1 / sum over y of max(p_y / p_x, q_y / q_x)."""
    law = _law("one token", Draw.SHARED, Plan(1), 4, False)
    toy = law.toy(0)
    p, q = toy.p(()), toy.q(())
    same = sum(1 / float((p / p[x]).maximum(q / q[x]).sum()) for x in range(4))
    tokens, variance = _simulated(VERIFIERS["coupled"], law, 0, 1500)
    assert abs(tokens - 1 - same) < 4 * variance**0.5
