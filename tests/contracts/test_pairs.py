"""Which parts fit together, padded vocabularies, and whether a draft was drawn from the distribution it carries."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter, NgramDrafter
from specdec.verifiers import Ratio

import specdec
from specdec.chance import CounterChance
from specdec.drafter import Drafter, Request
from specdec.errors import DrafterWarning, IncompatiblePairError, InputError
from specdec.policy import Fixed, Plan
from specdec.proposal import Draw, Proposal
from specdec.sampling import Sampling

PROMPT = [3, 5, 7, 11]


class OnlyShared(NgramDrafter):
    draws: ClassVar[frozenset[Draw]] = frozenset({Draw.SHARED})


class OnlySampledRule(Ratio):
    draws = (Draw.SAMPLED,)


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return tiny_models.tiny("gpt-neox")


@pytest.mark.parametrize("verifier", ["ratio", "block", "recursive", "traversal"])
def test_a_pair_without_a_common_way_to_draw_names_the_verifiers_that_fit(target: Any, verifier: str) -> None:
    message = rf"{verifier} verifier cannot take draws \['shared'\].*these can: coupled, greedy, match$"
    with pytest.raises(IncompatiblePairError, match=message):
        specdec.SpeculativeDecoder(target, drafter=OnlyShared(), verifier=verifier)
    decoder = specdec.SpeculativeDecoder(target, drafter=OnlyShared())
    with pytest.raises(IncompatiblePairError, match="these can: coupled"):
        decoder.generate(PROMPT, verifier=specdec.registry.create("verifier", verifier))


@pytest.mark.parametrize("verifier", ["ratio", "block"])
def test_trees_for_a_chain_rule_name_the_verifiers_for_trees(target: Any, verifier: str) -> None:
    with pytest.raises(
        IncompatiblePairError, match=r"cannot take trees.*coupled, greedy, greedy-multi, match, recursive, traversal"
    ):
        specdec.SpeculativeDecoder(target, drafter=target, verifier=verifier, policy=Fixed(3, (2, 2)))


def test_trees_from_a_chain_drafter_are_refused(target: Any) -> None:
    with pytest.raises(IncompatiblePairError, match="ngram drafter proposes chains"):
        specdec.SpeculativeDecoder(target, drafter="ngram", policy=Fixed(3, (2, 2)))


def test_rules_that_need_temperature_zero_or_leave_to_be_lossy(target: Any) -> None:
    with pytest.raises(InputError, match=r"typical verifier changes the target's distribution.*allow_lossy=True"):
        specdec.SpeculativeDecoder(target, verifier="typical")
    out = specdec.SpeculativeDecoder(target, verifier="typical", allow_lossy=True).generate(PROMPT, max_new_tokens=3)
    assert out.stats.lossless is False
    assert "LOSSY" in str(out.stats)
    decoder = specdec.SpeculativeDecoder(target, verifier="greedy")
    with pytest.raises(IncompatiblePairError, match=r"exact at temperature 0 only, not at 0.5"):
        decoder.generate(PROMPT, temperature=0.5)
    with pytest.raises(IncompatiblePairError, match="ratio verifier does not keep"):
        specdec.SpeculativeDecoder(target, verifier="ratio").generate(PROMPT, exact=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", ["coupled", "ratio", "traversal", "match"])
@pytest.mark.parametrize(("of_target", "of_draft"), [(72, 64), (64, 72)])
def test_vocabularies_padded_differently(of_target: int, of_draft: int, verifier: str, temperature: float) -> None:
    """No padded id is a word; one may still come out of a random target, and must not stop its drafter."""
    target = tiny_models.tiny("llama", vocab_size=of_target)
    draft = tiny_models.tiny("llama", vocab_size=of_draft)
    common = min(of_target, of_draft)
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(draft.named_parameters(), target.named_parameters(), strict=True):
            mine[:common].copy_(theirs[:common])
    options = {"max_new_tokens": 60, "temperature": temperature, "seed": 2, "strict": True}
    for policy in (Fixed(4), Fixed(2, (3,))):
        if policy.branches and verifier == "ratio":
            continue
        decoder = specdec.SpeculativeDecoder(target, drafter=draft, verifier=verifier, policy=policy)
        out = decoder.generate(PROMPT, **options)
        if verifier == "coupled" or temperature == 0:
            assert out.tokens == tiny_models.reference(target, PROMPT, 60, temperature=temperature, seed=2)
        assert out.stats.num_accepted_draft_tokens > 0
        if of_target > common:
            padded = [*PROMPT, of_target - 1, 5]
            assert len(decoder.generate(padded, **options).tokens) == 60
        if of_target > common and verifier == "coupled" and temperature == 1:
            assert max(out.tokens) >= common, "this text is meant to hold an id that the draft lacks"


def test_a_draft_of_another_dtype_keeps_the_text(target: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        draft = tiny_models.noisy(target, 0.01).to(dtype)
        for verifier in ("coupled", "ratio", "recursive"):
            decoder = specdec.SpeculativeDecoder(target, drafter=draft, verifier=verifier, policy=Fixed(4))
            out = decoder.generate(PROMPT, max_new_tokens=20, strict=True)
            assert out.tokens == tiny_models.reference(target, PROMPT, 20)
            assert out.stats.num_accepted_draft_tokens > 0
            decoder.generate(PROMPT, max_new_tokens=20, temperature=1.0, strict=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", ["coupled", "ratio", "block", "recursive", "traversal", "match"])
def test_a_draft_with_broken_weights_costs_time_only(target: Any, verifier: str, temperature: float) -> None:
    draft = tiny_models.noisy(target, 0.0)
    with torch.no_grad():
        draft.get_output_embeddings().weight[9:12] = torch.nan
    decoder = specdec.SpeculativeDecoder(target, drafter=draft, verifier=verifier, policy=Fixed(3))
    carries_q = temperature > 0 and verifier not in ("coupled", "match")
    with pytest.warns(DrafterWarning, match="no distribution") if carries_q else nullcontext():
        out = decoder.generate(PROMPT, max_new_tokens=20, temperature=temperature)
    if temperature == 0 or verifier == "coupled":
        assert out.tokens == tiny_models.reference(target, PROMPT, 20, temperature=temperature)
    assert len(out.tokens) == 20


# What a sampled draft carries.


def request(sampling: Sampling, draw: Draw) -> Request:
    return Request(tuple(PROMPT), sampling, draw, tiny_models.VOCAB, 200)


def propose(drafter: Drafter, asked: Request, plan: Plan, seed: int) -> Proposal:
    chance = CounterChance(seed, "draft")
    return drafter.propose(drafter.start(asked), plan, chance)


@pytest.mark.parametrize("branching", [(), (3, 2)])
@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 4}, {"temperature": 1.2, "repetition_penalty": 1.4}]
)
def test_the_rows_of_q_are_the_processed_draft_distributions(target: Any, branching: tuple, options: dict) -> None:
    sampling = Sampling(**options)
    drafter = ModelDrafter(target)
    for seed in range(5):
        proposal = propose(drafter, request(sampling, Draw.SAMPLED), Plan(3, branching), seed)
        proposal.check(tiny_models.VOCAB)
        assert proposal.q is not None
        torch.testing.assert_close(proposal.q.sum(-1), torch.ones(len(proposal.q), dtype=torch.float64))
        tree = proposal.tree
        for node, parent in enumerate(tree.parents):
            prefix = [*PROMPT, *tree.tokens[list(tree.path(parent))].tolist()]
            logits = tiny_models.cache_free(target, prefix)[None]
            expected = sampling.probabilities(logits, prefix, tree, [-1])[0]
            torch.testing.assert_close(proposal.distribution(node, tiny_models.VOCAB), expected, rtol=0, atol=1e-10)
        if branching:
            assert len(tree.children(-1)) == 3


@pytest.mark.parametrize("draw", [Draw.SAMPLED, Draw.SHARED])
def test_drafts_are_drawn_as_often_as_their_rows_say(target: Any, draw: Draw) -> None:
    """First and second child of the root over many seeds, against the row and the row without replacement."""
    sampling = Sampling(temperature=0.4, top_k=5)
    drafter = ModelDrafter(target)
    asked = request(sampling, draw)
    state = drafter.start(asked)
    q = sampling.probabilities(tiny_models.cache_free(target, PROMPT)[None], PROMPT, Proposal.empty().tree)[0]
    runs = 1000
    first, second = torch.zeros(tiny_models.VOCAB), torch.zeros(tiny_models.VOCAB)
    for seed in range(runs):
        tree = drafter.propose(state, Plan(1, (2,)), CounterChance(seed, "draft")).tree
        first[tree.tokens[0]] += 1 / runs
        second[tree.tokens[1]] += 1 / runs
    then = torch.stack([q[a] * q.index_fill(0, torch.tensor(a), 0.0) / (1 - q[a]) for a in range(len(q))]).sum(0)
    assert float((first - q).abs().sum()) / 2 < 0.04
    assert float((second - then).abs().sum()) / 2 < 0.04
    assert float((first - then).abs().sum()) / 2 > 0.08  # the two laws differ enough to be told apart
