"""Prompts that begin alike share their prefill, and nothing else changes."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec.drafters import ModelDrafter

import specdec
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.runtime import prefix as prefix_module
from specdec.runtime import session as session_module
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.prefix import DEFAULT_BYTES, PrefixCache, default_bytes
from specdec.runtime.session import Session, chunk_end, run

LONG = [(7 * i + i // 9) % 61 for i in range(200)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_models.tiny("llama", max_position_embeddings=2048)


def prefilled(cache: PrefixCache, backend: EagerBackend, tokens: list[int]) -> Session:
    session = Session(backend.fork(0))
    session.append(tokens)
    run(cache.prefill(session))
    return session


def test_chunks_end_at_the_same_places_whatever_the_prompt() -> None:
    ends, start = [], 0
    while start < 2000:
        start = chunk_end(start)
        ends.append(start)
    assert ends == [128, 256, 512, 1024, 1536, 2048]
    assert [chunk_end(n) for n in (1, 127, 128, 300, 511, 700)] == [128, 128, 256, 512, 512, 1024]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reused_keys_give_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny_models.tiny("llama", dtype=dtype, max_position_embeddings=2048)
    backend = EagerBackend.open(model)
    cache = PrefixCache(1 << 30)
    prefilled(cache, backend, LONG)
    for other in ([*LONG[:150], 5, 6, 7], LONG, [*LONG, *LONG], LONG[:129], [*LONG[:128], 9]):
        warm = prefilled(cache, backend, other)
        cold = prefilled(PrefixCache(0), backend, other)
        assert warm.num_reused >= 128
        assert cold.num_reused == 0
        assert warm.num_cached == cold.num_cached == len(other) - 1
        assert torch.equal(warm.forward().logits, cold.forward().logits)
        for a, b in zip(warm.backend.cache.layers, cold.backend.cache.layers, strict=True):
            count = len(other)
            assert torch.equal(a.keys[:, :, :count], b.keys[:, :, :count])


def test_what_is_reused_is_a_copy(model: Any) -> None:
    backend = EagerBackend.open(model)
    cache = PrefixCache(1 << 30)
    first = prefilled(cache, backend, LONG)
    twins = [prefilled(cache, backend, [*LONG[:140], i]) for i in range(3)]
    first.rewind(1)
    first.append([9] * 150)
    first.prefill()
    for i, twin in enumerate(twins):
        twin.append([1, 2, 3])
        row = twin.forward().logits[-1]
        torch.testing.assert_close(
            row, tiny_models.cache_free(model, [*LONG[:140], i, 1, 2, 3]), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("drafter", ["model", "ngram", None])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_texts_do_not_depend_on_what_was_asked_before(drafter: Any, temperature: float, dtype: torch.dtype) -> None:
    model = tiny_models.tiny("gpt-neox", dtype=dtype)
    made = ModelDrafter(tiny_models.noisy(model, 0.03)) if drafter == "model" else drafter
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 3, "strict": True}
    prompts = [LONG[:180], [*LONG[:170], 1], LONG[:130], [*LONG[:100], 2], LONG[:200], LONG[:128], LONG[:129]]
    cold = specdec.SpeculativeDecoder(model, drafter=made, policy=Fixed(3), prefix_cache=0)
    warm = specdec.SpeculativeDecoder(model, drafter=made, policy=Fixed(3))
    expected = [cold.generate(prompt, **options) for prompt in prompts]
    got = [warm.generate(prompt, **options) for prompt in prompts]
    assert [o.tokens for o in got] == [o.tokens for o in expected]
    assert [o.stats.num_reused_tokens for o in got] == [0, 128, 128, 0, 128, 0, 128]
    assert [o.stats.num_reused_tokens for o in expected] == [0] * len(prompts)
    assert "128 prompt tokens reused" in str(got[1].stats)
    assert len(cold.prefixes) == 0
    # Target and draft both: two models' hits for every reused prompt.
    assert warm.prefixes.num_hits == (8 if drafter == "model" else 4)
    off = warm.generate(prompts[0], reuse_prefix=False, **options)
    assert (off.tokens, off.stats.num_reused_tokens) == (expected[0].tokens, 0)
    together = warm.generate(prompts, **options)
    assert [o.tokens for o in together] == [o.tokens for o in expected]
    assert together[0].stats.num_reused_tokens == 128


def test_models_do_not_share_what_they_computed(model: Any) -> None:
    cache = PrefixCache(1 << 30)
    one, other = EagerBackend.open(model), EagerBackend.open(tiny_models.noisy(model, 0.1))
    prefilled(cache, one, LONG)
    assert prefilled(cache, other, LONG).num_reused == 0
    assert prefilled(cache, one.fork(0), LONG).num_reused == 128
    assert len(cache) == 2
    session = Session(one.fork(0))
    session.append(LONG)
    for backend, length in ((other, 100), (one, 200)):
        with pytest.raises(InputError, match="adopt"):
            session.adopt(backend, length)


def test_the_least_recently_used_go_first(model: Any) -> None:
    backend = EagerBackend.open(model)
    size = backend.bytes_for(200)
    cache = PrefixCache(3 * size)
    prompts = [[i, *LONG] for i in range(5)]
    for prompt in prompts[:3]:
        prefilled(cache, backend, prompt)
    assert (len(cache), cache.num_bytes) == (3, 3 * size)
    assert prefilled(cache, backend, prompts[0]).num_reused == 128  # used again
    prefilled(cache, backend, prompts[3])
    assert cache.num_bytes <= cache.limit
    kept = [len(prompt) for prompt in prompts if any(e.tokens == tuple(prompt[:128]) for e in cache._entries.values())]
    assert len(kept) == 3
    assert prefilled(cache, backend, prompts[0]).num_reused == 128
    assert prefilled(cache, backend, prompts[3]).num_reused == 128
    assert prefilled(cache, backend, prompts[1]).num_reused == 0
    cache.make_room(size)
    assert len(cache) == 1
    cache.make_room(0)
    assert (len(cache), cache._by_key) == (0, {})
    prefilled(cache, backend, prompts[0])
    assert len(cache) == 0  # no room
    cache.make_room(None)
    prefilled(cache, backend, prompts[0])
    assert len(cache) == 1
    cache.clear()
    assert prefilled(cache, backend, prompts[0]).num_reused == 0


def test_a_longer_prompt_takes_the_place_of_its_beginning(model: Any) -> None:
    backend = EagerBackend.open(model)
    cache = PrefixCache(1 << 30)
    for length in (150, 300, 600):
        prefilled(cache, backend, (LONG * 4)[:length])
        assert len(cache) == 1
    assert prefilled(cache, backend, [*LONG[:150], 1]).num_reused == 128
    assert prefilled(cache, backend, [*(LONG * 4)[:400], 1]).num_reused == 256
    assert prefilled(cache, backend, (LONG * 4)[:700]).num_reused == 512


actions = st.lists(
    st.tuples(
        st.sampled_from(["prompt", "room", "clear"]), st.integers(0, 3), st.lists(st.integers(0, 1), max_size=24)
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(life=actions)
def test_random_lives_reuse_the_longest_beginning_that_is_kept(life: list) -> None:
    """Against a search through all entries, with chunks of a few tokens."""
    before = session_module.PREFILL_CHUNK
    session_module.PREFILL_CHUNK = 8
    try:
        backend = EagerBackend.open(tiny_models.tiny("llama"))
        size = backend.bytes_for(1)
        cache = PrefixCache(3 * size)
        for what, number, tokens in life:
            if what == "room":
                cache.make_room(number * size)
            elif what == "clear":
                cache.clear()
            elif tokens:
                entries = [entry.tokens for entry in cache._entries.values()]
                best = 0
                for entry in entries:
                    end = chunk_end(0)
                    while end <= min(len(entry), len(tokens) - 1) and entry[:end] == tuple(tokens[:end]):
                        best, end = max(best, end), chunk_end(end)
                session = prefilled(cache, backend, tokens)
                assert session.num_reused == best
                row = session.forward().logits[-1]
                torch.testing.assert_close(row, tiny_models.cache_free(backend.model, tokens), rtol=1e-9, atol=1e-9)
            assert cache.num_bytes <= 3 * size
            assert {id(e) for e in cache._by_key.values()} <= {id(e) for e in cache._entries.values()}
    finally:
        session_module.PREFILL_CHUNK = before


def test_keys_that_collide_are_told_apart(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def same_keys(session: Any, length: int) -> tuple[list[int], list[int]]:
        ends = [end for end in (128, 256, 512) if end <= length]
        return ends, [1, 2, 3][: len(ends)]

    monkeypatch.setattr(prefix_module, "_chunks", same_keys)
    backend = EagerBackend.open(model)
    cache = PrefixCache(1 << 30)
    prefilled(cache, backend, LONG)
    other = [1, *LONG]
    for made in (Session(backend.fork(0), hidden=(0,)), Session(backend.fork(0), salt=1)):
        made.append(LONG)
        run(cache.prefill(made))
        assert made.num_reused == 0
    session = prefilled(cache, backend, other)
    assert session.num_reused == 0
    torch.testing.assert_close(
        session.forward().logits[-1], tiny_models.cache_free(model, other), rtol=1e-10, atol=1e-10
    )


def test_threads_share_it(model: Any) -> None:
    made = specdec.SpeculativeDecoder(model, prefix_cache=3 * EagerBackend.open(model).bytes_for(200))
    prompts = [[i, *LONG[:150]] for i in range(4)]
    expected = [tiny_models.reference(model, prompt, 3) for prompt in prompts]
    wrong: list[Any] = []

    def work(offset: int) -> None:
        for i in range(8):
            at = (i + offset) % 4
            tokens = made.generate(prompts[at], max_new_tokens=3).tokens
            if tokens != expected[at]:
                wrong.append((at, tokens))

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert made.prefixes.num_bytes <= made.prefixes.limit


def test_how_much_is_kept(model: Any) -> None:
    assert 0 < default_bytes(torch.device("cpu")) <= DEFAULT_BYTES
    assert specdec.SpeculativeDecoder(model).prefixes.limit == default_bytes(torch.device("cpu"))
    for wrong in (-1, 0.5):
        with pytest.raises(InputError, match="prefix_cache is a number of bytes, 0 for none"):
            specdec.SpeculativeDecoder(model, prefix_cache=wrong)


class Reading(specdec.drafter.Drafter):
    """Reads hidden states, and proposes what they say: nothing."""

    hidden = (0, 2)

    def start(self, request: Any) -> Any:
        return request.features

    def propose(self, state: Any, plan: Any, chance: Any) -> Any:
        self.seen = len(state), state.read(0).shape
        return specdec.proposal.Proposal.empty()

    def observe(self, state: Any, outcome: Any) -> Any:
        return state


def test_hidden_states_are_reused_with_the_prompt_and_count_as_memory(model: Any) -> None:
    reading = Reading()
    made = specdec.SpeculativeDecoder(model, drafter=reading, backend="eager")
    texts = [made.generate([*LONG[:200], i], max_new_tokens=3) for i in (1, 2)]
    assert texts[1].stats.num_reused_tokens == 128
    assert reading.seen[1][1] == 2 * model.config.hidden_size
    assert texts[1].tokens == made.generate([*LONG[:200], 2], max_new_tokens=3, reuse_prefix=False).tokens
    plain = made.backend.bytes_for(256)
    with pytest.raises(specdec.errors.MemoryBudgetError, match="for the Reading drafter"):
        specdec.SpeculativeDecoder(model, drafter=reading, backend="eager", memory_budget=plain).generate(LONG[:200])
