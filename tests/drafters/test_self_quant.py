"""A quantised target as its own draft: its products, what it shares, what it costs, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import SelfQuantDrafter
from torch import nn
from transformers.pytorch_utils import Conv1D

import specdec
from specdec.errors import InputError, UnsupportedModelError
from specdec.policy import Fixed
from specdec.runtime import quantised as schemes
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.quantised import Int8Linear, QuantisedModel, Scheme, int8_product, register_scheme

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def decoder(model: Any, scheme: str = "int8", k: int = 4) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(model, drafter=SelfQuantDrafter(scheme), policy=Fixed(k), backend="eager")


@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 9])
def test_the_int8_product_is_exact(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows, weight = (
        torch.randint(-127, 128, size, generator=generator, dtype=torch.int8) for size in ((num_rows, 40), (24, 40))
    )
    assert torch.equal(int8_product(rows, weight).long(), rows.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_is_off_by_its_rounding(dtype: torch.dtype) -> None:
    """Each factor is rounded to steps of 1/127 of its scale: errors of uniform law, which add up in squares."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator) * torch.logspace(-3, 3, 48)[:, None]
    x, bias = torch.randn(2, 6, 256, generator=generator), torch.randn(48, generator=generator)
    layer = Int8Linear(weight.to(dtype), bias.to(dtype))
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
    draft = schemes.quantised(model, "int8")
    assert not [m for m in draft.modules() if type(m) in (nn.Linear, Conv1D)]
    own = {id(p) for p in model.parameters()}
    assert all(id(p) in own for p in draft.parameters())
    assert model.get_input_embeddings().weight is draft.inner.get_input_embeddings().weight
    products = [m for m in draft.modules() if isinstance(m, Int8Linear)]
    assert draft.num_weight_bytes == sum(m.weight.numel() + 4 * len(m.scale_N) for m in products)


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
    draft = schemes.quantised(tiny_models.tiny("mixtral"), "int8")
    kept = [n for n, p in draft.named_parameters() if "expert" in n and p.ndim == 3]
    assert kept
    assert any(isinstance(m, Int8Linear) for m in draft.modules())


def test_schemes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Halved(Scheme):
        def obstacle(self, device: torch.device) -> str | None:
            return None if device.type == "cpu" else "CPU only"

        def product(self, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> nn.Module:
            layer = nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias_N is not None, dtype=weight_NK.dtype)
            layer.weight = nn.Parameter(weight_NK.detach().half().to(weight_NK.dtype))
            layer.bias = bias_N
            return layer

    class Nowhere(Halved):
        def obstacle(self, device: torch.device) -> str | None:
            return f"no {device.type} has it"

    monkeypatch.setattr(schemes, "SCHEMES", dict(schemes.SCHEMES))
    register_scheme("half", Halved())
    register_scheme("nowhere", Nowhere())
    model = tiny_models.tiny("llama")
    out = decoder(model, "half").generate(PROMPT, max_new_tokens=20, strict=True)
    assert out.tokens == tiny_models.reference(model, PROMPT, 20)
    assert out.stats.mean_acceptance_length > 4
    with pytest.raises(
        UnsupportedModelError, match=r"LlamaForCausalLM cannot draft with nowhere weights.*no cpu has it"
    ):
        decoder(model, "nowhere")
    with pytest.raises(InputError, match="there are: half, int8, nowhere"):
        decoder(model, "int3")
    with pytest.raises(InputError, match="already"):
        register_scheme("int8", Halved())


def test_a_quantised_target_is_refused() -> None:
    model = tiny_models.tiny("llama")
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="quantised already"):
        decoder(model)


def test_a_model_can_be_made_again_without_weights() -> None:
    """What a process that compiles it in the background starts from: its class, and its configuration as data."""
    made = schemes.quantised(tiny_models.tiny("gemma3", dtype=torch.bfloat16), "int8")
    config = QuantisedModel.config_class.from_dict(made.config.to_dict())
    twin = QuantisedModel._from_config(config, dtype=torch.bfloat16)
    shapes = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (made, twin)]
    assert shapes[0] == shapes[1]
