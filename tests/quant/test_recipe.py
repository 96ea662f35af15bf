"""Recipes: what they choose, what they refuse, and that they survive the way to a file and back."""

from __future__ import annotations

import json
import re

import pytest
from tiny_models import tiny

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant import PackedLinear, parse
from specdec.quant.layers import candidates
from specdec.quant.recipe import Recipe, recipe_names

SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.mlp.down_proj": (64, 128),
    "model.layers.1.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.down_proj": (64, 128),
    "model.layers.2.mlp.down_proj": (64, 128),
    "lm_head": (256, 64),
}


def chosen(recipe, shapes=SHAPES, **options) -> dict[str, str]:
    return {name: format.name for name, format in Recipe.of(recipe).assign(shapes, **options).items()}


# ------------------------------------------------------------------ what is chosen


def test_a_format_is_a_recipe_for_every_linear_layer():
    assert chosen("mxfp6_e2m3") == dict.fromkeys(SHAPES, "mxfp6_e2m3")
    assert Recipe.of("INT4-G64").default == "int4-g64"


def test_pruning_spares_the_head():
    assert chosen("sparse-60") == dict.fromkeys(list(SHAPES)[:-1], "sparse-60")


def test_the_first_rule_that_is_found_counts():
    rules = [["layers.1.*q_proj", None], ["q_proj", "int8"], [r"1\.mlp", "mxfp4"]]
    assert chosen({"default": "int4", "rules": rules}) == {
        "model.layers.0.self_attn.q_proj": "int8",
        "model.layers.0.mlp.down_proj": "int4",
        "model.layers.1.mlp.down_proj": "mxfp4",
        "model.layers.2.mlp.down_proj": "int4",
        "lm_head": "int4",
    }


def test_the_head_has_an_entry_of_its_own_and_rules_go_before_it():
    assert chosen({"default": "int4", "head": "int8"})["lm_head"] == "int8"
    assert "lm_head" not in chosen({"default": "int4", "head": None})
    assert chosen({"default": "int4", "head": "int8", "rules": [["head", "mxfp4"]]})["lm_head"] == "mxfp4"
    assert chosen({"head": "int8"}) == {"lm_head": "int8"}
    renamed = {"body": (32, 32), "score": (32, 32)}
    assert chosen({"default": "int4", "head": "int8"}, renamed, head="score") == {"body": "int4", "score": "int8"}


