"""Recipes of ExecuTorch artefacts: names, what becomes of which layer, and artefacts that say what was rounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec import cli
from specdec.errors import InputError
from specdec.export import recipes
from specdec.export.evaluate import LOGITS, outputs
from specdec.export.executorch import ExecutorchOptions
from specdec.policy import Fixed
from specdec.quant import PackedLinear
from specdec.quant.methods import prepare_model

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'specdec[executorch]'")


# Names.


@pytest.mark.parametrize(
    ("given", "name"),
    [("int8", "int8"), ("8da8w", "int8"), ("W8A8", "int8"), ("8da4w", "w4a8"), ("w4a8-head8-gptq", "w4a8-head8-gptq")],
)
def test_names_of_others_mean_the_same_artefact(given: str, name: str) -> None:
    options = ExecutorchOptions(recipe=given)
    assert options == ExecutorchOptions(recipe=name)
    assert ExecutorchOptions.of(json.loads(json.dumps(options.as_dict()))) == options
    assert options != ExecutorchOptions()


def test_an_unknown_recipe_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"'w4a8-head'; did you mean 'w4a8-head8'.* int8, int8-smoothquant, w4a8, "):
        ExecutorchOptions(recipe="w4a8-head")
    with pytest.raises(InputError, match="rounds activations to 8, not 16; take w4a8 or int8"):
        ExecutorchOptions(recipe="w4a16")
    with pytest.raises(InputError, match="recipes are for the delegate xnnpack, and portable is given"):
        ExecutorchOptions(recipe="int8", delegate="portable")
    assert cli.main(["export", "--recipe", "mxfp4"]) == 2
    assert "no recipe of the executorch backend is called 'mxfp4'" in capsys.readouterr().err


def test_a_recipe_of_ones_own_is_its_content(tmp_path: Path) -> None:
    content = {"default": "int4-g64", "head": "int8", "rules": [["down_proj", None]], "method": "gptq"}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    options = ExecutorchOptions(recipe=str(path))
    assert options == ExecutorchOptions(recipe=json.dumps(content))
    assert "mine" not in json.dumps(options.as_dict())  # no path of this machine
    recipe = recipes.recipe_of(str(options.recipe))
    assert (recipe.default, recipe.head, recipe.rules) == ("int4-g64-pos-a8", "int8", (("down_proj", None),))
    assert recipes.needs_text(str(options.recipe))
    for bad, message in (
        ({"default": "mxfp4"}, "XNNPACK has no mxfp4 weights"),
        ({"default": "int4-asym"}, "XNNPACK has no int4-asym weights"),
        ({"default": "int8", "method": "nearest"}, "no method is called 'nearest'"),
    ):
        with pytest.raises(InputError, match=message):
            ExecutorchOptions(recipe=json.dumps(bad))
    with pytest.raises(InputError, match="is not JSON"):
        ExecutorchOptions(recipe="{int8")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_methods_that_look_at_activations_ask_for_text(name: str) -> None:
    method = name.rpartition("-")[2]
    assert recipes.needs_text(name) == (method in ("gptq", "awq", "smoothquant"))
    assert recipes.recipe_of(name).method == (method if recipes.needs_text(name) else "rtn")


# What is rounded.


def weights_of(model: Any) -> dict[str, Any]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def test_torchao_multiplies_with_the_weights_of_specdec_quant() -> None:
    needs_torchao()
    model = tiny_artifacts.whole()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = recipes.quantise(model, "w4a8-head8")
    packed = prepare_model(model, recipes.recipe_of("w4a8-head8"))
    found = weights_of(stored.model)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(found[name].dequantize(), layer.weight_in(torch.float32), rtol=0, atol=0)
    assert stored.facts["layers"] == {"int4": 7, "int8": 1}
    assert stored.num_bytes < 0.6 * sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rows_of_activations_are_rounded_each_by_itself() -> None:
    """To 256 steps between its least and its largest number, zero among them."""
    needs_torchao()
    torch.manual_seed(0)
    layer = PackedLinear.of(torch.randn(24, 64), None, recipes.recipe_of("int8").assign({"x": (24, 64)})["x"])
    rounded = recipes.in_torchao(layer)
    x = torch.randn(5, 64)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    scale = (high - low) / 255
    zero = -128 - (low / scale).round()
    expected = (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale
    torch.testing.assert_close(rounded(x), expected @ layer.weight_in(torch.float32).T, rtol=1e-4, atol=1e-4)
    loud = torch.cat((x, 1000 * x[:1]))  # one scale for all rows would leave nothing of the others
    torch.testing.assert_close(rounded(loud)[:5], rounded(x), rtol=1e-5, atol=1e-5)


def test_early_layers_and_the_head_keep_eight_bits() -> None:
    needs_torchao()
    model = tiny_models.tiny(
        "llama", dtype=torch.float32, num_hidden_layers=3, hidden_size=64, intermediate_size=96, head_dim=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    stored = recipes.quantise(model, "w4a8-early8")
    bits = {name: weight.target_dtype for name, weight in weights_of(stored.model).items()}
    assert {n for n, kind in bits.items() if kind == torch.int4} == {n for n in bits if ".layers.2." in n}
    assert bits["lm_head"] == torch.int8
    assert stored.model.get_input_embeddings().weight is not stored.model.lm_head.weight  # the head is stored apart
    assert stored.model.get_input_embeddings().weight.dtype == torch.float32


def test_the_same_text_gives_the_same_weights() -> None:
    needs_torchao()
    model = tiny_artifacts.whole()
    text_BT = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    one, again = (recipes.quantise(model, "w4a8-gptq", text_BT).facts for _ in range(2))
    other = recipes.quantise(model, "w4a8-gptq", text_BT.flip(0) + 1).facts
    assert one == again
    assert one["sha256"] != other["sha256"]
    assert one["calibration"] != other["calibration"]
    plain = recipes.quantise(model, "w4a8").facts
    assert plain == recipes.quantise(model, "w4a8", text_BT).facts  # which has no use for it
    assert plain["calibration"] is None
    with pytest.raises(InputError, match="the method gptq looks at the model's activations and needs calibration text"):
        recipes.quantise(model, "w4a8-gptq")
    smooth = recipes.quantise(model, "int8-smoothquant", text_BT).facts
    assert smooth["sha256"] != recipes.quantise(model, "int8").facts["sha256"]


def test_a_shape_that_does_not_fit_is_named() -> None:
    needs_torchao()
    with pytest.raises(InputError, match=r"q_proj \[16, 16\] cannot be stored as int4-pos-a8: .* groups of 32 inputs"):
        recipes.quantise(tiny_models.tiny("llama", dtype=torch.float32), "w4a8")


# The artefact.


@pytest.fixture(scope="module")
def artifact() -> Any:
    tiny_artifacts.needs("executorch")
    from specdec.export.artifact import ArtifactModel

    return ArtifactModel.open(tiny_artifacts.rounded())


@pytest.fixture(scope="module")
def decoder(artifact: Any) -> specdec.SpeculativeDecoder:
    draft = ModelDrafter(tiny_artifacts.whole(), backend="eager")  # in full precision
    return specdec.SpeculativeDecoder(artifact, drafter=draft, policy=Fixed(3))


@pytest.fixture(scope="module")
def rounded() -> specdec.SpeculativeDecoder:
    model = recipes.quantise(tiny_artifacts.whole(), "w4a8-head8").model
    return specdec.SpeculativeDecoder(model, backend="eager")


def test_logits_are_those_of_the_rounded_model(
    decoder: specdec.SpeculativeDecoder, rounded: specdec.SpeculativeDecoder
) -> None:
    tokens = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    found = outputs(decoder.backend, tokens, 4, hidden=(1,))
    expected = outputs(rounded.backend, tokens, len(tokens), hidden=(1,))
    full = outputs(specdec.SpeculativeDecoder(tiny_artifacts.whole(), backend="eager").backend, tokens, len(tokens))
    largest = expected[LOGITS].abs().max()
    for name in (LOGITS, "hidden state 1"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0.02 * float(largest))
    near = (found[LOGITS] - expected[LOGITS]).square().mean()
    assert near < 0.01 * (full[LOGITS] - expected[LOGITS]).square().mean()  # full precision is another model


def test_speculative_texts_are_the_plain_ones(decoder: specdec.SpeculativeDecoder) -> None:
    accepted = proposed = 0
    for drafter in (decoder.drafter, NgramDrafter()):
        for options in ({}, {"temperature": 1.0, "seed": 5}):
            plain = decoder.generate_plain(PROMPT, max_new_tokens=40, **options)
            for policy in (Fixed(1), Fixed(3), *((Fixed(2, (2, 2)),) if drafter.trees else ())):
                made = decoder.generate(
                    PROMPT, max_new_tokens=40, strict=True, drafter=drafter, policy=policy, **options
                )
                assert made.tokens == plain.tokens, (drafter.name, policy.name)
                accepted += made.stats.num_accepted_draft_tokens
                proposed += made.stats.num_draft_tokens
    assert 0 < accepted < proposed


def test_the_manifest_tells_what_was_rounded(artifact: Any) -> None:
    manifest = artifact.manifest
    assert manifest.options == tiny_artifacts.ROUNDED
    assert manifest.model["stored"]["layers"] == {"int4": 7, "int8": 1}
    assert manifest.model["stored"] == recipes.quantise(tiny_artifacts.whole(), "w4a8-head8").facts
    sizes = manifest.about["sizes"]
    assert sizes["stored_bytes"] < 0.6 * sizes["weight_bytes"]
    assert sizes["program_bytes"] < sizes["weight_bytes"]
    assert all(found["delegates"] > 0 for found in manifest.about["coverage"].values())
