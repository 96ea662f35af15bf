"""The pool, the window's way through the tree against Jacobi iterations written out, budgets, and texts."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from specdec.drafters.lookahead import LookaheadDrafter, Pool, Trie

import specdec
from specdec.chance import GreedyChance
from specdec.drafter import Outcome, Request
from specdec.errors import InputError
from specdec.policy import Fixed, Plan
from specdec.proposal import Draw
from specdec.sampling import Sampling
from specdec.tree import TokenTree
from specdec.tree_policy import DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
VOCAB = tiny_models.VOCAB


def request() -> Request:
    return Request(tuple(PROMPT), Sampling(), Draw.POINT, VOCAB, 200)


def following(prefix: list[int]) -> int:
    """A made-up target that looks at its whole prefix."""
    return (sum((i + 1) * token for i, token in enumerate(prefix)) * 7 + len(prefix)) % VOCAB


def outcome_of(proposal, text: list[int]) -> Outcome:
    """What greedy verification by `following` makes of it."""
    tree = proposal.tree
    logits = torch.zeros(len(tree) + 1, VOCAB)
    for node in range(-1, len(tree)):
        logits[node + 1, following([*text, *tree.tokens[list(tree.path(node))].tolist()])] = 1
    path: list[int] = []
    tokens = [following(text)]
    while True:
        node = path[-1] if path else -1
        hit = [child for child in tree.children(node) if int(tree.tokens[child]) == tokens[-1]]
        if not hit:
            return Outcome(proposal, tuple(path), tuple(tokens), logits)
        path.append(hit[0])
        tokens.append(int(logits[hit[0] + 1].argmax()))


def test_the_pool_keeps_the_newest_of_each_token() -> None:
    pool = Pool(2)
    for ngram in ([1, 2, 3], [1, 4, 5], [2, 9, 9], [1, 2, 3], [1, 6, 7]):
        pool.add(ngram)
    assert pool.after(1) == [(6, 7), (2, 3)]
    assert pool.after(2) == [(9, 9)]
    assert pool.after(3) == []


def test_paths_that_begin_alike_share_nodes_within_the_budget() -> None:
    trie = Trie(depth=3, size=5)
    assert trie.add_path([1, 2, 3, 4]) == [0, 1, 2]
    assert trie.missing([1, 2, 9]) == 1
    assert trie.add_path([1, 5]) == [0, 3]
    assert trie.add_path([6, 7, 8]) == [4]
    assert trie.tree.parents == (-1, 0, 1, 0, -1)


@pytest.mark.parametrize(("window", "ngram"), [(4, 3), (3, 4), (1, 4), (5, 2)])
def test_the_window_is_the_papers(window: int, ngram: int) -> None:
    """Every column's last token gets what the target says behind the columns' first tokens and its own others."""
    drafter = LookaheadDrafter(window, ngram, guesses=2, from_text=False)
    state, text = drafter.start(request()), list(PROMPT)
    plan = Plan(window + ngram, budget=4 * window * ngram)
    for _ in range(12):
        proposal = drafter.propose(state, plan, GreedyChance())
        proposal.check(VOCAB)
        columns = [list(column) for column in state.columns]
        assert len(state.cells) == len(columns) == window
        assert columns[0][0] == text[-1]
        spine = [column[0] for column in columns[1:]]
        expected = [[*column[1:], following([*text, *spine[:j], *column[1:]])] for j, column in enumerate(columns)]
        outcome = outcome_of(proposal, text)
        state = drafter.observe(state, outcome)
        emitted = len(outcome.tokens)
        kept = expected[emitted - 1 :]
        assert state.columns[: len(kept)] == kept
        text += outcome.tokens


def test_the_pool_learns_only_what_the_target_said() -> None:
    drafter = LookaheadDrafter(window=1, ngram=3, guesses=4, from_text=False)
    state, text, seen = drafter.start(request()), list(PROMPT), []
    for _ in range(6):
        proposal = drafter.propose(state, Plan(4, budget=12), GreedyChance())
        seen += [tuple(column[1:]) for column in state.columns]
        outcome = outcome_of(proposal, text)
        state = drafter.observe(state, outcome)
        text += outcome.tokens
        assert all(len(rest) == 2 for token in range(VOCAB) for rest in state.pool.after(token))
        assert not any(rest == seen[0] for token in range(VOCAB) for rest in state.pool.after(token))


@pytest.mark.parametrize(
    "plan", [Plan(1), Plan(4), Plan(3, (3, 2)), Plan(2, budget=9), Plan(9, budget=30), Plan(4, shape=(-1, -1, 0, 1))]
)
def test_plans_are_kept(plan: Plan) -> None:
    drafter = LookaheadDrafter(window=6, ngram=4, guesses=5)
    state, text, largest = drafter.start(request()), list(PROMPT), 0
    for _ in range(15):
        proposal = drafter.propose(state, plan, GreedyChance())
        proposal.check(VOCAB)
        assert proposal.tree.max_depth <= plan.depth
        assert len(proposal.tree) <= plan.num_nodes
        assert plan.branching or plan.budget or plan.shape or proposal.tree.is_chain
        largest = max(largest, len(proposal.tree))
        outcome = outcome_of(proposal, text)
        state = drafter.observe(state, outcome)
        text += outcome.tokens
    assert largest >= min(plan.num_nodes, 4) - 1


def test_a_chain_goes_on_from_what_the_target_said_last() -> None:
    """Jacobi decoding: the answers behind a rejection are the next round's guess."""
    drafter = LookaheadDrafter(window=2, ngram=9, guesses=2, from_text=False)
    state, text = drafter.start(request()), list(PROMPT)
    outcome = outcome_of(drafter.propose(state, Plan(5), GreedyChance()), text)
    assert len(outcome.path) == 0
    state = drafter.observe(state, outcome)
    said = outcome.logits.argmax(-1).tolist()
    assert drafter.propose(state, Plan(5), GreedyChance()).tree.tokens.tolist()[:4] == said[1:5]


