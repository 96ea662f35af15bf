"""Trees, traces, sampling and noise, one at a time; and the loop's length."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
import textwrap

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor

import specdec
from specdec import chance as chance_module
from specdec import decoder as decoder_module
from specdec.chance import CounterChance, GreedyChance, exponentials, uniforms
from specdec.drafter import Outcome
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.proposal import Draw, Proposal
from specdec.sampling import Sampling
from specdec.trace import Round, Trace, summarize
from specdec.tree import TokenTree
from specdec.verifier import walk

parent_lists = st.integers(0, 9).flatmap(
    lambda n: st.tuples(*(st.integers(-1, node - 1) for node in range(n))).map(tuple)
)
QUICK = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# The loop


def test_the_loop_has_at_most_sixty_lines_and_no_method_names() -> None:
    source = textwrap.dedent(inspect.getsource(decoder_module.decode))
    assert len(source.splitlines()) <= 60
    names = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    parts = [name for kind in specdec.registry.GROUPS if kind != "trainer" for name in specdec.registry.available(kind)]
    assert not names & set(parts), "the loop asks for a plugin by name"


# Trees


@QUICK
@given(parents=parent_lists)
def test_what_follows_from_parents(parents: tuple[int, ...]) -> None:
    tree = TokenTree.of(range(len(parents)), parents)
    tree.check(100)
    for node in range(-1, len(tree)):
        path = tree.path(node)
        assert [parents[n] for n in path] == [-1, *path[:-1]][: len(path)]
        assert tree.children(node) == tuple(n for n, parent in enumerate(parents) if parent == node)
        if node >= 0:
            assert tree.depths[node] == len(path)
            assert tree.ancestors_NN[node].nonzero()[:, 0].tolist() == list(path)
    assert tree.max_depth == max((len(tree.path(node)) for node in range(len(tree))), default=0)
    assert tree.is_chain == all(parent == node - 1 for node, parent in enumerate(parents))
    grown = tree.extend(torch.tensor([50]), [len(tree) - 1])
    assert (len(grown), grown.parents[-1], int(grown.tokens[-1])) == (len(tree) + 1, len(tree) - 1, 50)


@QUICK
@given(parents=parent_lists, data=st.data())
def test_the_walk_follows_the_targets_choice(parents: tuple[int, ...], data: st.DataObject) -> None:
    used: dict[int, int] = {}
    tokens = []
    for parent in parents:  # siblings differ
        tokens.append(used.get(parent, 0))
        used[parent] = tokens[-1] + 1
    tree = TokenTree.of(tokens, parents)
    y = data.draw(st.lists(st.integers(0, 3), min_size=len(tree) + 1, max_size=len(tree) + 1))
    node = -1
    while True:
        child = [n for n in tree.children(node) if tokens[n] == y[node + 1]]
        if not child:
            break
        node = child[0]
    verdict = walk(tree, torch.tensor(y))
    assert (int(verdict.node), int(verdict.token)) == (node, y[node + 1])


def test_malformed_trees_say_why() -> None:
    for tree, message in (
        (TokenTree.of([1, 2], [0, -1]), "node 0 has parent 0: parents come before"),
        (TokenTree.of([1], [-2]), "node 0 has parent -2"),
        (TokenTree(torch.tensor([1.0]), (-1,)), "int64"),
        (TokenTree.of([9], [-1]), "outside the target's vocabulary of 9"),
        (TokenTree.of([1, 1], [-1, -1]), "two siblings"),
    ):
        with pytest.raises(InputError, match=message):
            tree.check(9)


# Traces


def outcome(parents: tuple[int, ...], path: tuple[int, ...], emitted: int | None = None) -> Outcome:
    tree = TokenTree.of(range(len(parents)), parents)
    tokens = tuple(range(len(path) + 1 if emitted is None else emitted))
    return Outcome(Proposal.point(tree), path, tokens, torch.zeros(0))


def test_statistics_of_a_trace_made_by_hand() -> None:
    trace = Trace()
    chain = (-1, 0, 1, 2)
    for result in (
        outcome(chain, (0, 1, 2, 3)),  # everything accepted: four depths decided
        outcome(chain, (0,)),  # one, then a rejection: two decided
        outcome(chain, ()),  # none: one decided
        outcome((), ()),  # nothing drafted
        outcome((-1, -1, 0, 1), (1, 3)),  # a tree of depth two, second branch
    ):
        with trace.round() as record:
            record.take("model", result)
        record.seconds.update(draft=1.0, verify=2.0, commit=0.25, other=0.75)
    trace.num_tokens = 12
    trace.prefill_seconds = 4.0
    stats = trace.stats
    assert [r.num_evaluated for r in trace.rounds] == [4, 2, 1, 0, 2]
    assert [r.num_emitted for r in trace.rounds] == [5, 2, 1, 1, 3]
    assert (stats.num_tokens, stats.num_rounds) == (12, 5)
    assert (stats.num_draft_tokens, stats.num_accepted_draft_tokens) == (16, 7)
    assert stats.mean_acceptance_length == 1 + 7 / 5
    assert stats.draft_acceptance_rate == 7 / 16
    assert stats.acceptance_histogram == {0: 2, 1: 1, 2: 1, 4: 1}
    assert stats.joint_acceptance == [3 / 5, 2 / 5, 1 / 5, 1 / 5]
    assert stats.conditional_acceptance == [3 / 4, 2 / 3, 1.0, 1.0]
    assert stats.seconds == {"prefill": 4.0, "draft": 5.0, "verify": 10.0, "commit": 1.25, "other": 3.75}
    assert stats.total_seconds == 24.0
    assert stats.tokens_per_second == 12 / 20
    assert stats.as_dict()["joint_acceptance"] == stats.joint_acceptance
    assert "12 tokens in 5 rounds" in str(stats)


def test_statistics_of_nothing() -> None:
    stats = summarize([], 0)
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate, stats.tokens_per_second) == (1.0, 0.0, 0.0)
    assert stats.acceptance_histogram == {}


def test_pooled_statistics_weigh_rounds_not_texts() -> None:
    few, many = [Round(num_nodes=4, num_accepted=4, num_evaluated=4)], [Round(num_nodes=4, num_evaluated=1)] * 3
    stats = summarize(few + many, 8)
    assert stats.draft_acceptance_rate == 4 / 16
    assert stats.conditional_acceptance == [1 / 4, 1.0, 1.0, 1.0]


def test_stages_add_up_to_the_rounds() -> None:
    target = tiny_models.tiny()
    out = specdec.SpeculativeDecoder(target, drafter=target, policy=Fixed(3)).generate([1, 2], max_new_tokens=9)
    assert set(out.stats.seconds) == {"prefill", "draft", "verify", "commit", "other"}
    assert all(value >= 0 for value in out.stats.seconds.values())
    assert all(min(r.seconds["draft"], r.seconds["verify"], r.seconds["commit"]) > 0 for r in out.trace.rounds)
    assert out.stats.num_draft_tokens == sum(r.num_nodes for r in out.trace.rounds)


# Noise


def splitmix(seed: int, count: int) -> list[int]:
    """The reference generator, in Python integers."""
    mask, state, out = (1 << 64) - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_uniforms_are_splitmix64() -> None:
    assert splitmix(1234567, 2)[0] == 6457827717110365317  # the published first value for this seed
    for key in (0, 1, 1234567, (1 << 64) - 1, 1 << 63):
        expected = [((x >> 11) + 0.5) * 2.0**-53 for x in splitmix(key, 50)]
        assert uniforms([key], 50)[0].tolist() == expected


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    one, two = CounterChance(5, "draft"), CounterChance(5, "verify")
    two.draw(torch.ones(3, 8))
    two.accept(torch.ones(3), torch.ones(3))
    for position in (0, 7, 8, 500, 3):  # far away and back again
        assert torch.equal(one.noise(position, 32), two.noise(position, 32))
        assert torch.equal(one.noise(position, 32), one.noise(position, 40)[:32])
        assert not torch.equal(one.noise(position, 32), one.noise(position + 1, 32))
        assert not torch.equal(one.noise(position, 32), CounterChance(6).noise(position, 32))
    weights = torch.rand(4, 32, generator=torch.Generator().manual_seed(0))
    batched = one.race(weights, [3, 9, 9, 700])
    single = [two.race(weights[i : i + 1], [n]) for i, n in enumerate((3, 9, 9, 700))]
    assert torch.equal(batched, torch.cat(single))


def test_draws_and_races_follow_their_weights() -> None:
    weights = torch.tensor([0.5, 0.3, 0.0, 0.2], dtype=torch.float64)
    chance, runs = CounterChance(1), 20_000
    drawn = torch.bincount(chance.draw(weights.expand(runs, 4)), minlength=4) / runs
    assert float((drawn - weights).abs().max()) < 0.015
    raced = chance.race(weights.expand(4000, 4), range(4000), k=4)
    assert float((torch.bincount(raced[:, 0], minlength=4) / 4000 - weights).abs().max()) < 0.03
    assert bool((raced[:, 3] == -1).all())  # weight 0 never arrives
    assert all(sorted(row[:3]) == [0, 1, 3] for row in raced.tolist())
    p, q = torch.tensor([0.2, 0.5, 0.0, 0.3]).expand(runs, 4), torch.tensor([0.4, 0.25, 0.3, 0.0]).expand(runs, 4)
    rate = chance.accept(p, q).double().mean(0)
    assert float((rate - torch.tensor([0.5, 1.0, 0.0, 1.0])).abs().max()) < 0.015
    assert float((exponentials([1], runs).mean() - 1).abs()) < 0.03


def test_streams_do_not_meet() -> None:
    draft, verify = CounterChance(3, "draft"), CounterChance(3, "verify")
    a, b = draft.draw(torch.ones(64, 1000)), verify.draw(torch.ones(64, 1000))
    assert int((a == b).sum()) < 5
    assert int((a == draft.draw(torch.ones(64, 1000))).sum()) < 5  # nor do two draws of one stream
    assert torch.equal(CounterChance(3, "draft").draw(torch.ones(64, 1000)), a)


def test_streams_of_one_chance_make_their_common_noise_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(chance_module, "exponentials", lambda *args: made.append(1) or exponentials(*args))
    verify = CounterChance(3, "verify")
    draft = verify.stream("draft")
    weights = torch.rand(2, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(verify.race(weights, [4, 5], 3), draft.race(weights, [4, 5], 3))
    assert made == [1]
    assert torch.equal(draft.race(weights, [4, 5], 3), CounterChance(3, "draft").race(weights, [4, 5], 3))
    ones = torch.ones(64, 1000)
    assert torch.equal(draft.draw(ones), CounterChance(3, "draft").draw(ones))
    assert not torch.equal(verify.draw(ones), CounterChance(3, "draft").draw(ones))
    greedy = GreedyChance()
    assert greedy.stream("draft") is greedy


def test_greedy_chance_decides_by_weight() -> None:
    chance, rows = GreedyChance(), torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert chance.draw(rows).tolist() == [1, 0]
    assert chance.race(rows, [0, 1]).tolist() == [[1], [0]]
    assert chance.race(rows, [0, 1], 2).tolist() == [[1, -1], [0, -1]]
    assert chance.accept(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])).tolist() == [True, False]


# Sampling


def test_each_node_is_processed_with_its_own_prefix() -> None:
    sampling = Sampling(1.5, top_k=12, repetition_penalty=2.0, processors=(NoRepeatNGramLogitsProcessor(2),))
    tree = TokenTree.of([4, 5, 4, 5, 6], [-1, -1, 0, 1, 2])
    prefix = [4, 4, 5, 6]
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = sampling.probabilities(logits, prefix, tree)
    for node in range(-1, len(tree)):
        path = [*prefix, *tree.tokens[list(tree.path(node))].tolist()]
        alone = sampling.probabilities(logits[node + 1][None], path, TokenTree.empty())[0]
        torch.testing.assert_close(together[node + 1], alone)
        assert int((alone > 0).sum()) <= 12
    torch.testing.assert_close(together.sum(-1), torch.ones(6, dtype=torch.float64))
    blind = torch.cat([sampling.probabilities(row[None], prefix, TokenTree.empty()) for row in logits])
    assert int((together - blind).abs().amax(-1).gt(1e-3).sum()) >= 3  # the paths matter


def test_temperature_zero_is_one_hot_and_half_precision_is_widened() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.bfloat16)
    assert Sampling().probabilities(logits, [0], TokenTree.empty()).tolist() == [[0.0, 1.0, 0.0]]
    assert Sampling(1.0).probabilities(logits, [0], TokenTree.empty()).dtype is torch.float32
    assert Sampling(1e-9).is_greedy
    # Filters that would leave more than one token do not matter at temperature 0.
    assert Sampling(0.0, top_k=2, top_p=0.5).probabilities(logits, [0], TokenTree.empty()).tolist() == [[0.0, 1.0, 0.0]]
    assert Sampling(seed=np.int64(3).item()).seed == 3


def test_descriptions_can_be_copied() -> None:
    sampling = Sampling(0.7, top_k=5)
    assert copy.deepcopy(sampling) == sampling == pickle.loads(pickle.dumps(sampling))
    assert copy.deepcopy(Fixed(3, (2, 2))) == Fixed(3, (2, 2))


# Proposals


def test_proposals_carry_what_was_drawn() -> None:
    q = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    chain = Proposal.sampled(TokenTree.chain([0, 2]), q)
    chain.check(3)
    assert chain.distribution(1, 3).tolist() == q[1].tolist()
    torch.testing.assert_close(chain.chain_distributions(torch.zeros(3, 3)), q)
    mixed = Proposal(TokenTree.chain([0, 2]), (Draw.POINT, Draw.SAMPLED), q, (-1, 1))
    mixed.check(3)
    torch.testing.assert_close(
        mixed.chain_distributions(torch.zeros(3, 3)), torch.tensor([[1.0, 0, 0], [0.1, 0.2, 0.7]])
    )
    assert Proposal.empty().chain_distributions(torch.zeros(1, 3)).shape == (0, 3)
    for bad, message in (
        (Proposal.sampled(TokenTree.chain([2]), q[:1]), "gives a drafted token probability 0"),
        (Proposal.sampled(TokenTree.chain([0]), q[:1] * 2), "no distribution"),
        (Proposal.sampled(TokenTree.chain([0]), q[:1] * torch.nan), "no distribution"),
        (Proposal.sampled(TokenTree.chain([0]), q[:1], [1]), "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            bad.check(3)
