"""Folding scales changes no output, and what would change it is found out."""

from __future__ import annotations

import exact_format  # noqa: F401  (registers its format and method)
import pytest
import tiny_models
import torch
import transformers as tf

from specdec.quant import named_packed
from specdec.quant.layers import weight_of
from specdec.quant.methods import Run, apply, prepare_model
from specdec.quant.methods.folding import LINEAR, Anatomy, Fold
from specdec.quant.methods.walk import Walk
from specdec.runtime.copies import shared_copy

RECIPE = {"default": "testexact", "method": "testchance"}
NORMS = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
LINEARS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}


def tokens(rows: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(), use_cache=False).logits


def opt() -> torch.nn.Module:
    """Its MLP has a ReLU, through which positive scales pass."""
    config = tf.OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.5, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return tiny_models.finish(tf.OPTForCausalLM(config))


def bitnet() -> torch.nn.Module:
    """It has norms between attention and the output projection, and within the MLP."""
    torch.manual_seed(0)
    return tiny_models.finish(tf.BitNetForCausalLM(tiny_models._config(tf.BitNetConfig)))


def made(name: str) -> torch.nn.Module:
    return {"opt": opt, "bitnet": bitnet}.get(name, lambda: tiny_models.tiny(name, attention="eager"))()


def folds(model: torch.nn.Module) -> dict[str, str]:
    """What the scales of each group of the first block go into; by the group's first layer."""
    walk = Walk(shared_copy(model).eval(), tokens())
    anatomy = Anatomy.of(walk.blocks[0], walk.hidden[0], walk.calls[0][0])
    groups = anatomy.find_folds(Run(model, RECIPE, tokens())._head_width(), lambda group, fold: None)
    return {group.layers[0]: group.fold.producer if group.fold else group.reason for group in groups}


@pytest.mark.parametrize("name", [*tiny_models.ARCHITECTURES, "opt", "bitnet"])
def test_the_output_is_unchanged(name):
    model = made(name)
    before = logits(model)
    twin = prepare_model(model, RECIPE, tokens())
    after = logits(twin)
    # Gemma's norms compute in float32, whatever the model's dtype.
    limit = 1e-5 if name.startswith("gemma") else 1e-12
    assert (after - before).abs().max() <= limit * before.abs().max()
    scaled = [
        name
        for name, layer in named_packed(twin).items()
        if not torch.equal(layer.weight_in(torch.float64), weight_of(model.get_submodule(name)))
    ]
    assert scaled, "nothing was scaled"
    assert torch.equal(logits(model), before), "the model itself was changed"


@pytest.mark.parametrize("name", ["llama", "llama-mqa", "llama-mha", "qwen2", "qwen3", "mistral"])
def test_all_four_inputs_of_a_block_take_scales(name):
    """v feeds o across grouped heads too, where several query heads share a channel."""
    assert folds(made(name)) == {**NORMS, **LINEARS}
    prepared = apply(made(name), RECIPE, tokens())
    assert not prepared.notes
    norms = {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
    assert norms <= set(prepared.changed)


def test_norms_that_add_one_to_their_weight():
    found = folds(made("gemma2"))
    assert found["self_attn.q_proj"] == "input_layernorm"
    assert found["mlp.gate_proj"] == "pre_feedforward_layernorm"
    prepared = apply(made("gemma2"), RECIPE, tokens())
    old = made("gemma2").state_dict()["model.layers.0.input_layernorm.weight"]
    new = prepared.changed["model.layers.0.input_layernorm.weight"]
    ratio = (1 + old) / (1 + new)
    assert ratio.min() >= 0.25 - 1e-9
    assert ratio.max() <= 4 + 1e-9
    assert ratio.std() > 0.1


def test_folds_are_found_by_what_modules_do():
    assert folds(opt())["fc2"] == "fc1", "a ReLU lets positive scales through"
    assert "no norm or linear layer" in folds(made("gpt-neox"))["mlp.dense_4h_to_h"], "a GELU does not"
    found = folds(bitnet())
    assert found["self_attn.o_proj"] == "self_attn.attn_sub_norm"
    assert found["mlp.down_proj"] == "mlp.ffn_sub_norm"


@pytest.mark.parametrize("producer", ["self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "self_attn.v_proj"])
def test_a_wrong_fold_is_refused(producer):
    model = made("llama-mha")
    walk = Walk(shared_copy(model).eval(), tokens())
    anatomy = Anatomy.of(walk.blocks[0], walk.hidden[0], walk.calls[0][0])
    plain = anatomy.output()
    group = next(
        g for g in anatomy.groups() if g.layers[0] == ("mlp.down_proj" if "mlp" in producer else "self_attn.o_proj")
    )
    width = 24 if "mlp" in producer else 16
    right = producer == "self_attn.v_proj"
    assert anatomy.is_exact(group, Fold(producer, LINEAR, torch.arange(width)), plain) == right
    if right:
        assert not anatomy.is_exact(group, Fold(producer, LINEAR, torch.arange(width).roll(1)), plain)


def test_nothing_is_scaled_that_a_kept_layer_reads():
    """The kept layer would have to change, or the layer that takes up the scales."""
    model = made("llama")
    rules = [["k_proj$", None], ["up_proj$", None]]
    prepared = apply(model, {**RECIPE, "rules": rules}, tokens())
    assert not any("layernorm" in name for name in prepared.changed)
    assert any("k_proj reads the same input" in note for note in prepared.notes)
    assert any("up_proj, which would take up the scales" in note for note in prepared.notes)
    twin = prepare_model(model, {**RECIPE, "rules": rules}, tokens())
    assert (logits(twin) - logits(model)).abs().max() <= 1e-12 * logits(model).abs().max()


def test_a_norm_in_bfloat16_takes_scales_that_it_can_hold():
    """The norm's weight is rounded first, and the layers behind it take up exactly what it lost."""
    model = made("llama").to(torch.bfloat16)
    prepared = apply(model, {**RECIPE, "options": {"only": "norm"}}, tokens())
    name = "model.layers.1.input_layernorm.weight"
    old, new = model.state_dict()[name].double(), prepared.changed[name]
    assert new.dtype == torch.bfloat16
    assert not torch.equal(old, new.double())
    stored = prepared.parts["model.layers.1.self_attn.k_proj"]["codes"]
    weight = model.state_dict()["model.layers.1.self_attn.k_proj.weight"].double()
    torch.testing.assert_close(stored * new.double(), weight * old, rtol=1e-6, atol=1e-9)
