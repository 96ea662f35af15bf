"""Rollback is an index, commits rarely copy, drafts keep their caches whole, and what cannot work is refused."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import transformers as tf

import specdec
from specdec.errors import InputError, UnsupportedModelError
from specdec.generation import Stream
from specdec.policy import Fixed
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.cache import BUCKETS, SlotLayer, bucket
from specdec.runtime.session import Session
from specdec.tree import TokenTree


def buffers(session: Session) -> list[int]:
    return [t.data_ptr() for layer in session.backend.cache.layers for t in (layer.keys, layer.values)]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The slots of every commit that moved keys and values."""
    seen: list[list[int]] = []
    original = SlotLayer.gather

    def gather(self: SlotLayer, slots: torch.Tensor, start: int) -> None:
        seen.append(slots.tolist())
        original(self, slots, start)

    monkeypatch.setattr(SlotLayer, "gather", gather)
    return seen


def test_leftmost_paths_commit_without_a_copy(copies: list[list[int]]) -> None:
    session = tiny_models.session(tiny_models.tiny(), [1, 2, 3])
    tree = TokenTree.of([4, 5, 6, 7], [-1, 0, 1, 0])
    session.forward(tree)
    before = buffers(session)
    session.commit((0, 1), [4, 5, 9])
    assert (session.num_cached, session.tokens) == (5, [1, 2, 3, 4, 5, 9])
    assert copies == []
    session.forward(tree)
    session.commit((0, 3), [4, 7, 9])  # not leftmost: node 3 moves
    assert copies == [[6, 9]] * 2  # both layers
    assert buffers(session) == before


def test_nothing_is_reallocated_within_a_bucket_and_growth_keeps_the_content() -> None:
    model = tiny_models.tiny()
    session = tiny_models.session(model, [1, 2, 3])
    session.forward()
    before, size = buffers(session), session.backend.num_bytes
    while len(session.tokens) < BUCKETS[0] - 4:
        tree = TokenTree.chain([len(session.tokens) % 60, 2, 3])
        session.forward(tree)
        session.commit((0,), [int(tree.tokens[0]), 7])
        assert buffers(session) == before
        if len(session.tokens) % 11 == 0:
            session.rewind(len(session.tokens) - 1)
    assert session.backend.num_bytes == size
    session.append(range(20))
    row = session.forward().logits[-1]
    assert session.backend.num_bytes == 2 * size
    torch.testing.assert_close(row, tiny_models.cache_free(model, session.tokens), rtol=1e-10, atol=1e-10)


def test_buckets() -> None:
    assert [bucket(n, 10_000) for n in (1, 128, 129, 4096, 4097, 9000)] == [128, 128, 256, 4096, 8192, 10_000]
    assert bucket(100, 96) == 96


def test_rewinding_moves_an_index_and_gives_the_same_rows() -> None:
    model = tiny_models.tiny("gemma3")
    session = tiny_models.session(model, range(1, 30))
    first = session.forward().logits[-1].clone()
    before = buffers(session)
    session.append([5, 6, 7])
    session.forward(TokenTree.chain([1, 2]))
    session.rewind(29)
    assert buffers(session) == before
    assert session.num_cached == 28
    torch.testing.assert_close(session.forward().logits[-1], first, rtol=0, atol=1e-12)
    for length in (-1, 30):
        with pytest.raises(InputError, match=f"cannot rewind to {length}"):
            session.rewind(length)


def test_forks_do_not_see_each_other() -> None:
    model = tiny_models.tiny("mistral")
    session = tiny_models.session(model, range(1, 20))
    session.prefill()
    twins = [session.fork(), session.fork()]
    for twin, extra in zip([session, *twins], ([1, 2], [3], []), strict=True):
        twin.append(extra)
    for twin in [session, *twins]:
        twin.forward(TokenTree.chain([9, 9, 9]))
        twin.drop_tree()
    for twin in [session, *twins]:
        row = twin.forward().logits[-1]
        torch.testing.assert_close(row, tiny_models.cache_free(model, twin.tokens), rtol=1e-10, atol=1e-10)


def test_a_tree_that_does_not_extend_the_last_one_is_refused() -> None:
    session = tiny_models.session(tiny_models.tiny(), [1, 2, 3])
    with pytest.raises(InputError, match="at least one token"):
        tiny_models.session(tiny_models.tiny()).forward()
    session.forward(TokenTree.of([4, 5], [-1, -1]))
    with pytest.raises(InputError, match="does not extend"):
        session.forward(TokenTree.of([4, 5, 6], [-1, 0, 1]))
    with pytest.raises(InputError, match="nothing is new"):
        session.forward(TokenTree.of([4, 5], [-1, -1]))


