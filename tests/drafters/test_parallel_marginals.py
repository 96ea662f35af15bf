"""From rows per position to chains and trees: the same as level by level, the best tree there is, and exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from specdec import registry
from specdec.chance import Chance, CounterChance, GreedyChance
from specdec.drafter import Request
from specdec.growth import grow
from specdec.history import History
from specdec.marginals import best_first, grow_marginals
from specdec.oracle import Law, Toy, applicable, certify
from specdec.oracle.toy import ROOT
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.session import run
from specdec.sampling import Sampling
from specdec.tree import TokenTree

VOCAB, DEPTH = 11, 4
PREFIX = [1, 2, 3, 1, 2]


def request(draw: Draw, **sampling: object) -> Request:
    return Request(tuple(PREFIX), Sampling(**sampling), draw, VOCAB, 1 << 20)


def rows(seed: int = 0, columns: int = VOCAB, scale: float = 1.5) -> torch.Tensor:
    return scale * torch.randn(DEPTH, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_levels(logits: torch.Tensor, plan: Plan, asked: Request, chance: Chance, ids: torch.Tensor | None) -> Proposal:
    def expand(ran: TokenTree):
        yield from ()
        depth = ran.max_depth
        return logits[depth].expand(sum(d == depth for d in ran.depths) if depth else 1, -1)

    return run(grow(expand, plan, asked, PREFIX, chance, ids)).proposal


def same(a: Proposal, b: Proposal) -> None:
    assert (a.tree.tokens.tolist(), a.tree.parents, a.draws) == (b.tree.tokens.tolist(), b.tree.parents, b.draws)
    for node, draw in enumerate(a.draws):
        if draw is Draw.SAMPLED:
            torch.testing.assert_close(a.distribution(node, VOCAB), b.distribution(node, VOCAB), rtol=1e-12, atol=1e-15)


PLANS = [Plan(4), Plan(2), Plan(4, stop_below=0.3), Plan(3, (3, 2)), Plan(3, shape=(-1, -1, 0, 1, 1, 2))]


@pytest.mark.parametrize("ids", [None, torch.tensor([10, 0, 4, 7, 2])])
@pytest.mark.parametrize("draw", list(Draw))
@pytest.mark.parametrize("plan", PLANS)
def test_it_is_what_growing_by_levels_gives(plan: Plan, draw: Draw, ids: torch.Tensor | None) -> None:
    logits = rows(1, VOCAB if ids is None else len(ids))
    for options in ({}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 4, "top_p": 0.8}):
        for more in ({}, {"repetition_penalty": 1.4}, {"processors": (NoRepeatNGramLogitsProcessor(2),)}):
            asked = request(draw, **options, **more)
            fates = [GreedyChance() if asked.sampling.is_greedy else CounterChance(5, "draft") for _ in range(2)]
            same(
                grow_marginals(logits, plan, asked, History(PREFIX), fates[0], ids),
                by_levels(logits, plan, asked, fates[1], ids),
            )


def test_a_weak_token_is_kept_and_ends_the_chain() -> None:
    logits = torch.full((DEPTH, VOCAB), -20.0)
    logits[torch.arange(DEPTH), torch.arange(DEPTH)] = torch.tensor([5.0, 5.0, -19.5, 5.0])
    chain = grow_marginals(logits, Plan(4, stop_below=0.5), request(Draw.POINT), PREFIX, GreedyChance())
    assert chain.tree.tokens.tolist() == [0, 1, 2]


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 30])
@pytest.mark.parametrize("seed", range(4))
def test_no_tree_of_that_many_nodes_is_more_probable(seed: int, budget: int) -> None:
    """Against all paths, listed: the best tree is the most probable nodes, for a path beats its extensions."""
    logits = rows(seed, 5)
    proposal = grow_marginals(logits, Plan(DEPTH, budget=budget, width=2), _narrow(Draw.POINT), PREFIX, GreedyChance())
    q = logits.softmax(-1)
    paths = [path for depth in range(1, DEPTH + 1) for path in itertools.product(range(5), repeat=depth)]
    chances = {path: float(torch.prod(q[range(len(path)), list(path)])) for path in paths}
    tokens = proposal.tree.tokens.tolist()
    mine = [tuple(tokens[n] for n in proposal.tree.path(node)) for node in range(len(tokens))]
    assert len(set(mine)) == len(mine) == min(budget, len(paths))
    best = sorted(chances.values(), reverse=True)[: len(mine)]
    assert [chances[path] for path in mine] == pytest.approx(best, rel=1e-9)
    proposal.check(5)


def _narrow(draw: Draw, **sampling: object) -> Request:
    return Request(tuple(PREFIX), Sampling(**sampling), draw, 5, 1 << 20)


def test_paths_without_probability_are_no_nodes() -> None:
    inf = float("-inf")
    places, parents = best_first([[0.0, inf, inf], [-0.5, -1.0, inf]], 50)
    assert (places, parents) == ([(0, 0), (1, 0), (1, 1)], [-1, 0, 0])


def test_under_shared_noise_children_come_in_the_order_of_the_race() -> None:
    chance = CounterChance(7)
    asked = _narrow(Draw.SHARED, temperature=1.0)
    proposal = grow_marginals(rows(3, 5), Plan(DEPTH, budget=12), asked, PREFIX, chance)
    assert set(proposal.draws) == {Draw.SHARED}
    q = rows(3, 5).softmax(-1)
    for node in range(-1, len(proposal.tree)):
        children = proposal.tree.tokens[list(proposal.tree.children(node))].tolist()
        depth = proposal.tree.depths[node] if node >= 0 else 0
        if children:
            race = chance.race(q[depth][None], [len(PREFIX) + depth], 5)[0].tolist()
            assert children == race[: len(children)]


def test_a_budget_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counting(self, *args, original=original, name=name):
            counted.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counting)
    grow_marginals(rows(), Plan(DEPTH, budget=9), request(Draw.POINT), PREFIX, GreedyChance())
    assert counted == ["tolist"]
    counted.clear()
    grow_marginals(rows(), Plan(DEPTH), request(Draw.SAMPLED, temperature=1.0), PREFIX, CounterChance(1))
    assert counted == []


# ---------------------------------------------------------------- exactness, by enumeration


def law(name: str, draw: Draw, plan: Plan, thin: bool = False) -> Law:
    def propose(toy: Toy, context: tuple[int, ...], chance: Chance) -> Proposal:
        q = torch.stack([toy.q((*context, *[0] * depth)) for depth in range(plan.depth)])
        asked = Request((ROOT,), Sampling(temperature=1.0), draw, toy.vocab_size, 1 << 20)
        return grow_marginals(q.log(), plan, asked, [ROOT, *context], chance)

    kinds = {Draw.SAMPLED, Draw.POINT} if draw is Draw.MIXED else {draw}
    trees = plan.budget > 0 or plan.num_nodes > plan.depth
    return Law(name, propose, frozenset(kinds), 3, plan.depth, trees, thin=thin)


LAWS = [
    law("product chain", Draw.SAMPLED, Plan(3)),
    law("product chain, stop-after", Draw.SAMPLED, Plan(3, stop_below=0.4)),
    law("product tree", Draw.SAMPLED, Plan(2, (2, 1))),
    law("mixed product tree", Draw.MIXED, Plan(2, (2, 1))),
    law("top-1 chain", Draw.POINT, Plan(3)),
    law("most probable tree", Draw.POINT, Plan(3, budget=5)),
    law("shared chain", Draw.SHARED, Plan(3)),
    law("shared most probable tree", Draw.SHARED, Plan(2, budget=3), thin=True),
]
EXACT = [name for name in registry.available("verifier") if registry.create("verifier", name).lossless]
CASES = [(name, one) for name in EXACT for one in applicable(registry.create("verifier", name), LAWS)]


@pytest.mark.parametrize(("verifier", "one"), CASES, ids=[f"{name}-{one.name}" for name, one in CASES])
def test_the_emitted_law_is_the_targets(verifier: str, one: Law) -> None:
    result = certify(registry.create("verifier", verifier), one, pairs=2)
    assert result.passed, result.error


def test_every_law_met_a_rule() -> None:
    assert {one.name for _, one in CASES} == {one.name for one in LAWS}


def test_the_oracle_sees_a_row_that_is_not_the_one_drawn_from() -> None:
    """Negative control: positions' rows in the wrong order."""

    def swapped(toy: Toy, context: tuple[int, ...], chance: Chance) -> Proposal:
        honest = LAWS[0].propose(toy, context, chance)
        assert honest.q is not None
        return Proposal.sampled(honest.tree, honest.q.flip(0).clamp_min(1e-3))

    broken = Law("rows in the wrong order", swapped, frozenset({Draw.SAMPLED}), 3, 3)
    assert not certify(registry.create("verifier", "ratio"), broken, pairs=2).passed
