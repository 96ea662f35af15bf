"""A recipe's method on whole models: the contract of what it returns, and that it helps where it should."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import tiny_models
import torch

from specdec.errors import InputError, UnsupportedModelError
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.quant import PackedLinear, named_packed, parse
from specdec.quant.methods import Method, apply, calibration, create, method_names, prepare_model, register_method
from specdec.quant.methods.gptq import quantise

CASES = [
    ("rtn", "int4", {}),
    ("rtn", "mxfp6_e2m3", {}),
    ("awq", "int4", {"grid": 4}),
    ("awq", "mxfp4", {"grid": 2, "rounding": "gptq"}),
    ("awq", "sparse-60", {"grid": 2}),
    ("gptq", "int4-g64-asym", {}),
    ("gptq", "mxint8", {"act_order": True}),
    ("smoothquant", "int8", {}),
    ("wanda", "sparse-60", {}),
]


def wide(name: str = "qwen2", **changes: object) -> torch.nn.Module:
    """Of sizes that every format takes; qwen2 has biases."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    return tiny_models.tiny(name, dtype=torch.float32, **{**shape, **changes})


def tokens(rows: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(tiny_models.VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens(), use_cache=False).logits


def recipe(method: str, format: str, options: dict, **more: object) -> dict:
    return {"default": format, "method": method, "options": options, **more}


def installed(model: torch.nn.Module, prepared) -> torch.nn.Module:
    """What a writer and a loader do with the result: parts in place of layers, changed tensors in place of the old."""
    twin = copy.deepcopy(model)
    state = twin.state_dict()
    for name, tensor in prepared.changed.items():
        assert state[name].shape == tensor.shape
        assert state[name].dtype == tensor.dtype
        state[name].copy_(tensor)
    for name, parts in prepared.parts.items():
        layer = twin.get_submodule(name)
        N, K = layer.weight.shape
        twin.set_submodule(name, PackedLinear(prepared.formats[name], K, N, layer.bias, parts))
    return twin


@pytest.mark.parametrize(("method", "format", "options"), CASES)
@pytest.mark.parametrize("name", ["qwen2", "llama-tied"])
def test_the_result_is_the_model(name, method, format, options):
    """Parts and changed tensors, and nothing else, make the model that `prepare_model` makes; the original stays."""
    model = wide(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    rules = [["lm_head$", None]] if name == "llama-tied" and method == "smoothquant" else []
    what = recipe(method, format, options, rules=rules)
    prepared = apply(model, what, tokens())
    twin = prepare_model(model, what, tokens())
    assert set(named_packed(twin)) == set(prepared.parts) == set(prepared.formats)
    assert len(prepared.parts) == 14 + (not rules)
    assert torch.equal(logits(installed(model, prepared)), logits(twin))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert bool(prepared.changed) == (method in ("awq", "smoothquant"))
    assert not any(key.endswith("proj.weight") for key in prepared.changed)


@pytest.mark.parametrize("format", ["int4", "int8", "mxfp4", "sparse-60"])
def test_rtn_is_what_the_format_does(format):
    model = wide()
    prepared = apply(model, format)
    for name, parts in prepared.parts.items():
        wanted = parse(format).pack(model.get_submodule(name).weight)
        assert all(torch.equal(parts[part], wanted[part]) for part in wanted), name


def drift(model: torch.nn.Module, exact: torch.Tensor) -> float:
    return float((logits(model) - exact).square().mean())


@pytest.mark.parametrize(
    ("method", "format"), [("gptq", "int4"), ("gptq", "mxfp4"), ("awq", "int4"), ("wanda", "sparse-60")]
)
def test_methods_that_look_at_activations_do_better(method, format):
    """Activations with a few large channels, as real models have; judged on the text that was looked at."""
    model = wide("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[3, 30]] *= 12
            layer.post_attention_layernorm.weight[[7, 50]] *= 12
    exact = logits(model)
    plain = drift(prepare_model(model, recipe("rtn", format, {})), exact)
    assert drift(prepare_model(model, recipe(method, format, {}), tokens()), exact) < 0.8 * plain


def test_smoothquant_keeps_more_of_a_model_with_outliers():
    model = wide("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[[3, 30]] *= 60
            layer.self_attn.q_proj.weight[:, [3, 30]] /= 60
            layer.self_attn.k_proj.weight[:, [3, 30]] /= 60
            layer.self_attn.v_proj.weight[:, [3, 30]] /= 60
    exact = logits(model)
    plain = drift(prepare_model(model, "int8"), exact)
    assert drift(prepare_model(model, recipe("smoothquant", "int8", {}), tokens()), exact) < 0.7 * plain


def test_blocks_see_what_quantised_blocks_give():
    """The second block's Hessian is that of inputs behind the quantised first block."""
    model, what = wide("llama"), recipe("gptq", "int4", {}, rules=[["layers.0", "mxfp4"]])
    rough = prepare_model(model, recipe("gptq", "mxfp4", {}, rules=[["layers.1|lm_head", None]]), tokens())
    name = "model.layers.1.mlp.up_proj"
    by_hand = _by_hand(rough, model, name)

    def differing(recipe: dict) -> float:
        return float((apply(model, recipe, tokens()).parts[name]["codes"] != by_hand).float().mean())

    assert differing(what) < 0.01, "sums in another order may round a few otherwise"
    untouched = recipe("gptq", "int4", {}, rules=[["layers.0", None]])
    assert differing(untouched) > 0.05


def _by_hand(rough: torch.nn.Module, model: torch.nn.Module, name: str) -> torch.Tensor:
    """GPTQ of a layer of `model` on what the layer of `rough` is given."""
    seen: list[torch.Tensor] = []
    hook = rough.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0][0].clone()))
    with torch.inference_mode():
        for row in tokens():
            rough(input_ids=row[None], use_cache=False)
    hook.remove()
    hessian = sum(x.t() @ x for x in seen) * (2 / sum(map(len, seen)))
    return quantise(model.get_submodule(name).weight.detach(), hessian, parse("int4"))["codes"]


def test_progress_is_told():
    told: list[tuple[int, int, str]] = []
    apply(wide(), recipe("gptq", "int4", {}), tokens(), progress=lambda *now: told.append(now))
    assert [done for done, _, _ in told[1:]] == [0, 1, 2, 3]
    assert [what for _, _, what in told[1:]] == ["model.layers.0", "model.layers.1", "lm_head", ""]
    assert {of for _, of, _ in told[1:]} == {3}


@dataclass(frozen=True)
class Halved(Method):
    """A method of somebody else's."""

    share: float = 0.5

    def round(self, weight_NK, format, stats):
        return format.pack(weight_NK * self.share)


def test_a_method_from_elsewhere():
    register_method("testhalved", Halved)
    assert "testhalved" in method_names()
    model = wide("llama")
    found = apply(model, recipe("testhalved", "int8", {"share": 0.25}))
    name = "model.layers.0.mlp.up_proj"
    wanted = parse("int8").pack(model.get_submodule(name).weight * 0.25)
    assert torch.equal(found.parts[name]["scales"], wanted["scales"])
    with pytest.raises(InputError, match="method 'rtn' already"):
        register_method("rtn", Halved)
    with pytest.raises(InputError, match="is no dataclass"):
        register_method("testplain", type("Plain", (), {}))


def test_bad_input():
    model = wide("llama")
    with pytest.raises(InputError, match=r"no method is called 'gtpq'; did you mean 'gptq'"):
        apply(model, recipe("gtpq", "int4", {}), tokens())
    with pytest.raises(InputError, match=r"sparse-60 has none \(model\.layers\.0\.self_attn\.q_proj\)"):
        apply(model, recipe("gptq", "sparse-60", {}), tokens())
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj cannot be stored as int4"):
        apply(model, "int4")
    with pytest.raises(UnsupportedModelError, match="is quantised already"):
        apply(prepare_model(wide(), "int8"), "int4")
    strange = wide()
    strange.config.num_hidden_layers = 5
    with pytest.raises(UnsupportedModelError, match="one list of 5 decoder layers"):
        apply(strange, recipe("awq", "int4", {}), tokens())
    assert create("gptq") == create("gptq", {"damping": 0.01})


def test_four_bits_on_the_embedded_target():
    """GPTQ loses less of the target's own predictions than rounding to nearest, on text that it was not shown."""
    model, tokenizer = load_model(EMBEDDED / "target", device="cpu"), load_tokenizer(EMBEDDED / "target")
    model.model.layers = model.model.layers[:4]  # for time: of full depth in experiments/quantised
    model.config.num_hidden_layers = 4
    text = calibration.tokens("stdlib", model, tokenizer, rows=24, length=96)
    shown, kept = text[:16], text[16:]
    with torch.inference_mode():
        exact = model(input_ids=kept).logits.log_softmax(-1)
        divergence = {}
        for method in ("rtn", "gptq"):
            twin = prepare_model(model, recipe(method, "int4-g128", {}, head=None), shown)
            other = twin(input_ids=kept).logits.log_softmax(-1)
            divergence[method] = float((exact.exp() * (exact - other)).sum(-1).mean())
    assert divergence["gptq"] < 0.9 * divergence["rtn"]