def test_w4a16_keeps_eight_bits_where_errors_cost_most():
    found = chosen("w4a16")
    assert found["lm_head"] == found["model.layers.0.mlp.down_proj"] == found["model.layers.1.self_attn.q_proj"]
    assert found["lm_head"] == "mxint8"  # 16-bit activations: int8 would round them
    assert found["model.layers.2.mlp.down_proj"] == "int4"
    assert chosen("w4a16-down8")["model.layers.2.mlp.down_proj"] == "mxint8"
    assert chosen("w4a16-head8") == {**dict.fromkeys(SHAPES, "int4"), "lm_head": "mxint8"}


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gpt-neox", "phi", "qwen3"])
@pytest.mark.parametrize("recipe", ["mx6", "w4a16"])
def test_embeddings_and_norms_are_never_touched(architecture, recipe):
    sizes = {"n_embd": 32} if architecture == "gpt2" else {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    model = tiny(architecture, **sizes)
    found = candidates(model)
    assert set(Recipe.of(recipe).assign(found)) == set(found.shapes)
    linear = {name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
    assert set(found.shapes) == linear
    assert found.tied == (architecture in ("llama-tied", "gpt2"))
    assert found.head == "lm_head"


def test_shapes_are_outputs_by_inputs_whichever_way_the_layer_stores_them():
    assert candidates(tiny("gpt2")).shapes["transformer.h.0.mlp.c_fc"] == (64, 16)
    assert candidates(tiny("llama")).shapes["model.layers.0.mlp.up_proj"] == (24, 16)


def test_fallback_is_for_layers_that_do_not_fit():
    shapes = {"wide": (8, 64), "odd": (8, 48)}
    assert chosen({"default": "mxfp4", "fallback": "keep"}, shapes) == {"wide": "mxfp4"}
    assert chosen({"default": "mxfp4", "fallback": "int8"}, shapes) == {"wide": "mxfp4", "odd": "int8"}
    with pytest.raises(InputError, match=r"odd \[8, 48\] cannot be stored as int4-g64.*rule of its own"):
        chosen({"default": "mxfp4", "fallback": "int4-g64"}, shapes)


# ------------------------------------------------------------------ to a file and back


@pytest.mark.parametrize(
    "recipe",
    [
        *recipe_names(),
        "sparse-2x4",
        {"default": "int4", "rules": [["a", None]], "method": "gptq", "options": {"damping": 0.1}, "fallback": "keep"},
    ],
)
def test_recipes_come_back_equal(recipe, tmp_path):
    made = Recipe.of(recipe)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(made.to_dict()))
    again = Recipe.of(file)
    assert again == made == Recipe.of(str(file)) == Recipe.of(made.to_dict()) == Recipe.of(made)
    assert hash(again) == hash(made)
    assert again.to_dict() == made.to_dict()


def test_a_name_is_no_part_of_what_a_recipe_is():
    assert Recipe.of("mx6") == Recipe.of("mxfp6_e2m3") != Recipe.of("mxfp6_e3m2")
    assert Recipe.of("mx6").name == "mx6"


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("w4a61", "did you mean 'w4a16'"),
        ("mxfp7_e2m3", "did you mean 'mxfp6_e2m3'"),
        ("int4-g48", "int4-g48"),
        ("nowhere/recipe.json", "cannot read the recipe"),
        (7, "not int"),
        ({"defualt": "int4"}, "did you mean 'default'"),
        ({"default": "int4", "version": 2}, "version 2"),
        ({"default": "itn4"}, "did you mean 'int4'"),
        ({"default": 4}, "found 4"),
        ({"default": "int4", "head": ["int8"]}, "found \\['int8'\\]"),
        ({"default": "int4", "rules": {"a": "int8"}}, "rules are a list"),
        ({"default": "int4", "rules": "ab"}, "rules are a list"),
        ({"default": "int4", "rules": ["ab"]}, "a rule is"),
        ({"default": "int4", "rules": [["a", "int8", 1]]}, "a rule is"),
        ({"default": "int4", "rules": [["(a", "int8"]]}, r"'\(a' is not a regular expression"),
        ({"default": "int4", "fallback": "drop"}, "'drop'"),
        ({"default": "int4", "fallback": None}, "'fallback' is a str"),
        ({"default": "int4", "optional": "yes"}, "'optional' is a bool"),
        ({"default": "int4", "method": None}, "'method' is a str"),
        ({"default": "int4", "options": [1]}, "options are a dictionary"),
        ({"default": "int4", "options": {"a": {1}}}, "writable as JSON"),
        ({}, "keeps every layer"),
        ({"rules": [["a", None]], "head": None}, "keeps every layer"),
    ],
)
def test_bad_recipes(recipe, words):
    with pytest.raises(InputError, match=words):
        Recipe.of(recipe)


def test_bad_files(tmp_path):
    file = tmp_path / "recipe.json"
    for content, words in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"default": "int5"}', "int5")):
        file.write_text(content)
        with pytest.raises(InputError, match=words):
            Recipe.of(file)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"default": "int4", "rules": [["up_proj", "int8"]]}, "'up_proj' matches none of 6 linear layers"),
        ({"default": "int4", "rules": [["proj", "int8"], ["q_proj", None]]}, "'q_proj' is never reached"),
        ({"rules": [["q_proj", None], ["down", None], ["x", "int4"]], "optional": True}, "none of 6 linear layers"),
        ("int4-g128", r"model.layers.0.self_attn.q_proj \[64, 64\] cannot be stored as int4-g128"),
    ],
)
def test_recipes_that_do_not_fit_the_model(recipe, words):
    with pytest.raises(InputError, match=words):
        Recipe.of(recipe).assign(SHAPES)


def test_rules_of_named_recipes_may_match_nothing():
    assert chosen("w4a16", {"proj_in": (32, 32)}) == {"proj_in": "int4"}
    with pytest.raises(InputError, match="no linear layers"):
        Recipe.of("w4a16").assign({})


def test_a_quantised_model_is_no_candidate():
    model = tiny("llama", hidden_size=32)
    layer = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = PackedLinear.of(layer.weight, None, parse("int8"))
    with pytest.raises(UnsupportedModelError, match=re.escape("model.layers.0.self_attn.q_proj is quantised already")):
        candidates(model)
    with pytest.raises(UnsupportedModelError, match="no linear layers"):
        candidates(model.model.embed_tokens)
