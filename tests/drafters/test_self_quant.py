"""A target that drafts for itself in fewer bits: its products, what it shares, what it costs, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import SelfQuantDrafter
from torch import nn
from transformers.pytorch_utils import Conv1D

import specdec
from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.kernels.packed import int8_product
from specdec.policy import Fixed
from specdec.quant.format import parse
from specdec.quant.linear import PackedLinear, named_packed
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.quantised import QuantisedModel, quantised

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
# Of layers that every format can take.
WIDE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}


def decoder(model: Any, scheme: Any = "int8", k: int = 4) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(model, drafter=SelfQuantDrafter(scheme), policy=Fixed(k), backend="eager")


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 9])
def test_the_int8_product_is_exact(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows, weight = (
        torch.randint(-127, 128, size, generator=generator, dtype=torch.int8) for size in ((num_rows, 40), (24, 40))
    )
    assert torch.equal(int8_product(rows, weight).long(), rows.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_int8_layer_is_off_by_its_rounding(dtype: torch.dtype) -> None:
    """Each factor is rounded to steps of 1/127 of its scale: errors of uniform law, which add up in squares."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    x, bias = torch.randn(2, 6, 256, generator=generator), torch.randn(48, generator=generator)
    layer = PackedLinear.of(weight.to(dtype), bias.to(dtype), parse("int8"))
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert out.shape == (2, 6, 48)
    apart = (out.double() - bias.double() - x.double() @ weight.double().t()) / weight.double().norm(dim=1)
    step = (weight.abs().amax(1) / 127 / weight.norm(dim=1) * 16).mean(), x.abs().amax(-1).mean() / 127
    expected = float((sum(s.double() ** 2 for s in step) / 12).sqrt())
    rounding = 4 * torch.finfo(dtype).eps
    assert float(apart[:, :, 24:].square().mean().sqrt()) < 1.5 * expected + rounding
    assert float(apart[:, :, 24:].square().mean().sqrt()) > 0.5 * expected
    torch.testing.assert_close(layer(x.to(dtype)[1, 2]), out[1, 2], rtol=0, atol=0)  # a scale for every row


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_everything_but_the_products_is_the_targets_own(name: str) -> None:
    model = tiny_models.tiny(name)
    draft = quantised(model, "int8")
    assert not [m for m in draft.modules() if type(m) in (nn.Linear, Conv1D)]
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in draft.parameters())
    assert model.get_input_embeddings().weight is draft.inner.get_input_embeddings().weight
    products = named_packed(draft).values()
    assert draft.num_weight_bytes == sum(m.out_features * (m.in_features + 4) for m in products)
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


def test_a_draft_computes_what_it_drafts_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Counter = Counter()
    stock = EagerBackend.forward

    def counting(self: EagerBackend, step: Any) -> Any:
        rows[type(self.model).__name__] += step.num_rows
        return stock(self, step)

    made = decoder(tiny_models.tiny("llama"))
    monkeypatch.setattr(EagerBackend, "forward", counting)
    out = made.generate(PROMPT, max_new_tokens=30, strict=True)
    # A chain of k needs the root and all but its last token; no prefill, and nothing again after full acceptance.
    assert rows["QuantisedModel"] == sum(r.num_nodes for r in out.trace.rounds)
    assert rows["LlamaForCausalLM"] == len(PROMPT) - 1 + sum(1 + r.num_nodes for r in out.trace.rounds)


def test_int8_drafts_are_nearly_always_right() -> None:
    rates = [
        decoder(tiny_models.tiny(name)).generate(PROMPT, max_new_tokens=60, strict=True).stats.conditional_acceptance[0]
        for name in ("llama", "gpt-neox", "gemma3")
    ]
    assert min(rates) > 0.75


def test_experts_keep_their_weights() -> None:
    draft = quantised(tiny_models.tiny("mixtral"), "int8")
    kept = [n for n, p in draft.named_parameters() if "expert" in n and p.ndim == 3]
    assert kept
    assert any(isinstance(m, PackedLinear) for m in draft.modules())


@pytest.mark.parametrize(
    "scheme", ["mxfp8_e4m3", "mxfp4", "int4", "sparse-60", {"default": "mxint8", "rules": [["down_proj", None]]}]
)
def test_any_format_and_any_recipe_is_a_scheme(scheme: Any) -> None:
    model = tiny_models.tiny("llama", **WIDE)
    made = decoder(model, scheme)
    out = made.generate(PROMPT, max_new_tokens=20, strict=True)
    assert out.tokens == tiny_models.reference(model, PROMPT, 20)
    stored = named_packed(made.backend.draft.model)
    assert len(stored) == {"sparse-60": 14}.get(scheme, 15) if isinstance(scheme, str) else len(stored) == 13
    assert made.drafter.target_backend(made.backend, model) is made.backend


def test_schemes_that_do_not_fit() -> None:
    model = tiny_models.tiny("llama")  # of 16 inputs
    with pytest.raises(InputError, match=r"o_proj.*cannot be stored as mxfp4|q_proj.*cannot be stored as mxfp4"):
        decoder(model, "mxfp4")
    with pytest.raises(InputError, match="did you mean 'int8'"):
        decoder(model, "int3")
    with pytest.raises(InputError, match=r"awq looks at activations.*specdec quantize"):
        decoder(model, {"default": "int8", "method": "awq"})
    made = decoder(model)
    with pytest.raises(IncompatiblePairError, match="another drafter asked for"):
        SelfQuantDrafter({"default": "int8", "head": "keep"}).target_backend(made.backend, model)


def test_a_target_of_another_library_is_refused() -> None:
    model = tiny_models.tiny("llama")
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="stored by another library"):
        decoder(model)


def test_a_target_with_stored_weights_drafts_with_smaller_ones(tmp_path: Path) -> None:
    tiny_models.tiny("llama", dtype=torch.float32, **WIDE).save_pretrained(tmp_path)
    options = {"policy": Fixed(3), "backend": "eager", "dtype": "float64", "quantize": "mxint8"}
    made = specdec.load(tmp_path, "self_quant", drafter_options={"scheme": "mxfp4"}, **options)
    target, draft = named_packed(made.target), named_packed(made.backend.draft.model.inner)
    assert {layer.format.name for layer in draft.values()} == {"mxfp4"}
    codes = parse("mxfp4").pack(target["lm_head"].weight_in(torch.float32))["codes"]
    assert torch.equal(draft["lm_head"].parts["codes"], codes)
    out = made.generate(PROMPT, max_new_tokens=16, strict=True)
    assert out.tokens == made.generate_plain(PROMPT, max_new_tokens=16).tokens
    with pytest.raises(UnsupportedModelError, match="costs as much as the target"):
        specdec.load(tmp_path, "self_quant", drafter_options={"scheme": "mxint8"}, **options)


@pytest.mark.parametrize("scheme", ["int8", "sparse"])
def test_a_model_can_be_made_again_without_weights(scheme: str) -> None:
    """What a process that compiles it in the background starts from: its class, and its configuration as data."""
    made = quantised(tiny_models.tiny("gemma3", dtype=torch.bfloat16, **WIDE), scheme)
    config = QuantisedModel.config_class.from_dict(made.config.to_dict())
    twin = QuantisedModel._from_config(config, dtype=torch.bfloat16)
    shapes = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (made, twin)]
    assert shapes[0] == shapes[1]
