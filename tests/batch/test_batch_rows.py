"""A text of a batch is the text that its prompt gets alone: every drafter and rule, ragged prompts, any neighbours."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specdec.drafters import ModelDrafter, NgramDrafter
from tiny_drafters import DRAFTERS, NOISE, shared, target

import specdec
from specdec import registry
from specdec.batch import Ticket
from specdec.generation import Generation
from specdec.policy import Confidence, Fixed, Throughput

# Ragged: one token, more than a prefill chunk, repetitions for the lookup drafters.
PROMPTS = [[9], [3, 5, 7, 3, 5, 7, 3, 5], list(range(1, 62)) * 3, [1, 2] * 20, [50, 40, 30]]
COUNT = 18
POLICIES = {"fixed": Fixed(3), "tree": Fixed(2, (2, 2)), "confidence": Confidence(0.5, k=5)}


@cache
def draft(dtype: torch.dtype) -> torch.nn.Module:
    return tiny_models.noisy(tiny_models.tiny("gpt-neox", dtype=dtype), NOISE)


@cache
def decoder(drafter: str, verifier: str, policy: str, dtype: torch.dtype) -> specdec.SpeculativeDecoder:
    rule = registry.create("verifier", verifier)
    return specdec.SpeculativeDecoder(
        target() if dtype == torch.float64 else tiny_models.tiny("gpt-neox", dtype=dtype),
        drafter=shared(drafter) if dtype == torch.float64 else ModelDrafter(draft(dtype)),
        verifier=rule,
        policy=POLICIES.get(policy) or Throughput(k=3, limit=5, probe_every=4),
        allow_lossy=not rule.lossless,
    )


@cache
def alone(prompt: tuple[int, ...], temperature: float, seed: int, count: int = COUNT) -> list[int]:
    return tiny_models.reference(target(), prompt, count, temperature=temperature, seed=seed)


def fitting() -> list[tuple[str, str, str]]:
    assert set(registry.available("drafter")) <= set(DRAFTERS), "add the new drafter here, so that it is tested"
    found = []
    for name in DRAFTERS:
        kind = shared(name)
        # Every drafter under the default rule, every rule with a model and with a lookup.
        for rule in registry.available("verifier") if name in ("model", "ngram") else ("coupled",):
            verifier = registry.create("verifier", rule)
            if verifier.choose_draw(kind.draws) is not None:
                found.append((name, rule, "fixed"))
                if verifier.trees and kind.trees:
                    found.append((name, rule, "tree"))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(("drafter", "verifier", "policy"), fitting())
def test_every_pair_writes_what_it_writes_alone(drafter: str, verifier: str, policy: str, temperature: float) -> None:
    if verifier == "greedy" and temperature:
        return
    made = decoder(drafter, verifier, policy, torch.float64)
    options = {"max_new_tokens": COUNT, "temperature": temperature, "strict": True}
    together = made.generate(PROMPTS, seed=range(len(PROMPTS)), **options)
    for seed, (prompt, out) in enumerate(zip(PROMPTS, together, strict=True)):
        assert out.prompt == prompt
        assert out.tokens == made.generate(prompt, seed=seed, **options).tokens
        if made.verifier.lossless and (temperature == 0 or made.verifier.keeps_seed):
            assert out.tokens == alone(tuple(prompt), temperature, seed)
        assert len(out.origins) == len(out.tokens) == out.stats.num_tokens == COUNT
    if drafter == "model":
        assert sum(out.stats.num_accepted_draft_tokens for out in together) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", ["throughput", "confidence"])
def test_policies_that_look_at_costs_or_confidence(policy: str, temperature: float, dtype: torch.dtype) -> None:
    """Draft lengths follow the clock and differ from run to run; texts do not. float32 agrees with itself."""
    made = decoder("model", "coupled", policy, dtype)
    options = {"max_new_tokens": COUNT, "temperature": temperature, "top_k": 20 if temperature else None}
    together = made.generate(PROMPTS, seed=5, strict=True, **options)
    assert [out.tokens for out in together] == [made.generate(p, seed=5, **options).tokens for p in PROMPTS]
    plain = made.generate_plain(PROMPTS, seed=5, **options)
    assert [out.tokens for out in together] == [out.tokens for out in plain]
    assert {out.stats.num_draft_tokens for out in plain} == {0}


lives = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(0, tiny_models.VOCAB - 1), min_size=1, max_size=30),
            "count": st.integers(1, 14),
            "joins": st.integers(0, 8),  # the turn in which it is submitted
            "leaves": st.none() | st.integers(1, 5),  # cancelled so many turns later
            "drafter": st.sampled_from(["model", "ngram", None]),
            "temperature": st.sampled_from([0.0, 1.0]),
        }
    ),
    min_size=1,
    max_size=6,
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(life=lives, max_rows=st.integers(1, 4))
def test_joining_and_leaving_at_any_time_changes_no_text(life: list[dict[str, Any]], max_rows: int) -> None:
    made = decoder("model", "coupled", "fixed", torch.float64)
    batch = made.batch(max_rows=max_rows, strict=True)
    lookup = NgramDrafter()
    tickets: list[Ticket | None] = [None] * len(life)
    pieces: dict[int, list[int]] = {}
    turn = 0
    while turn < 9 or batch.running or batch.waiting:
        for i, text in enumerate(life):
            if text["joins"] == turn:
                other = {"drafter": lookup} if text["drafter"] == "ngram" else {}
                plan = {"policy": Fixed(1)} if text["drafter"] is None else {}
                tickets[i] = batch.submit(
                    text["prompt"],
                    max_new_tokens=text["count"],
                    temperature=text["temperature"],
                    seed=i,
                    **other,
                    **plan,
                )
            if text["leaves"] is not None and text["joins"] + text["leaves"] == turn:
                batch.cancel(tickets[i])
        assert len(batch.running) <= max_rows
        for ticket, chunk in batch.step():
            pieces.setdefault(ticket.number, []).extend(chunk.tokens)
        turn += 1
    for i, (text, ticket) in enumerate(zip(life, tickets, strict=True)):
        assert ticket is not None
        assert ticket.is_done
        out = ticket.result()
        expected = alone(tuple(text["prompt"]), text["temperature"], i, 14)
        assert out.tokens == expected[: len(out.tokens)] == pieces.get(ticket.number, [])
        if out.finish_reason is None:
            assert text["leaves"] is not None
        else:
            assert (out.finish_reason, len(out.tokens)) == ("length", text["count"])


def test_endings_stops_and_logprobs_are_each_texts_own() -> None:
    made = decoder("model", "coupled", "fixed", torch.float64)
    first = alone(tuple(PROMPTS[1]), 0.0, 0)
    batch = made.batch(max_new_tokens=COUNT, strict=True)
    ends = batch.submit(PROMPTS[1], eos_token_id=first[4], logprobs=True)
    short = batch.submit(PROMPTS[1], max_new_tokens=2)
    context = batch.submit(list(range(60)) * 4, max_new_tokens=500)
    assert batch.waiting == [ends, short, context]
    assert batch.step() == []  # prompts
    assert [ticket for ticket, _ in batch.step()][:2] == [ends, short]
    batch.drain()
    assert batch.running == batch.waiting == []
    out = ends.result()
    assert out.finish_reason == "eos"
    assert out.tokens == first[: first.index(first[4]) + 1]
    one = made.generate(PROMPTS[1], max_new_tokens=COUNT, eos_token_id=first[4], logprobs=True)
    assert out.logprobs == pytest.approx(one.logprobs)
    assert short.result().tokens == first[:2]
    assert (context.result().finish_reason, len(context.result().tokens)) == ("context", tiny_models.CONTEXT - 240)


def test_exact_half_precision_texts_are_those_of_plain_decoding() -> None:
    model = tiny_models.tiny("llama", dtype=torch.bfloat16)
    made = specdec.SpeculativeDecoder(model, drafter=tiny_models.noisy(model, 0.02), policy=Fixed(3))
    out = made.generate(PROMPTS, max_new_tokens=COUNT, exact=True, strict=True)
    plain: list[Generation] = [made.generate_plain(prompt, max_new_tokens=COUNT) for prompt in PROMPTS]
    assert [a.tokens for a in out] == [b.tokens for b in plain]
