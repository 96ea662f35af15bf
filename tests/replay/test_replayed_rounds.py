"""Replayed rounds are the rounds of a run: same numbers, same order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_drafters
import tiny_models
from specdec.drafters import ModelDrafter

import specdec
from specdec.drafter import Memory
from specdec.errors import IncompatiblePairError, InputError
from specdec.fit.ranks import comb
from specdec.policy import Confidence, Fixed, Heuristic, Policy, Throughput
from specdec.registry import available
from specdec.replay import Recording, record, replay
from specdec.trace import Round, summarize
from specdec.tree_policy import DynamicTree, StaticTree

DEPTH, TOKENS, SEED = 4, 16, 3
PROMPT = tiny_drafters.PROMPT
CHAINS: list[Policy] = [Fixed(1), Fixed(DEPTH), Heuristic(2, limit=DEPTH), Confidence(0.4, k=DEPTH)]
TREES: list[Policy] = [Fixed(3, (3, 2)), StaticTree(comb(DEPTH, 3))]
BY_ROUNDS = ("cross_vocab:retokenise", "hybrid", "lookahead")
EXACT = sorted(set(tiny_drafters.DRAFTERS) - {*BY_ROUNDS, "none"})


def options(temperature: float, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": TOKENS, "temperature": temperature, "seed": SEED, **more}


@cache
def decoder(name: str) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(tiny_drafters.target(), drafter=tiny_drafters.shared(name), policy=Fixed(DEPTH))


@cache
def recorded(name: str, temperature: float) -> Recording:
    return record(decoder(name), [PROMPT], depth=DEPTH, top_m=8, costs=False, **options(temperature))


def numbers(rounds: Sequence[Round]) -> list[tuple[int, ...]]:
    return [(r.num_nodes, r.depth_proposed, r.num_accepted, r.num_evaluated, r.num_emitted) for r in rounds]


def measured(name: str, temperature: float, policy: Policy, **more: Any) -> list[tuple[int, ...]]:
    return numbers(decoder(name).generate(PROMPT, policy=policy, **options(temperature, **more)).trace.rounds)


def test_every_drafter_says_what_it_depends_on() -> None:
    assert {*EXACT, *BY_ROUNDS, "none"} >= set(available("drafter"))
    for name in EXACT:
        assert tiny_drafters.shared(name).memory is not Memory.ROUNDS


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", EXACT)
def test_replay_is_what_a_run_does(name: str, temperature: float) -> None:
    recording = recorded(name, temperature)
    assert recording.meta["num_inconsistent"] == 0
    policies = CHAINS if name in ("model", "ngram", "eagle") else CHAINS[1:2] + CHAINS[3:]
    if recording.meta["trees"]:
        policies = policies + TREES
    exact = 0
    for policy in policies:
        found = replay(recording, policy)
        if found.exact:
            assert numbers(found.rounds) == measured(name, temperature, policy), policy.name
            assert found.bound == 0
        exact += found.exact
    # Branches of a drafter that reads its own hidden states were not all recorded.
    assert exact == len(policies) or (name in ("eagle", "self_quant") and exact >= len(policies) - 1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_statistics_are_those_of_the_run(temperature: float) -> None:
    made = decoder("model").generate(PROMPT, policy=Fixed(3), **options(temperature)).stats.as_dict()
    found = replay(recorded("model", temperature), Fixed(3)).stats.as_dict()
    assert {**found, "seconds": None} == {**made, "seconds": None}
    assert found["num_accepted_draft_tokens"] > 0


def test_the_recorded_text_is_plain_decodings() -> None:
    plain = decoder("model").generate_plain(PROMPT, **options(1.0))
    recording = recorded("model", 1.0)
    assert recording.arrays["tokens_P"][:TOKENS].tolist() == plain.tokens
    assert recording.texts[0].num_tokens == TOKENS


def test_chains_longer_than_the_recording_follow_where_nodes_are_like_roots() -> None:
    assert numbers(replay(recorded("model", 0.0), Fixed(9)).rounds) == measured("model", 0.0, Fixed(9))
    with pytest.raises(InputError, match="--depth 9"):
        replay(recorded("ngram", 0.0), Fixed(9))


def test_shorter_texts() -> None:
    found = replay(recorded("model", 1.0), Fixed(DEPTH), max_new_tokens=11)
    assert numbers(found.rounds) == measured("model", 1.0, Fixed(DEPTH), max_new_tokens=11)
    assert found.stats.num_tokens == 11


@pytest.mark.parametrize("policy", [Fixed(DEPTH), Fixed(3, (3, 2)), Fixed(8)])
def test_rounds_reach_over_an_end_of_text_as_they_do_in_a_run(policy: Policy) -> None:
    text = decoder("model").generate_plain(PROMPT, **options(1.0)).tokens
    ends = [next(i for i, token in enumerate(text) if token == one) for one in dict.fromkeys(text)]
    beyond = 0
    for end in [at for at in ends if at > 2][:4]:
        recording = record(
            decoder("model"), [PROMPT], depth=DEPTH, top_m=2, costs=False, **options(1.0, eos_token_id=text[end])
        )
        assert recording.texts[0].num_tokens == end + 1
        found = replay(recording, policy)
        assert numbers(found.rounds) == measured("model", 1.0, policy, eos_token_id=text[end])
        beyond += sum(r.num_emitted for r in found.rounds) > end + 1
    assert beyond  # or this tested nothing


def test_a_filter_is_recorded_with_the_rows() -> None:
    more = {"top_p": 0.8, "repetition_penalty": 1.3}
    recording = record(decoder("model"), [PROMPT], depth=DEPTH, top_m=8, costs=False, **options(0.8, **more))
    assert numbers(replay(recording, Fixed(DEPTH)).rounds) == measured("model", 0.8, Fixed(DEPTH), **more)
    tree = replay(recording, Fixed(2, (3, 2)))
    run = measured("model", 0.8, Fixed(2, (3, 2)), **more)
    assert not tree.exact  # fewer children than were asked for
    assert tree.bound == 0
    assert [r[2:] for r in numbers(tree.rounds)] == [r[2:] for r in run]


def test_a_drafter_that_learns_is_an_estimate_and_claiming_otherwise_would_be_caught() -> None:
    recording = recorded("hybrid", 0.0)
    found = replay(recording, Fixed(DEPTH))
    assert not found.exact
    assert found.bound is None
    claimed = Recording(recording.arrays, {**recording.meta, "memory": "text"})
    assert replay(claimed, Fixed(DEPTH)).exact
    assert numbers(replay(claimed, Fixed(DEPTH)).rounds) != measured("hybrid", 0.0, Fixed(DEPTH))
    with pytest.raises(InputError, match="earlier rounds"):
        replay(recording, Fixed(2, (2, 2)))


def test_one_altered_token_changes_the_rounds() -> None:
    recording = recorded("model", 0.0)
    right = replay(recording, Fixed(DEPTH))
    start = next(i for i, r in enumerate(right.rounds) if r.num_accepted)
    at = sum(r.num_emitted for r in right.rounds[:start])
    drafted = recording.arrays["drafted_PK"].copy()
    place = recording.arrays["place_PK"].copy()
    drafted[at, 0] = (drafted[at, 0] + 1) % tiny_models.VOCAB
    place[at, 0] = 1
    altered = Recording({**recording.arrays, "drafted_PK": drafted, "place_PK": place}, recording.meta)
    assert numbers(replay(altered, Fixed(DEPTH)).rounds) != numbers(right.rounds)


def test_a_policy_that_follows_the_clock_is_bracketed() -> None:
    found = replay(recorded("model", 0.0), Throughput(limit=DEPTH))
    assert not found.exact
    assert "clock" in found.reasons[0]
    made = decoder("model").generate(PROMPT, policy=Throughput(limit=DEPTH), **options(0.0)).trace.rounds
    assert found.bound is not None
    assert abs(summarize(made, 0).mean_acceptance_length - found.stats.mean_acceptance_length) <= found.bound


def test_branches_that_were_not_recorded_are_bracketed() -> None:
    found = replay(recorded("eagle", 1.0), Fixed(3, (3, 2)))
    assert not found.exact
    assert found.bound
    made = decoder("eagle").generate(PROMPT, policy=Fixed(3, (3, 2)), **options(1.0)).stats
    assert abs(made.mean_acceptance_length - found.stats.mean_acceptance_length) <= found.bound


def test_what_a_trace_cannot_tell_is_refused() -> None:
    recording = recorded("model", 1.0)
    for policy, verifier, error, words in (
        (DynamicTree(budget=8), "coupled", InputError, "branches that no text took"),
        (Fixed(2, (2, 2)), "ratio", IncompatiblePairError, "chains"),
        (Fixed(2, (2, 2)), "traversal", InputError, "recursive"),
        (Fixed(2), "greedy", IncompatiblePairError, "temperature 0"),
        (Fixed(2), "typical", InputError, "changes the text"),
    ):
        with pytest.raises(error, match=words):
            replay(recording, policy, verifier)
    with pytest.raises(IncompatiblePairError, match="chains"):
        replay(recorded("ngram", 0.0), Fixed(2, (2, 2)))
    with pytest.raises(InputError, match="at most 16"):
        replay(recording, Fixed(2), max_new_tokens=17)


def test_record_refuses_what_it_cannot_do() -> None:
    for more, words in (
        ({"depth": 0}, "depth"),
        ({"depth": 65}, "depth"),
        ({"top_m": 0}, "top_m"),
        ({"exact": True}, "float32"),
    ):
        with pytest.raises(InputError, match=words):
            record(decoder("model"), [PROMPT], costs=False, **more)
    with pytest.raises(InputError, match="no prompts"):
        record(decoder("model"), [])
    with pytest.raises(InputError, match="no drafter"):
        record(specdec.SpeculativeDecoder(tiny_drafters.target()), [PROMPT])


def test_every_rule_is_exact_at_temperature_zero() -> None:
    run = {
        rule: measured("model", 0.0, Fixed(3), verifier=specdec.registry.create("verifier", rule))
        for rule in ("ratio", "block", "match")
    }
    for rule, rounds in run.items():
        found = replay(recorded("model", 0.0), Fixed(3), rule)
        assert found.exact
        assert numbers(found.rounds) == rounds


def test_survival_counts_every_position() -> None:
    recording = recorded("model", 0.0)
    text = recording.arrays["tokens_P"].tolist()
    drafted = recording.arrays["drafted_PK"].tolist()
    for depth in range(1, DEPTH + 1):
        starts = range(TOKENS - depth)
        share = np.mean([drafted[i][:depth] == text[i : i + depth] for i in starts])
        assert recording.survival(DEPTH)[depth - 1] == pytest.approx(share)
    with pytest.raises(InputError, match="--depth 5"):
        recording.survival(5)


def test_the_embedded_pair(tmp_path: Any) -> None:
    pair = specdec.load(drafter="model", policy=Fixed(4))
    prompts = ["def area(shape):\n", "import os\n"]
    texts = {"max_new_tokens": 24, "temperature": 1.0, "seed": 2}
    recording = record(pair, prompts, depth=4, top_m=16, costs=False, **texts)
    recording.save(tmp_path / "t.safetensors")
    loaded = Recording.load(tmp_path / "t.safetensors")
    for policy in (Fixed(4), Fixed(2, (3, 2))):
        found = replay(loaded, policy)
        assert found.exact
        runs = [pair.generate(prompt, policy=policy, **texts).trace.rounds for prompt in prompts]
        assert [numbers(rounds) for rounds in found.texts] == [numbers(rounds) for rounds in runs]


def test_a_vocabulary_of_the_drafts_own() -> None:
    draft = ModelDrafter(tiny_drafters.partial_draft(), vocabulary=list(range(5, 45)))
    narrow = specdec.SpeculativeDecoder(tiny_drafters.target(), drafter=draft, policy=Fixed(DEPTH))
    for temperature in (0.0, 1.0):
        recording = record(narrow, [PROMPT], depth=DEPTH, top_m=8, costs=False, **options(temperature))
        for policy in (Fixed(DEPTH), Fixed(2, (3, 2))):
            run = narrow.generate(PROMPT, policy=policy, **options(temperature)).trace.rounds
            assert numbers(replay(recording, policy).rounds) == numbers(run)
