"""What every registered drafter, verifier and policy must keep, whoever wrote it.

A new drafter needs a line in `DRAFTERS` below; a new verifier or policy is picked up by its name.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter, NoDrafter
from tiny_drafters import DRAFTERS, FREE, POLICIES, PROMPT, fresh, shared, target
from transformers import LogitsProcessor, NoRepeatNGramLogitsProcessor

import specdec
from specdec import registry
from specdec.drafter import Drafter
from specdec.generation import Generation, Stream
from specdec.policy import Fixed, Policy
from specdec.tree_policy import DynamicTree, StaticTree
from specdec.verifier import Verifier


def make_verifier(name: str) -> Verifier:
    return registry.create("verifier", name)


class Bound:
    """A decoder that exists once per drafter, with a rule and a policy of this test's own."""

    def __init__(self, decoder: specdec.SpeculativeDecoder, verifier: Verifier, policy: Policy):
        self.decoder, self.parts = decoder, {"verifier": verifier, "policy": policy}

    def generate(self, prompt: list[int], **options: Any) -> Generation:
        return self.decoder.generate(prompt, **self.parts, **options)

    def generate_plain(self, prompt: list[int], **options: Any) -> Generation:
        return self.decoder.generate_plain(prompt, **options)

    def prepare(self, prompt: list[int], **options: Any) -> Any:
        return self.decoder.prepare(prompt, **self.parts, **options)


@cache
def opened(drafter: Drafter) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(target(), drafter=drafter, allow_lossy=True, prefix_cache=0)


def decoder(drafter: Drafter, verifier: str | Verifier = "coupled", policy: Policy | None = None, model: Any = None):
    verifier = make_verifier(verifier) if isinstance(verifier, str) else verifier
    if model is None:
        return Bound(opened(drafter), verifier, policy or Fixed(4))
    return specdec.SpeculativeDecoder(
        model, drafter=drafter, verifier=verifier, policy=policy or Fixed(4), allow_lossy=not verifier.lossless
    )


def make_drafter(name: str) -> Drafter:
    return shared(name)


def fits(drafter: Drafter, verifier: Verifier, policy: Policy) -> bool:
    return verifier.choose_draw(drafter.draws) is not None and not (
        policy.branches and not (verifier.trees and drafter.trees)
    )


DRAFTER_NAMES = sorted({*registry.available("drafter"), *DRAFTERS})
VERIFIER_NAMES = list(registry.available("verifier"))
COMBINATIONS = [
    (drafter, verifier, policy)
    for drafter in DRAFTER_NAMES
    for verifier in VERIFIER_NAMES
    for policy in POLICIES
    # Every policy under the default rule, every rule under a chain and a tree.
    if (verifier == "coupled" or policy in ("fixed-4", "tree"))
    and (drafter not in DRAFTERS or fits(shared(drafter), make_verifier(verifier), POLICIES[policy]()))
]


@cache
def plain_text(count: int, prompt: tuple[int, ...] = tuple(PROMPT), **options: Any) -> list[int]:
    return tiny_models.reference(target(), prompt, count, **options)


