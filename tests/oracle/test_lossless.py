"""Every shipped rule, on every drafting law that it takes, emits exactly the target's distribution."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from specdec import registry
from specdec.chance import GreedyChance
from specdec.oracle import LAWS, TOLERANCE, Law, Toy, applicable, certify, enumerate_outcomes, measure
from specdec.verifier import Verifier

VERIFIERS = {name: registry.create("verifier", name) for name in registry.available("verifier")}
EXACT = {name: verifier for name, verifier in VERIFIERS.items() if verifier.lossless}
LAW = {law.name: law for law in LAWS}
CHAINS = [law for law in LAWS if law.draws and not law.trees and not law.shares_noise]
pairs = pytest.mark.parametrize("number", range(6))


def _ids(cases: list[tuple[str, Law]]) -> list[str]:
    return [f"{name}-{law.name}" for name, law in cases]


EVERY_PAIR = [(name, law) for name, verifier in EXACT.items() for law in applicable(verifier)]


@pytest.mark.parametrize(("name", "law"), EVERY_PAIR, ids=_ids(EVERY_PAIR))
def test_exact(name: str, law: Law) -> None:
    result = certify(EXACT[name], law, pairs=2)
    assert result.passed, result.error
    assert result.tv_max is not None
    assert result.tv_max <= TOLERANCE


def test_every_rule_meets_every_kind_of_drafting_it_takes() -> None:
    """A law that is lost from the list, or a rule that quietly takes nothing, would make `test_exact` pass."""
    taken = {name: {law.name for law in applicable(verifier)} for name, verifier in VERIFIERS.items()}
    assert taken["coupled"] == taken["match"] == taken["typical"] == set(LAW)
    assert (
        taken["recursive"]
        == taken["traversal"]
        == taken["greedy-multi"]
        == {law.name for law in LAWS if not law.shares_noise}
    )
    assert taken["ratio"] == taken["block"] == {"no draft", *(law.name for law in CHAINS)}
    assert taken["greedy"] == {"no draft", *(name for name, law in LAW.items() if law.greedy)}


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "typical"])
def test_exact_at_temperature_zero_whatever_was_drafted(name: str) -> None:
    """p one-hot, drafts from a softmax: enumerated, and with the chance that decoding uses at temperature 0."""
    verifier = VERIFIERS[name]
    for law in LAWS:
        if not law.draws <= set(verifier.draws) or (law.trees and not verifier.trees) or law.rounds > 1:
            continue
        greedy = replace(law, greedy=True, thin=True)
        assert measure(verifier, greedy, greedy.toy(5)).tv <= TOLERANCE
        _emits_the_greedy_text(verifier, greedy, greedy.toy(6))


def _emits_the_greedy_text(verifier: Verifier, law: Law, toy: Toy) -> None:
    for _, proposal, _ in enumerate_outcomes(lambda chance: law.propose(toy, (), chance)):
        verdict = verifier.verify(toy.target_rows((), proposal.tree), proposal, 1, GreedyChance())
        emitted = [int(proposal.tree.tokens[n]) for n in proposal.tree.path(int(verdict.node))] + [int(verdict.token)]
        text: tuple[int, ...] = ()
        for token in emitted:
            assert token == int(toy.p(text).argmax())
            text = (*text, token)
        matched = {proposal.tree.tokens[child].item() for child in proposal.tree.children(int(verdict.node))}
        assert emitted[-1] not in matched, "a drafted token that the target would choose was refused"


def _per_prefix(toy: Toy, depth: int, accepted) -> float:
    """1 + sum over drafted prefixes of the probability that all of the prefix is drafted and accepted."""
    total, prefixes = 1.0, {(): 1.0}
    for _ in range(depth):
        longer = {}
        for text, weight in prefixes.items():
            p, q = toy.p(text), toy.q(text)
            for token in range(toy.vocab_size):
                longer[(*text, token)] = weight * accepted(float(p[token]), float(q[token]), token == int(q.argmax()))
        prefixes = longer
        total += sum(prefixes.values())
    return total


@pairs
@pytest.mark.parametrize(
    ("name", "law", "accepted"),
    [
        ("ratio", "sampled chain", lambda p, q, best: min(p, q)),
        ("match", "sampled chain", lambda p, q, best: p * q),
        ("coupled", "sampled chain", lambda p, q, best: p * q),
        ("ratio", "top-1 chain", lambda p, q, best: p * best),
        ("block", "top-1 chain", lambda p, q, best: p * best),
        ("match", "top-1 chain", lambda p, q, best: p * best),
    ],
)
def test_expected_tokens_match_the_closed_form(name: str, law: str, accepted, number: int) -> None:
    toy = LAW[law].toy(number)
    expected = _per_prefix(toy, LAW[law].depth, accepted)
    assert math.isclose(measure(EXACT[name], LAW[law], toy).expected_tokens, expected, abs_tol=1e-12)


def _expected(name: str, law: Law, number: int) -> float:
    return measure(EXACT[name], law, law.toy(number)).expected_tokens


@pairs
def test_block_never_accepts_less_than_ratio(number: int) -> None:
    for law in CHAINS:
        assert _expected("block", law, number) >= _expected("ratio", law, number) - 1e-12


def test_block_accepts_more_than_ratio_on_sampled_chains() -> None:
    law = LAW["sampled chain"]
    assert sum(_expected("block", law, n) - _expected("ratio", law, n) for n in range(6)) / 6 > 0.02


@pairs
def test_tree_rules_reduce_to_chain_rules(number: int) -> None:
    for law in CHAINS:
        assert math.isclose(_expected("traversal", law, number), _expected("block", law, number), abs_tol=1e-12)
        assert math.isclose(_expected("recursive", law, number), _expected("ratio", law, number), abs_tol=1e-12)


def test_traversal_accepts_more_than_recursive_on_trees() -> None:
    law = LAW["sampled tree (2,1)"]
    assert sum(_expected("traversal", law, n) - _expected("recursive", law, n) for n in range(6)) / 6 > 0.01


@pairs
def test_testing_the_sampled_sibling_first_accepts_more(number: int) -> None:
    first, last = LAW["mixed tree (2,1)"], LAW["mixed siblings, best first"]
    assert _expected("recursive", first, number) >= _expected("recursive", last, number) - 1e-12
    assert _expected("recursive", first, 0) > _expected("recursive", last, 0) + 1e-3


@pairs
def test_top_k_trees_are_accepted_alike_by_every_rule(number: int) -> None:
    """For deterministic children there is nothing left to choose: the target's token is among them or it is not."""
    law = LAW["top-k tree (2,2)"]
    tokens = [_expected(name, law, number) for name in ("coupled", "match", "recursive", "traversal")]
    assert max(tokens) - min(tokens) <= 1e-12
