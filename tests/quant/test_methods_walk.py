"""Walking through a model block by block gives what the model itself gives."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.methods import apply
from specdec.quant.methods.collect import ROWS
from specdec.quant.methods.walk import Walk, decoder_layers
from specdec.runtime.copies import shared_copy

EVERYTHING = frozenset({"mean_abs_K", "amax_K", "norm_K", "hessian_KK", "rows_TK"})


def tokens(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_the_walk_is_the_model(name):
    """Windows, two kinds of positions, tuples: whatever a block is called with, it is called with here."""
    model = tiny_models.tiny(name, attention="eager")
    with torch.inference_mode():
        wanted = model(input_ids=tokens(), output_hidden_states=True, use_cache=False).hidden_states
    walk = Walk(shared_copy(model).eval(), tokens())
    for index in range(len(walk.blocks)):
        torch.testing.assert_close(torch.cat(walk.hidden), wanted[index], rtol=1e-12, atol=1e-12)
        walk.advance()
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    rows = walk.observe_rest([head], EVERYTHING)[head].rows_TK
    torch.testing.assert_close(rows, wanted[-1].flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_statistics_of_an_input():
    model = tiny_models.tiny("llama")
    walk = Walk(shared_copy(model).eval(), tokens())
    x_TK = walk.blocks[0].input_layernorm(torch.cat(walk.hidden)).flatten(0, 1).detach()
    found = walk.observe({"input": "self_attn.k_proj"}, EVERYTHING)["input"]
    assert found.count == 30
    torch.testing.assert_close(found.mean_abs_K, x_TK.abs().mean(0))
    torch.testing.assert_close(found.amax_K, x_TK.abs().amax(0))
    torch.testing.assert_close(found.norm_K, x_TK.norm(dim=0))
    torch.testing.assert_close(found.hessian_KK, 2 * x_TK.t() @ x_TK / 30)
    torch.testing.assert_close(found.rows_TK, x_TK)
    s_K = torch.linspace(0.5, 3, 16, dtype=torch.float64)
    half = found.divided(s_K)
    torch.testing.assert_close(half.hessian_KK, 2 * (x_TK / s_K).t() @ (x_TK / s_K) / 30)
    torch.testing.assert_close(half.mean_abs_K, (x_TK / s_K).abs().mean(0))
    lone = walk.observe({"input": "self_attn.k_proj"}, frozenset({"amax_K"}))["input"]
    assert lone.hessian_KK is None
    assert lone.rows_TK is None


def test_a_sample_of_rows_is_spread_over_the_text():
    model = tiny_models.tiny("llama")
    text = tokens(9, 100)
    walk = Walk(shared_copy(model).eval(), text)
    x_TK = walk.blocks[0].input_layernorm(torch.cat(walk.hidden)).flatten(0, 1).detach()
    rows = walk.observe({"input": "self_attn.k_proj"}, EVERYTHING)["input"].rows_TK
    assert len(rows) <= ROWS
    torch.testing.assert_close(rows, x_TK[::2])


def test_a_copy_shares_tensors_and_nothing_else():
    model = tiny_models.tiny("llama")
    twin = shared_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    layers = model.model.layers
    Walk(twin, tokens())
    assert model.model.layers is layers
    assert twin.model.layers is not layers
    assert [type(block) for block in twin.model.layers] == [type(block) for block in layers]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())


def test_a_model_without_a_list_of_layers():
    model = tiny_models.tiny("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match=r"one list of 7 decoder layers.*none; use the method rtn"):
        decoder_layers(model)
    model.config.num_hidden_layers = 2
    model.other = nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2)])
    model.more = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])
    with pytest.raises(UnsupportedModelError, match=r"has 2 \(other, more\)"):
        decoder_layers(model)


def test_a_model_that_skips_layers():
    model = tiny_models.tiny("llama")
    inner = model.model.forward
    twin = shared_copy(model)
    object.__setattr__(twin.model, "layers_of_old", twin.model.layers)

    class Short(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.config, self.layers, self.embed = base.config, base.model.layers, base.model.embed_tokens

        def forward(self, input_ids, use_cache):
            return self.embed(input_ids)

    assert inner is not None
    with pytest.raises(UnsupportedModelError, match="does not run its 2 decoder layers one after another"):
        Walk(Short(twin), tokens())


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("model.embed_tokens.weight", "the embeddings"),
        ("model.layers.1.mlp.up_proj.weight", r"model\.layers\.1\.mlp\.down_proj"),
        ("model.layers.0.mlp.down_proj.weight", r"model\.layers\.0"),
    ],
)
def test_activations_that_are_nan(where, named):
    """The weights that are rounded are finite: what is NaN is found where it first shows."""
    model = tiny_models.tiny("llama", hidden_size=32, intermediate_size=64, head_dim=16)
    with torch.no_grad():
        model.get_parameter(where)[5] = float("inf") if "embed" not in where else float("nan")
    rules = [] if "embed" in where else [[where.removesuffix(".weight") + "$", None]]
    with pytest.raises(InputError, match=named):
        apply(model, {"default": "int4", "method": "gptq", "rules": rules}, tokens(40, 20))
