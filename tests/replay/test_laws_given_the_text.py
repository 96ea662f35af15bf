"""The laws of acceptance given the text, against enumeration of every outcome of the rules themselves."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch

from specdec.oracle.chance import enumerate_outcomes
from specdec.oracle.laws import ModelLaw
from specdec.oracle.toy import Toy
from specdec.policy import Plan
from specdec.proposal import Draw
from specdec.registry import create
from specdec.replay.recording import LAYOUT, Recording, Text
from specdec.replay.rules import Rule, chain, tree_of
from specdec.replay.view import Doubts, View
from specdec.tree import structure

VOCAB = 3
META = {
    "memory": "path", "draw": "shared", "draws": [draw.value for draw in Draw], "trees": True, "greedy": False,
    "drafter": "toy", "vocab_size": VOCAB, "max_new_tokens": 8, "sampling": {}, "num_inconsistent": 0,
}  # fmt: skip


def recording(toy: Toy, text: tuple[int, ...], top_m: int = VOCAB) -> Recording:
    """What `record` would write about this text of a toy, one position deep."""
    p = torch.stack([toy.p(text[:i]) for i in range(len(text))])
    q = torch.stack([toy.q(text[:i]) for i in range(len(text))])
    y = torch.tensor(text)[:, None]
    size = {"P": len(text), "K": 1, "M": top_m, "F": 4, "T": 1, "C": 4, "Q": 1}
    arrays = {name: np.zeros([size[letter] for letter in shape], kind) for name, (kind, shape) in LAYOUT.items()}
    arrays["tokens_P"][:] = text
    arrays["drafted_PK"][:, 0] = q.argmax(-1)
    arrays["text_p_P"][:] = p.gather(1, y)[:, 0]
    arrays["text_q_PK"][:] = q.gather(1, y)
    arrays["rank_PK"][:] = (q > q.gather(1, y)).sum(-1, keepdim=True)
    arrays["place_PK"][:] = arrays["rank_PK"]
    for who, rows in (("target", p), ("draft", q)):
        top = rows.topk(top_m)
        arrays[f"{who}_ids_PM"][:] = top.indices
        arrays[f"{who}_logp_PM"][:] = top.values.log()
        arrays[f"{who}_tail_P"][:] = 1 - top.values.sum(-1)
    arrays["texts_TC"][0] = (1, len(text), len(text), len(text))
    return Recording(arrays, META)


def view_of(found: Recording) -> View:
    return View(found, found.texts[0], Doubts())


def enumerated(rule: str, draw: Draw, plan: Plan, toy: Toy) -> dict[tuple[int, tuple[int, ...]], float]:
    """P(at least d tokens accepted, and the first d tokens of the text are these), by (d, tokens)."""
    propose, verifier = ModelLaw(draw, plan), create("verifier", rule)

    def program(chance):
        proposal = propose(toy, (), chance)
        verdict = verifier.verify(toy.target_rows((), proposal.tree), proposal, 1, chance)
        return tuple(proposal.tree.tokens[n].item() for n in proposal.tree.path(int(verdict.node)))

    found: dict[tuple[int, tuple[int, ...]], float] = defaultdict(float)
    for weight, tokens, _ in enumerate_outcomes(program):
        for depth in range(1, len(tokens) + 1):
            found[depth, tokens[:depth]] += weight
    return found


def probability(toy: Toy, text: tuple[int, ...]) -> float:
    return float(np.prod([float(toy.p(text[:i])[token]) for i, token in enumerate(text)]))


class Says(random.Random):
    """A draw that is known."""

    def __init__(self, value: float):
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value


@pytest.mark.parametrize("rule", ["ratio", "block", "recursive", "traversal", "greedy-multi"])
@pytest.mark.parametrize("seed", range(2))
def test_chains(rule: str, seed: int) -> None:
    toy, depth = Toy(seed, VOCAB), 3
    draw = Draw.MIXED if rule == "greedy-multi" else Draw.SAMPLED
    joint = enumerated(rule, draw, Plan(depth), toy)
    between = 0
    for text in product(range(VOCAB), repeat=depth):
        found = recording(toy, text)
        law = Rule(found, rule)
        for d in range(1, depth + 1):
            survival = joint[d, text[:d]] / probability(toy, text[:d])
            below, _ = law.accepted(view_of(found), 0, chain(depth), Says(max(0.0, survival - 1e-6)))
            assert below >= d or survival < 1e-6
            above, _ = law.accepted(view_of(found), 0, chain(depth), Says(survival + 1e-6))
            assert above < d or survival > 1 - 1e-6
            between += 1e-3 < survival < 1 - 1e-3
    assert between > 5  # some are neither sure nor impossible


def test_block_is_not_the_ratio_test() -> None:
    toy = Toy(0, VOCAB)
    by_ratio, by_block = (enumerated(rule, Draw.SAMPLED, Plan(3), toy) for rule in ("ratio", "block"))
    assert sum(by_block.values()) > sum(by_ratio.values()) + 1e-3


@pytest.mark.parametrize(("rule", "draw"), [("recursive", Draw.SAMPLED), ("greedy-multi", Draw.MIXED)])
@pytest.mark.parametrize("branching", [(2,), (3,), (2, 2)])
def test_trees(rule: str, draw: Draw, branching: tuple[int, ...]) -> None:
    toy = Toy(1, 4 if len(branching) == 1 else VOCAB, sparse=len(branching) > 1)
    plan = Plan(len(branching), branching)
    joint = enumerated(rule, draw, plan, toy)
    tree, repetitions = structure(tree_of(plan)), 2500
    for text in list(product(range(VOCAB), repeat=len(branching) + 1))[::3]:
        if probability(toy, text) == 0:
            continue
        found = recording(toy, text, toy.vocab_size)
        law, view, fate = Rule(found, rule), view_of(found), random.Random(7)
        got = [law.accepted(view, 0, tree, fate)[0] for _ in range(repetitions)]
        for d in range(1, len(branching) + 1):
            expected = joint[d, text[:d]] / probability(toy, text[:d])
            error = 4 * (max(expected * (1 - expected), 1e-6) / repetitions) ** 0.5
            assert np.mean([n >= d for n in got]) == pytest.approx(expected, abs=error + 1e-3)


def test_match_accepts_the_drafts_best_where_it_is_the_text() -> None:
    toy, depth = Toy(2, VOCAB), 2
    joint = enumerated("match", Draw.POINT, Plan(depth), toy)
    accepted = 0
    for text in product(range(VOCAB), repeat=depth):
        found = recording(toy, text)
        got, _ = Rule(found, "match").accepted(view_of(found), 0, chain(depth), random.Random(0))
        for d in range(1, depth + 1):
            assert joint[d, text[:d]] == pytest.approx(probability(toy, text[:d]) if got >= d else 0.0, abs=1e-12)
        accepted += got
    assert accepted


def test_fewer_entries_leave_more_open() -> None:
    toy, text = Toy(3, 4), (0, 1, 2, 1)
    tree = structure(tree_of(Plan(2, (2, 2))))
    tails = []
    for top_m in (4, 2, 1):
        found = recording(toy, text, top_m)
        view = view_of(found)
        Rule(found, "recursive").accepted(view, 0, tree, random.Random(1))
        tails.append(view.doubts.tails)
    assert tails[0] < 1e-6 < tails[1] <= tails[2]


def test_positions_beyond_the_text_are_unknown() -> None:
    found = recording(Toy(0, VOCAB), (0, 1))
    view = View(found, Text(0, 2, 2, 2, 1), Doubts(), "never")
    assert Rule(found, "coupled").accepted(view, 1, chain(3), random.Random(0))[0] <= 1