def test_the_longest_match_is_followed() -> None:
    drafter = LookaheadDrafter(ngram=4)
    pool = Pool(4)
    for ngram in ([1, 2, 3, 4], [8, 2, 3, 6], [2, 7, 7, 7]):
        pool.add(ngram)
    assert drafter._continuation(pool, [0, 1, 2]) == (3, 4)
    assert drafter._continuation(pool, [0, 8, 2, 3]) == (6,)
    assert drafter._continuation(pool, [9, 2]) == (7, 7, 7)
    assert drafter._continuation(pool, [9]) == ()


def test_a_repeating_text_is_drafted_by_the_window_alone() -> None:
    target = tiny_models.tiny("gpt-neox")
    drafter = LookaheadDrafter(window=5, ngram=4, guesses=5, from_text=False)
    decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=DynamicTree(40, 8))
    out = decoder.generate(PROMPT, max_new_tokens=120, strict=True)
    assert out.tokens == tiny_models.reference(target, PROMPT, 120)
    assert out.stats.num_rounds < 115


@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (4, 2)), StaticTree((-1, -1, 0, 0, 1)), DynamicTree(20, 5)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_do_not_change(temperature: float, policy) -> None:
    target = tiny_models.tiny("llama")
    decoder = specdec.SpeculativeDecoder(target, drafter=LookaheadDrafter(4, 4, 4), policy=policy)
    out = decoder.generate(PROMPT, max_new_tokens=40, temperature=temperature, seed=4, strict=True)
    assert out.tokens == tiny_models.reference(target, PROMPT, 40, temperature=temperature, seed=4)


@pytest.mark.parametrize("options", [{"window": 0}, {"ngram": 1}, {"guesses": 0}])
def test_sizes_are_checked(options: dict) -> None:
    with pytest.raises(InputError, match="window >= 1, ngram >= 2 and guesses >= 1"):
        LookaheadDrafter(**options)


def test_an_empty_tree_teaches_nothing() -> None:
    drafter = LookaheadDrafter()
    state = drafter.start(request())
    proposal = drafter.propose(state, Plan(0), GreedyChance())
    assert len(proposal.tree) == 0
    outcome = Outcome(proposal, (), (9,), torch.zeros(1, VOCAB))
    assert drafter.observe(state, outcome).text == [*PROMPT, 9]
    assert isinstance(proposal.tree, TokenTree)
