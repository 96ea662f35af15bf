"""Keys and values in fewer bits: texts are those of plain decoding on the same kind of cache, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_eagle
import tiny_models
import torch
from specdec.drafters import EagleDrafter, EarlyExitDrafter, ModelDrafter, NoDrafter, SelfQuantDrafter
from torch import Tensor
from transformers import DynamicCache

import specdec
import specdec.hf
from specdec import registry
from specdec.drafter import Drafter
from specdec.errors import BackendWarning
from specdec.kernels import ops
from specdec.policy import Fixed, Policy
from specdec.quant.kv import KV_CACHES, kv_format
from specdec.quant.mx import MXFormat
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.choose import open_backend
from specdec.tree_policy import DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
POLICIES: list[Policy] = [Fixed(4), StaticTree((-1, -1, 0, 0, 1, 2, 2, 5)), DynamicTree(budget=8, k=4, width=3)]
native = pytest.mark.skipif(not ops.available(), reason="no native kernels")
# Where texts are equal to the bit: stock products in float64, native ones in every dtype.
RUNS = [
    pytest.param("eager", torch.float64, id="eager"),
    *(pytest.param("compiled", d, id=f"compiled-{str(d)[6:]}", marks=native) for d in (torch.float32, torch.bfloat16)),
]


def model(name: str = "gemma2", dtype: torch.dtype = torch.float64, **changes: object) -> Any:
    """Heads that every format can store; gemma 2 mixes sliding and full layers, and caps its logits."""
    attention = "eager" if name == "gemma2" else "sdpa"
    return tiny_models.tiny(name, dtype=dtype, attention=attention, **{"head_dim": 32, **changes})


class Rounding(DynamicCache):
    """What `transformers` keeps without us, rounded on its way in."""

    def __init__(self, name: str):
        super().__init__()
        self.format = kv_format(name)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows = (self.format.unpack(*self.format.pack(t), t.dtype) for t in (keys, values))
        return super().update(*rows, *args, **kwargs)


@torch.inference_mode()
def from_scratch(target: Any, tokens: list[int], name: str) -> Tensor:
    """Logits `[V]` after the tokens: one forward over all of them, on rounded keys and values."""
    cache = Rounding(name)
    return target(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1]


def decoder(target: Any, drafter: Drafter | Any, name: str | None, backend: str, **options: Any) -> Any:
    options = {"policy": Fixed(4), "backend": backend, **options}
    return specdec.SpeculativeDecoder(target, drafter=drafter, kv_cache=name, **options)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_int8_rows_by_the_formula(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0)).mul(7).to(dtype)
    rows[1, 2] = 0
    codes, scales = kv_format("int8").pack(rows)
    exact = rows.float().numpy()
    top = np.maximum(np.abs(exact).max(-1, keepdims=True), np.float32(1e-30))
    assert np.array_equal(codes.numpy(), np.rint(exact * (np.float32(127) / top)))
    assert np.array_equal(scales.numpy(), top / np.float32(127))
    back = kv_format("int8").unpack(codes, scales, torch.float32)
    assert np.array_equal(back.numpy(), codes.numpy().astype(np.float32) * scales.numpy())
    assert (back - rows.float()).abs().max() <= scales.max() * 0.5001
    assert codes.abs().amax(-1).sort(stable=True).values.unique().tolist() == [0, 127]


def test_mxfp8_rows_are_those_of_the_weight_format() -> None:
    rows = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 7)[:, None]
    codes, scales = kv_format("mxfp8").pack(rows)
    parts = MXFormat("mxfp8_e4m3").pack(rows)
    assert torch.equal(codes, parts["codes"])
    assert torch.equal(scales, parts["scales"])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        back = kv_format("mxfp8").unpack(codes, scales, dtype)
        assert torch.equal(back, MXFormat("mxfp8_e4m3").unpack(parts, dtype))


# ------------------------------------------------------------------ texts


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-neox", "qwen2-sliding"])
def test_rows_depend_on_what_is_stored_alone(kind: str, name: str) -> None:
    """Prefill in chunks, a tree, a commit that moves slots: the logits of one forward on rounded keys and values."""
    target = model(kind) if kind != "gpt-neox" else tiny_models.tiny(kind, hidden_size=128)
    text = [(7 * i) % 61 for i in range(140)]
    session = tiny_models.session(target)
    session.backend = open_backend(target, "eager", kv_cache=name)
    session.append(text)
    tree = specdec.tree.TokenTree.of([4, 5, 6, 7], [-1, -1, 1, 2])
    rows = session.forward(tree).logits
    for row, tokens in zip(rows, ([], [4], [5], [5, 6], [5, 6, 7]), strict=True):
        torch.testing.assert_close(row, from_scratch(target, text + tokens, name), rtol=0, atol=1e-9)
    session.commit((1, 2), [5, 6, 9])
    torch.testing.assert_close(
        session.forward().logits[-1], from_scratch(target, [*text, 5, 6, 9], name), rtol=0, atol=1e-9
    )
    exact = tiny_models.cache_free(target, [*text, 5, 6, 9])
    assert not torch.allclose(session._alone(9, len(text) + 2), exact, rtol=1e-4, atol=1e-4)  # it is rounded


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_chains_and_trees_give_the_plain_text(backend: str, dtype: torch.dtype, name: str) -> None:
    target = model("gemma3" if backend == "eager" else "gemma2", dtype)
    made = decoder(target, ModelDrafter(tiny_models.noisy(target, 0.02), backend, kv_cache=name), name, backend)
    assert made.backend.numerics == ("fast" if backend == "eager" else "invariant")
    accepted = rejected = 0
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 28, "temperature": temperature, "seed": 3}
        expected = made.generate_plain(PROMPT, **options).tokens
        for policy in POLICIES:
            out = made.generate(PROMPT, policy=policy, strict=True, **options)
            assert out.tokens == expected
            accepted += out.stats.num_accepted_draft_tokens
            rejected += out.stats.num_draft_tokens - out.stats.num_accepted_draft_tokens
    assert accepted > 10
    assert rejected > 10


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_ragged_batches(backend: str, dtype: torch.dtype, name: str) -> None:
    target, prompts = model(dtype=dtype), [[9], PROMPT, [1, 2, 3], [4] * 11]
    draft = ModelDrafter(tiny_models.noisy(target, 0.02), backend, kv_cache=name)
    made = decoder(target, draft, name, backend, policy=POLICIES[1])
    options = {"max_new_tokens": 14, "temperature": 0.8}
    together = made.generate(prompts, seed=[5, 6, 7, 8], strict=True, **options)
    for prompt, seed, out in zip(prompts, (5, 6, 7, 8), together, strict=True):
        assert out.tokens == made.generate_plain(prompt, seed=seed, **options).tokens


@pytest.mark.parametrize("kind", [EarlyExitDrafter, SelfQuantDrafter])
@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_drafts_on_the_targets_own_slots(backend: str, dtype: torch.dtype, name: str, kind: type) -> None:
    target = model("qwen3", dtype)
    made, plain = decoder(target, kind(), name, backend), decoder(target, NoDrafter(), name, backend)
    assert made.backend.kv_cache == plain.backend.kv_cache == name
    assert made.backend.bytes_per_token == plain.backend.bytes_per_token
    for policy in POLICIES:
        out = made.generate(PROMPT, max_new_tokens=24, policy=policy, strict=True)
        assert out.tokens == plain.generate_plain(PROMPT, max_new_tokens=24).tokens
        assert out.stats.num_draft_tokens > 0


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_drafts_that_read_hidden_states(backend: str, dtype: torch.dtype, name: str) -> None:
    target = model("qwen3", dtype)
    head = tiny_eagle.head(target, head_dim=32).to(dtype)
    made = decoder(target, EagleDrafter(head, backend, kv_cache=name), name, backend)
    assert made.drafter._backend.kv_cache == name
    for policy in POLICIES:
        out = made.generate(PROMPT, max_new_tokens=16, policy=policy, strict=True)
        assert out.tokens == made.generate_plain(PROMPT, max_new_tokens=16).tokens
        assert out.stats.num_draft_tokens > 0


def test_exact_texts_in_half_precision() -> None:
    """Stock products, where a difference in the last bit may move a stored code by a whole step."""
    target = model("qwen3", torch.bfloat16)
    made = decoder(target, tiny_models.noisy(target, 0.01), "int8", "eager")
    for seed in range(3):
        options = {"max_new_tokens": 30, "temperature": 1.0, "seed": seed}
        out = made.generate(PROMPT, exact=True, strict=True, **options)
        assert out.tokens == made.generate_plain(PROMPT, **options).tokens


def test_generate_of_transformers() -> None:
    target = model("llama")
    draft = tiny_models.noisy(target, 0.02)
    ids = torch.tensor([PROMPT])
    faster = specdec.hf.speculate(draft, kv_cache="int8", policy=Fixed(4))
    out = target.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=faster)
    plain = decoder(target, NoDrafter(), "int8", "eager").generate_plain(PROMPT, max_new_tokens=20)
    assert out[0, len(PROMPT) :].tolist() == plain.tokens
    assert faster.decoder(target).backend.kv_cache == "int8"


@pytest.mark.parametrize("name", KV_CACHES)
@pytest.mark.parametrize(("backend", "dtype"), RUNS)
def test_prompts_that_begin_alike_are_reused(backend: str, dtype: torch.dtype, name: str) -> None:
    target = model("qwen3", dtype)
    made = decoder(target, ModelDrafter(tiny_models.noisy(target, 0.02), backend, kv_cache=name), name, backend)
    beginning = [(7 * i) % 61 for i in range(140)]
    made.generate(beginning, max_new_tokens=2)
    per_token = made.backend.bytes_per_token + made.drafter.bytes_for(1) // 128
    assert made.prefixes.num_bytes == 256 * per_token
    prompt = [*beginning, 3, 4]
    out = made.generate(prompt, max_new_tokens=20, strict=True)
    assert out.stats.num_reused_tokens == 128
    assert out.tokens == made.generate_plain(prompt, max_new_tokens=20, reuse_prefix=False).tokens


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize("name", [None, *KV_CACHES])
@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=native)])
def test_bytes_per_token(backend: str, name: str | None) -> None:
    target = model("gemma3", torch.float32)
    row = {None: 4 * 32, "int8": 32 + 4, "mxfp8": 32 + 1}[name]
    made = open_backend(target, backend, kv_cache=name)
    assert made.bytes_per_token == 2 * 3 * 2 * row
    assert made.bytes_for(200) == 256 * made.bytes_per_token
    assert made.kv_cache == name
    assert ("keys and values in" in made.describes) == (name is not None)


def test_a_budget_holds_more_tokens() -> None:
    target = model("qwen3", torch.float32)
    budget = decoder(target, NoDrafter(), "int8", "eager").backend.bytes_for(256)
    with pytest.raises(specdec.errors.MemoryBudgetError, match="bytes of keys and values"):
        decoder(target, NoDrafter(), None, "eager", memory_budget=budget).generate(PROMPT, max_new_tokens=200)
    small = decoder(target, NoDrafter(), "int8", "eager", memory_budget=budget)
    assert len(small.generate(PROMPT, max_new_tokens=200).tokens) == 200


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("wrong", ["int4", "MXFP8 ", 8, "mxfp"])
def test_unknown_names(wrong: Any) -> None:
    with pytest.raises(specdec.errors.InputError, match=r"no kv_cache is called .*there are: int8, mxfp8"):
        specdec.SpeculativeDecoder(model(), kv_cache=wrong)


@pytest.mark.parametrize("backend", [None, "eager", pytest.param("compiled", marks=native)])
def test_heads_that_blocks_do_not_divide(backend: str | None) -> None:
    target = tiny_models.tiny("qwen3", dtype=torch.float32)
    with pytest.raises(specdec.errors.UnsupportedModelError, match=r"layer 0 has heads of size 8.*kv_cache='int8'"):
        open_backend(target, backend, kv_cache="mxfp8")
    assert open_backend(target, backend, kv_cache="int8").kv_cache == "int8"


def test_a_draft_goes_without_where_it_must() -> None:
    target, draft = model("qwen3"), tiny_models.tiny("qwen3", seed=1)
    with pytest.warns(BackendWarning, match="the draft stores keys and values as it computes them"):
        made = decoder(target, draft, "mxfp8", "eager")
    assert (made.backend.kv_cache, made.drafter._backend.kv_cache) == ("mxfp8", None)
    fitting = decoder(target, tiny_models.noisy(target, 0.02), "mxfp8", "eager")
    assert fitting.drafter._backend.kv_cache == "mxfp8"


def test_other_backends_refuse() -> None:
    with pytest.raises(specdec.errors.UnsupportedModelError, match="not in int8; use backend='eager'"):
        open_backend(model(dtype=torch.float32), "cuda", kv_cache="int8", kernels="twin")


def test_a_backend_that_passes_over_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(EagerBackend):
        @classmethod
        def open(cls, model: Any, **options: Any) -> Any:
            return super().open(model)

    monkeypatch.setattr(registry, "find", lambda kind, name: Careless)
    assert open_backend(model(), "careless").kv_cache is None
    with pytest.raises(
        specdec.errors.UnsupportedModelError, match="careless backend does not store keys and values in"
    ):
        open_backend(model(), "careless", kv_cache="int8")


def test_layers_without_slots_are_refused_as_before() -> None:
    import transformers as tf

    config = tf.MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    with pytest.raises(specdec.errors.UnsupportedModelError, match="cannot be rewound"):
        open_backend(tf.AutoModelForCausalLM.from_config(config).eval(), kv_cache="int8")