@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (2, 2))], ids=lambda p: p.name)
@pytest.mark.parametrize("scale", [0.0, 0.03])
def test_the_drafts_own_cache_is_complete(policy: Fixed, scale: float) -> None:
    """After every round, full acceptance included, the next draft forward equals a recompute of the whole text."""
    target = tiny_models.tiny("gpt-neox")
    draft = tiny_models.noisy(target, scale)
    decoder = specdec.SpeculativeDecoder(target, drafter=draft, policy=policy)
    task = decoder.prepare([3, 5, 7], max_new_tokens=30)
    full = 0
    inner = task.drafter.inner
    observe = inner.observe

    def checked(state, outcome):
        nonlocal full
        state = observe(state, outcome)
        full += len(outcome.proposal.tree) > 0 and outcome.num_accepted == outcome.proposal.tree.max_depth
        session = state.session.fork()
        assert session.tokens == task.target.tokens
        if len(outcome.proposal.tree):  # a round without room to draft leaves one more token pending
            assert session.num_cached >= len(session.tokens) - 2
        session.drop_tree()
        row = session.forward().logits[-1]
        torch.testing.assert_close(row, tiny_models.cache_free(draft, session.tokens), rtol=1e-10, atol=1e-10)
        return state

    inner.observe = checked
    for _ in Stream(task):
        pass
    assert task.trace.drafter_error is None
    assert full > 0


def _config_model(config: tf.PretrainedConfig) -> torch.nn.Module:
    return tf.AutoModelForCausalLM.from_config(config).eval()


def mamba() -> torch.nn.Module:
    return _config_model(tf.MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4))


def qwen3_next() -> torch.nn.Module:
    config = tf.Qwen3NextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        layer_types=["linear_attention", "full_attention"],
    )
    return _config_model(config)


def t5() -> torch.nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).eval()


@pytest.mark.parametrize(
    ("make", "naming"),
    [(mamba, "recurrent|mamba|linear"), (qwen3_next, "linear_attention"), (t5, "encoder-decoder")],
)
def test_models_that_cannot_rewind_are_refused_by_layer_type(make, naming: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=naming):
        specdec.SpeculativeDecoder(model)
    target = tiny_models.tiny(vocab_size=32)
    with pytest.raises(UnsupportedModelError, match=naming):
        specdec.SpeculativeDecoder(target, drafter=model)


_LOCAL = [[["global", "local"], 1]]
_SMALL = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "naming"),
    [
        (tf.BloomConfig(**_SMALL), "takes no position_ids"),
        (tf.MptConfig(vocab_size=32, d_model=16, n_heads=2, n_layers=1), "takes no position_ids"),
        (tf.FalconConfig(**_SMALL, alibi=True), "takes no position_ids"),
        (
            tf.GPTNeoConfig(vocab_size=32, hidden_size=16, num_heads=2, num_layers=2, attention_types=_LOCAL),
            "type local",
        ),
    ],
    ids=["bloom", "mpt", "falcon-alibi", "gpt-neo"],
)
def test_models_that_place_tokens_by_cache_slot_are_refused(config: tf.PretrainedConfig, naming: str) -> None:
    """They would take a branch of a tree for a later token: wrong text without an error."""
    with pytest.raises(UnsupportedModelError, match=naming):
        specdec.SpeculativeDecoder(_config_model(config))


def test_training_mode_is_refused() -> None:
    model = tiny_models.tiny().train()
    with pytest.raises(InputError, match=r"training mode.*model\.eval"):
        specdec.SpeculativeDecoder(model)
    with pytest.raises(InputError, match="training mode"):
        specdec.SpeculativeDecoder(tiny_models.tiny(), drafter=model)


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_without_tree_masks_is_refused(attention: str) -> None:
    model = tiny_models.tiny()
    model.config._attn_implementation_internal = attention
    with pytest.raises(InputError, match=f"{attention}.*takes no tree mask.*sdpa"):
        EagerBackend.open(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("k", [1, 6, 50])
def test_reaching_the_context_limit_ends_the_text(name: str, k: int) -> None:
    context = 40
    changes = {"n_positions": context} if name == "gpt2" else {"max_position_embeddings": context}
    model = tiny_models.tiny(name, **changes)
    prompt = list(range(1, 26))
    expected = tiny_models.reference(model, prompt, context - len(prompt))
    for drafter in (None, tiny_models.noisy(model, 0.02), "ngram"):
        decoder = specdec.SpeculativeDecoder(model, drafter=drafter, policy=Fixed(k))
        out = decoder.generate(prompt, max_new_tokens=500, strict=True)
        assert out.finish_reason == "context"
        assert out.tokens == expected


def test_a_draft_with_a_shorter_context_stops_drafting_there() -> None:
    target = tiny_models.tiny("gpt2", n_positions=64)
    draft = tiny_models.tiny("gpt2", n_positions=24)
    with torch.no_grad():  # the same weights, but for the positions that the draft lacks
        for (_, mine), (_, theirs) in zip(draft.named_parameters(), target.named_parameters(), strict=True):
            mine.copy_(theirs[: mine.shape[0]])
    for prompt in ([1, 2, 3], list(range(1, 31))):
        out = specdec.SpeculativeDecoder(target, drafter=draft, policy=Fixed(4)).generate(
            prompt, max_new_tokens=100, strict=True
        )
        assert out.tokens == tiny_models.reference(target, prompt, 64 - len(prompt))
        assert out.finish_reason == "context"
        drafted = [i for i, origin in enumerate(out.origins) if origin == "model"]
        assert bool(drafted) == (len(prompt) < 24)
        assert all(len(prompt) + i <= 24 for i in drafted)