class AvoidParity(LogitsProcessor):
    """Depends on the whole prefix: bans the tokens with the parity of its sum."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = (torch.arange(scores.shape[-1])[None] + input_ids.sum(-1, keepdim=True)) % 2 == 0
        return scores.masked_fill(banned, -torch.inf)


FILTERS: dict[str, dict[str, Any]] = {
    "bare": {},
    "top-k": {"top_k": 5},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.3},
    "no-repeat": {"processors": (NoRepeatNGramLogitsProcessor(2),)},
    "prefix": {"processors": (AvoidParity(),), "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.1},
}


def test_policies_cover_what_is_registered() -> None:
    made = {registry.find("policy", name) for name in registry.available("policy")}
    assert {type(make()) for make in POLICIES.values()} >= made, "add the new policy to POLICIES"


@pytest.mark.parametrize(("drafter", "verifier", "policy"), COMBINATIONS)
def test_greedy_texts_are_the_plain_text(drafter: str, verifier: str, policy: str) -> None:
    rule = make_verifier(verifier)
    out = decoder(make_drafter(drafter), rule, POLICIES[policy]()).generate(PROMPT, max_new_tokens=30, strict=True)
    assert len(out.tokens) == 30
    assert out.stats.lossless is rule.lossless
    if rule.lossless:
        assert out.tokens == plain_text(30)
    assert out.stats.num_tokens == 30
    assert sum(r.num_emitted for r in out.trace.rounds) == 30


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.7, 1.0, 1.5])
def test_plain_decoding_is_the_cache_free_loop(temperature: float, filters: str) -> None:
    options = {"temperature": temperature, "seed": 11, **FILTERS[filters]}
    if temperature == 0:
        options = {k: v for k, v in options.items() if k not in ("top_k", "top_p", "min_p")}
    out = decoder(NoDrafter()).generate_plain(PROMPT, max_new_tokens=24, **options)
    assert out.tokens == plain_text(24, **options)
    assert out.stats.num_rounds == 24


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("drafter", DRAFTER_NAMES)
def test_coupled_keeps_the_seed(drafter: str, temperature: float, filters: str) -> None:
    options = {"temperature": temperature, "seed": 11, **FILTERS[filters]}
    made = make_drafter(drafter)
    trees = (Fixed(3, (3, 2)), StaticTree((-1, -1, 0, 0, 1, 2)), DynamicTree(6, 3, 3)) if made.trees else ()
    for policy in (Fixed(4), *trees):
        out = decoder(made, "coupled", policy).generate(PROMPT, max_new_tokens=24, strict=True, **options)
        assert out.tokens == plain_text(24, **options)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_decodes_as_generate_does(name: str) -> None:
    model = tiny_models.tiny(name, attention="eager" if name == "gemma2" else "sdpa")
    prompt = list(range(1, 14))
    with torch.inference_mode():
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
    draft = ModelDrafter(tiny_models.noisy(model, 0.02))
    for policy in (Fixed(4), Fixed(3, (2, 2))):
        greedy = decoder(draft, "coupled", policy, model).generate(prompt, max_new_tokens=20, strict=True)
        assert greedy.tokens == theirs
        sampled = decoder(draft, "coupled", policy, model).generate(
            prompt, max_new_tokens=20, temperature=1.0, seed=3, strict=True
        )
        assert sampled.tokens == tiny_models.reference(model, prompt, 20, temperature=1.0, seed=3)


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_pair_keeps_the_text_of_every_architecture(name: str) -> None:
    model = tiny_models.tiny(name, attention="eager" if name == "gemma2" else "sdpa")
    draft = ModelDrafter(tiny_models.noisy(model, 0.02))
    expected = tiny_models.reference(model, PROMPT, 12)
    for drafter in ("model", *FREE):
        made = specdec.SpeculativeDecoder(model, drafter=draft if drafter == "model" else shared(drafter))
        for name, verifier, policy in COMBINATIONS:
            if name == drafter and policy in ("fixed-4", "tree") and make_verifier(verifier).lossless:
                parts = {"verifier": make_verifier(verifier), "policy": POLICIES[policy]()}
                out = made.generate(PROMPT, max_new_tokens=12, strict=True, **parts)
                assert out.tokens == expected, (drafter, verifier, policy)


@pytest.mark.parametrize("verifier", VERIFIER_NAMES)
@pytest.mark.parametrize("drafter", DRAFTER_NAMES)
def test_one_seed_one_text(drafter: str, verifier: str) -> None:
    """Also for rules that do not keep the seed of plain decoding; another seed gives another text."""
    rule = make_verifier(verifier)
    options = {"max_new_tokens": 30, "temperature": 0.0 if verifier == "greedy" else 1.5, "strict": True}
    texts = [decoder(make_drafter(drafter), rule).generate(PROMPT, seed=seed, **options).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert (texts[0] == texts[2]) == (verifier == "greedy")
    assert all(len(text) == 30 for text in texts)


@pytest.mark.parametrize("verifier", VERIFIER_NAMES)
def test_acceptance_is_partial_with_a_noisy_draft(verifier: str) -> None:
    """So that these tests go through acceptance and rejection both."""
    temperatures = (0.0,) if verifier == "greedy" else (0.0, 0.7)
    for temperature in temperatures:
        stats = (
            decoder(make_drafter("model"), verifier).generate(PROMPT, max_new_tokens=80, temperature=temperature).stats
        )
        assert 0.2 < stats.draft_acceptance_rate < 0.95
        assert len(stats.acceptance_histogram) >= 3


@pytest.mark.parametrize("verifier", VERIFIER_NAMES)
def test_the_target_as_its_own_draft_is_always_accepted(verifier: str) -> None:
    # `match` draws afresh, so only its greedy acceptance is certain.
    temperatures = (0.0,) if verifier in ("greedy", "match", "typical") else (0.0, 1.0)
    for temperature in temperatures:
        out = decoder(ModelDrafter(target()), verifier).generate(PROMPT, max_new_tokens=41, temperature=temperature)
        assert out.stats.draft_acceptance_rate == 1.0
        assert out.stats.num_rounds == 9  # 8 rounds of 4 + 1, and one of the last token
        assert out.stats.mean_acceptance_length == 1 + 32 / 9


@pytest.mark.parametrize("verifier", [name for name in VERIFIER_NAMES if make_verifier(name).lossless])
def test_a_draft_that_is_always_wrong_costs_time_only(verifier: str) -> None:
    draft = copy.deepcopy(target())
    with torch.no_grad():
        draft.get_output_embeddings().weight.neg_()
        draft.get_output_embeddings().weight[0] -= 0.5
    out = decoder(ModelDrafter(draft), verifier).generate(PROMPT, max_new_tokens=30, strict=True)
    assert out.stats.num_accepted_draft_tokens == 0
    assert out.tokens == plain_text(30)
    assert set(out.origins) == {"target"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["fixed-4", "tree", "shape", "dynamic-tree"])
@pytest.mark.parametrize("drafter", DRAFTER_NAMES)
def test_after_every_round_it_is_as_if_nothing_had_been_drafted(drafter: str, policy: str, temperature: float) -> None:
    made, plan = make_drafter(drafter), POLICIES[policy]()
    if not fits(made, make_verifier("coupled"), plan):
        return
    made_decoder = decoder(made, "coupled", plan)
    task = made_decoder.prepare(PROMPT, max_new_tokens=25, temperature=temperature, strict=True)
    for _ in Stream(task):
        tokens = task.target.tokens
        assert tokens[: len(PROMPT)] == PROMPT
        assert len(task.target.tree) == 0
        assert task.target.num_cached < len(tokens)
        row = task.target.fork().forward().logits[-1]
        torch.testing.assert_close(row, tiny_models.cache_free(target(), tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("verifier", ["coupled", "ratio", "recursive", "match"])
@pytest.mark.parametrize("policy", ["fixed-4", "tree", "shape", "dynamic-tree", "confidence"])
@pytest.mark.parametrize("drafter", DRAFTER_NAMES)
def test_same_state_same_proposal(drafter: str, policy: str, verifier: str) -> None:
    made, rule, plan = fresh(drafter), make_verifier(verifier), POLICIES[policy]()
    if not fits(made, rule, plan):
        return
    made_decoder = decoder(made, rule, plan)
    task = made_decoder.prepare(PROMPT, max_new_tokens=25, temperature=1.0, seed=4, strict=True)
    inner = task.drafter.inner
    proposing, seen = inner.proposing, []

    def twice(state: Any, plan: Any, chance: Any) -> Any:
        first = yield from proposing(state, plan, copy.deepcopy(chance))
        second = yield from proposing(state, plan, chance)
        assert first.tree.tokens.tolist() == second.tree.tokens.tolist()
        assert first.tree.parents == second.tree.parents
        assert first.draws == second.draws
        assert first.q_rows == second.q_rows
        if first.q is not None:
            torch.testing.assert_close(first.q, second.q, rtol=1e-12, atol=1e-12)
        seen.append(len(first.tree))
        return second

    inner.proposing = twice
    for _ in Stream(task):
        pass
    assert any(seen) or drafter == "none"
    once = decoder(make_drafter(drafter), rule, plan).generate(PROMPT, max_new_tokens=25, temperature=1.0, seed=4)
    assert task.ending.tokens == once.tokens  # the second call left no trace


@pytest.mark.parametrize("drafter", DRAFTER_NAMES)
def test_prompts_of_one_token_and_texts_shorter_than_k(drafter: str) -> None:
    made = decoder(make_drafter(drafter), "coupled", Fixed(50))
    for count in (1, 2, 3, 9):
        out = made.generate([9], max_new_tokens=count, strict=True)
        assert out.tokens == plain_text(count, (9,))
        assert out.finish_reason == "length"
        assert all(r.depth_proposed <= count - 1 for r in out.trace.rounds)
        assert sum(r.num_emitted for r in out.trace.rounds) == count
