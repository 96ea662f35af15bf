"""Drafters that have nothing to say, for a round or for good, and processors that leave a head nothing to draft."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_eagle
import tiny_models
import torch
import transformers as tf
from specdec.drafters import EagleDrafter, HybridDrafter, LookaheadDrafter, ModelDrafter, SuffixDrafter

import specdec
from specdec.drafter import Drafter
from specdec.errors import DrafterWarning
from specdec.estimates import Average
from specdec.policy import Constant, Fixed, Plan, Policy, PolicyRun
from specdec.proposal import Proposal
from specdec.tree_policy import AdaptiveTree, DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("llama")


class Silent(Drafter):
    """Branches in principle, and never proposes anything; `fails`: it raises instead."""

    trees = True

    def __init__(self, fails: bool = False):
        self.fails = fails

    def start(self, request: Any) -> None:
        return None

    def propose(self, state: None, plan: Plan, chance: Any) -> Proposal:
        if self.fails:
            raise RuntimeError("no idea")
        return Proposal.empty()

    def observe(self, state: None, outcome: Any) -> None:
        return None


def test_an_average_of_nothing_is_the_prior() -> None:
    assert Average(8).mean() == 0.0
    assert Average(8).mean(0.3) == 0.3


def test_an_adaptive_tree_outlives_a_drafter_without_proposals(target: Any) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=Silent(), policy=AdaptiveTree(), backend="eager")
    assert (
        decoder.generate(PROMPT, max_new_tokens=12, strict=True).tokens
        == decoder.generate_plain(PROMPT, max_new_tokens=12).tokens
    )


def test_an_adaptive_tree_outlives_a_failed_drafter(target: Any) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=Silent(fails=True), policy=AdaptiveTree(), backend="eager")
    with pytest.warns(DrafterWarning, match="no idea"):
        out = decoder.generate(PROMPT, max_new_tokens=12)
    assert out.tokens == decoder.generate_plain(PROMPT, max_new_tokens=12).tokens


@pytest.mark.parametrize("policy", [DynamicTree(12, 4, 3), AdaptiveTree(12, 4, 3)])
def test_a_text_longer_than_the_draft_model_goes_on_without_it(target: Any, policy: Policy) -> None:
    """A tree with a node budget and no level left for it is the empty one, not a failure."""
    draft = tiny_models.tiny("llama", max_position_embeddings=16)
    decoder = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(draft, "eager"), policy=policy, backend="eager")
    out = decoder.generate(PROMPT, max_new_tokens=30, strict=True)
    assert out.tokens == decoder.generate_plain(PROMPT, max_new_tokens=30).tokens


class Only(tf.LogitsProcessor):
    """Allows these tokens and no others."""

    def __init__(self, *allowed: int):
        self.allowed = allowed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = torch.full_like(scores, -torch.inf)
        kept[:, list(self.allowed)] = scores[:, list(self.allowed)]
        return kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", ["coupled", "recursive"])
@pytest.mark.parametrize("policy", [Fixed(3), Fixed(2, (2, 2)), DynamicTree(8, 3, 3)])
def test_processors_may_ban_all_that_an_eagle_head_knows(
    target: Any, temperature: float, verifier: str, policy: Policy
) -> None:
    head = tiny_eagle.head(target, draft_vocab_size=40)
    unknown = sorted(set(range(tiny_models.VOCAB)) - set(head.draft_ids.tolist()))
    decoder = specdec.SpeculativeDecoder(
        target, drafter=EagleDrafter(head, "eager"), policy=policy, verifier=verifier, backend="eager"
    )
    out = decoder.generate(
        PROMPT, max_new_tokens=12, temperature=temperature, processors=[Only(*unknown[:5])], strict=True
    )
    assert set(out.tokens) <= set(unknown[:5])


@pytest.mark.parametrize("policy", [Fixed(2, (2, 2)), DynamicTree(10, 4, 2), StaticTree((-1, -1, 0))])
def test_a_hybrid_asks_its_lookup_for_a_chain_under_policies_of_trees(target: Any, policy: Policy) -> None:
    """One that can branch would give a tree, whose nodes are no continuation of each other."""
    found: list[Proposal] = []

    class Watched(LookaheadDrafter):
        def propose(self, state: Any, plan: Plan, chance: Any) -> Proposal:
            found.append(super().propose(state, plan, chance))
            return found[-1]

    hybrid = HybridDrafter(Watched(window=3, ngram=3, guesses=3), ModelDrafter(target, "eager"))
    decoder = specdec.SpeculativeDecoder(target, drafter=hybrid, policy=policy, backend="eager")
    out = decoder.generate(PROMPT, max_new_tokens=20, strict=True)
    assert out.tokens == decoder.generate_plain(PROMPT, max_new_tokens=20).tokens
    assert any(len(proposal.tree) for proposal in found)
    assert all(proposal.tree.is_chain for proposal in found)


class _NowAndThen(PolicyRun):
    def __init__(self) -> None:
        self.rounds = 0

    def plan(self) -> Plan:
        self.rounds += 1
        return Plan(3 if self.rounds == 1 else 0)


class NowAndThen(Policy):
    """Drafts in the first round only."""

    def start(self) -> PolicyRun:
        return _NowAndThen()


def test_a_hybrid_does_not_take_the_last_proposal_for_this_rounds(target: Any) -> None:
    seen: list[int] = []

    class Watched(HybridDrafter):
        def observe(self, state: Any, outcome: Any) -> Any:
            state = super().observe(state, outcome)
            seen.append(state.since_neural)
            return state

    hybrid = Watched(SuffixDrafter(), ModelDrafter(target, "eager"))
    decoder = specdec.SpeculativeDecoder(target, drafter=hybrid, policy=NowAndThen(), backend="eager")
    decoder.generate([3, 5, 9], max_new_tokens=8, strict=True)
    assert seen == list(range(len(seen)))


def test_a_static_tree_takes_its_parents_in_any_sequence() -> None:
    policy = StaticTree([-1, -1, 0])  # type: ignore[arg-type]
    assert policy.branches
    assert policy.start() == Constant(Plan(2, shape=(-1, -1, 0)))
    assert policy == StaticTree.of_choices([[0], [1], [0, 0]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", [Fixed(3), DynamicTree(8, 3, 3)])
def test_an_eagle_head_may_know_padding_that_the_target_lacks(target: Any, temperature: float, policy: Policy) -> None:
    head = tiny_eagle.head(target, vocab_size=tiny_models.VOCAB + 8, own_embeddings=True, draft_vocab_size=40)
    assert int(head.draft_ids.max()) >= tiny_models.VOCAB
    decoder = specdec.SpeculativeDecoder(target, drafter=EagleDrafter(head, "eager"), policy=policy, backend="eager")
    out = decoder.generate(PROMPT, max_new_tokens=12, temperature=temperature, strict=True)
    assert out.tokens == decoder.generate_plain(PROMPT, max_new_tokens=12, temperature=temperature).tokens
    assert any(record.num_nodes for record in out.trace.rounds)
