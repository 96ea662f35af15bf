"""The quantiser in transformers: rounding while weights are read, saving, reading again, placing, and bad files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored_models as made
import torch
from torch import nn
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM
from transformers.pytorch_utils import Conv1D

import specdec
from specdec.errors import InputError
from specdec.quant.format import parse
from specdec.quant.layers import linear_shape
from specdec.quant.linear import PackedLinear, named_packed, num_parameters, num_weight_bytes, stored_as
from specdec.quant.recipe import Recipe

read = AutoModelForCausalLM.from_pretrained
UP = "model.layers.0.mlp.up_proj.weight"
TOKENS = torch.tensor([made.PROMPT])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.saved(tmp_path_factory.mktemp("tied"), "llama-tied")


@pytest.fixture(scope="module")
def stored(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stored weights."""
    folder = tmp_path_factory.mktemp("stored")
    read(llama, quantization_config=specdec.MXConfig("mxfp6_e2m3")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", made.FORMATS)
def test_every_format_is_rounded_while_read_and_reloads_bit_equal(format: str, llama: Path, tmp_path: Path) -> None:
    model = read(llama, quantization_config=specdec.QuantConfig(format))
    plain = read(llama)
    for name, layer in named_packed(model).items():
        expected = parse(format).pack(plain.get_submodule(name).weight)
        assert layer.parts.keys() == expected.keys()
        assert all(torch.equal(layer.parts[part], expected[part]) for part in expected), name
    assert num_parameters(model) == num_parameters(plain)
    assert num_weight_bytes(model) < num_weight_bytes(plain) / 2
    assert stored_as(model) == format
    model.save_pretrained(tmp_path)
    again, report = read(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert made.same(model, again)
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    assert again.config.quantization_config.recipe == Recipe.of(format)


@pytest.mark.parametrize("format", ["mxfp6_e2m3", "int4", "sparse-60"])
def test_the_stored_weights_do_not_depend_on_the_dtype_of_the_model(format: str, llama: Path) -> None:
    models = [
        read(llama, quantization_config=specdec.QuantConfig(format), dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    ]
    first = named_packed(models[0])
    for model in models[1:]:
        assert model.model.norm.weight.dtype == model.dtype != torch.float32
        for name, layer in named_packed(model).items():
            assert all(torch.equal(layer.parts[part], first[name].parts[part]) for part in layer.parts), name


@pytest.mark.parametrize("name", ["gpt2", "phi", "gpt-neox", "gemma3", "mixtral"])
def test_other_architectures_compute_with_the_unpacked_weights(name: str, tmp_path: Path) -> None:
    """Transposed layers, biases, experts that stay as they are."""
    made.saved(tmp_path, name, dtype=torch.float64)
    options = {"dtype": torch.float64, **({"experts_implementation": "eager"} if name == "mixtral" else {})}
    model = read(tmp_path, quantization_config=specdec.MXConfig("mxint8"), **options)
    plain = read(tmp_path, **options)
    transposed = 0
    for layer, packed in named_packed(model).items():
        its = plain.get_submodule(layer)
        weight = packed.weight_in(torch.float64)
        transposed += isinstance(its, Conv1D)
        its.weight = nn.Parameter(weight.t().contiguous() if isinstance(its, Conv1D) else weight)
        assert (its.bias is None) == (packed.bias is None)
    assert transposed == (8 if name == "gpt2" else 0)
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-12, atol=1e-12)


def test_layers_that_only_derive_from_linear_ones(tmp_path: Path) -> None:
    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).topk(2)

    assert linear_shape(Router(64, 8)) is None
    assert linear_shape(nn.Linear(64, 8)) == (8, 64)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 64}
    falcon = FalconForCausalLM(FalconConfig(**shape, alibi=False, bias=True)).double().eval()
    falcon.save_pretrained(tmp_path)
    model = read(tmp_path, quantization_config=specdec.IntConfig("int4", head=None), dtype=torch.float64)
    assert len(named_packed(model)) == 4
    logits = model(TOKENS).logits
    torch.testing.assert_close(model.dequantize()(TOKENS).logits, logits, rtol=1e-12, atol=1e-12)


def test_a_tied_head_that_is_stored_gets_weights_of_its_own(tied: Path, tmp_path: Path) -> None:
    plain, model = read(tied), read(tied, quantization_config=specdec.MXConfig("mxfp4"))
    table = plain.get_input_embeddings().weight
    assert plain.lm_head.weight is table
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert torch.equal(model.lm_head.weight_in(torch.float32), parse("mxfp4").unpack(parse("mxfp4").pack(table)))
    assert model.config.tie_word_embeddings is False
    model.tie_weights()  # as others may call it
    model.save_pretrained(tmp_path)
    assert made.same(read(tmp_path), model)
    kept = read(tied, quantization_config=specdec.MXConfig("mxfp4", head=None))
    assert kept.lm_head.weight is kept.get_input_embeddings().weight


def test_a_tied_pair_is_found_under_either_name(tied: Path, tmp_path: Path) -> None:
    config = specdec.MXConfig("mxfp4")
    model = read(tied, quantization_config=config)
    table = "model.embed_tokens.weight"
    head_only = made.edited(tied, tmp_path / "head", lambda t: t.update({"lm_head.weight": t.pop(table)}))
    assert made.same(read(head_only, quantization_config=config), model)
    other = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    both = read(
        made.edited(tied, tmp_path / "both", lambda t: t.update({"lm_head.weight": other})), quantization_config=config
    )
    assert torch.equal(both.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert torch.equal(both.lm_head.parts["codes"], parse("mxfp4").pack(other)["codes"])


def test_shards_and_places(llama: Path, stored: Path, tmp_path: Path) -> None:
    model, config = read(stored), specdec.MXConfig("mxfp6_e2m3")
    model.save_pretrained(tmp_path / "shards", max_shard_size="16KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    spread = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    for place in ("auto", {"": "cpu"}):
        assert made.same(read(tmp_path / "shards", device_map=place), model)
        assert made.same(read(llama, device_map=place, quantization_config=config), model)
    for i, (folder, options) in enumerate(((stored, {}), (llama, {"quantization_config": config}))):
        off = tmp_path / f"off{i}"
        found = read(folder, device_map=spread, offload_folder=off, offload_buffers=True, **options)
        assert found.lm_head.weight_codes.is_meta
        assert torch.equal(found(TOKENS).logits, model(TOKENS).logits)
        found.save_pretrained(tmp_path / f"again{i}")
        assert made.same(read(tmp_path / f"again{i}"), model)


def test_what_a_stored_model_can_and_cannot_do(stored: Path, llama: Path) -> None:
    model = read(stored)
    assert model.hf_quantizer.is_serializable()
    assert not model.hf_quantizer.is_trainable
    int4 = read(llama, quantization_config=specdec.IntConfig("int4"), dtype=torch.float64)
    logits = int4(TOKENS).logits
    moved = int4.to(torch.bfloat16)
    assert moved.model.layers[0].mlp.up_proj.weight_scales.dtype == torch.bfloat16
    assert moved(TOKENS).logits.dtype == torch.bfloat16
    int8 = read(llama, quantization_config=specdec.IntConfig("int8")).to(torch.bfloat16)
    assert int8.lm_head.weight_scales.dtype == torch.float32
    plain = read(llama, quantization_config=specdec.IntConfig("int4"), dtype=torch.float64).dequantize()
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    torch.testing.assert_close(plain(TOKENS).logits, logits)
    assert getattr(plain.config, "quantization_config", None) is None


def _change(name: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: new(tensors[name])})


def _broken(value: int | float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_change(UP, _broken(float("nan"))), rf"{UP} cannot be stored as mxfp6_e2m3: 1 of \d+ weights are NaN"),
        (_change(UP, _broken(float("inf"))), f"{UP} cannot be stored"),
        (_change(UP, lambda t: t[:, :32].contiguous()), rf"{UP} in the files is \[128, 32\].*\[128, 64\]"),
        (lambda tensors: tensors.pop(UP), f"the files lack 1 weights.*{UP}"),
    ],
)
def test_weights_that_cannot_be_rounded(edit: Any, says: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read(made.edited(llama, tmp_path / "bad", edit), quantization_config=specdec.MXConfig("mxfp6_e2m3"))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda tensors: tensors.pop(f"{UP}_scales"), f"lack {UP}_scales"),
        (
            _change(f"{UP}_codes", lambda t: t[:, 1:].contiguous()),
            rf"{UP}_codes is torch.uint8 \[128, 47\].*\[128, 48\]",
        ),
        (_change(f"{UP}_codes", lambda t: t.view(torch.int8)), f"{UP}_codes is torch.int8"),
        (_change(f"{UP}_scales", _broken(255)), "layers.0.mlp.up_proj"),
        (lambda t: t.update({UP: torch.zeros(128, 64), f"{UP}_codes": t.pop(f"{UP}_codes")[:0]}), f"{UP}_codes"),
    ],
)
def test_tampered_files_are_refused_by_the_tensors_name(edit: Any, says: str, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read(made.edited(stored, tmp_path / "bad", edit))


@pytest.mark.parametrize("keep", [-100, 20])
def test_files_that_are_cut_off(keep: int, stored: Path, tmp_path: Path) -> None:
    bad = made.edited(stored, tmp_path / "bad", lambda tensors: None)
    content = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(InputError, match=r"model.safetensors is damaged or cut off"):
        read(bad)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda q: q["recipe"].update(default="mxfp3"), "did you mean 'mxfp4'"),
        (lambda q: q["recipe"].update(default="int8"), r"q_proj.weight_codes is torch.uint8.*torch.int8"),
        (lambda q: q["recipe"].update(rules=[["conv", "int8"]]), "'conv' matches none"),
        (lambda q: q.pop("recipe"), "has no recipe"),
        (lambda q: q.update(bits=4), "has bits, which is unknown"),
    ],
)
def test_configurations_that_are_wrong(edit: Any, says: str, stored: Path, tmp_path: Path) -> None:
    bad = made.configured(stored, tmp_path / "bad", lambda config: edit(config["quantization_config"]))
    with pytest.raises(InputError, match=says):
        read(bad)


def test_configurations_by_family(llama: Path) -> None:
    assert specdec.MXConfig().recipe == Recipe.of("mxfp6_e2m3")
    assert specdec.IntConfig("int4-g64", head="int8").recipe.head == "int8"
    assert specdec.SparseConfig("sparse-2x4").recipe == Recipe.of("sparse-2x4")
    config = specdec.QuantConfig("w4a16")
    assert specdec.QuantConfig.from_dict(config.to_dict()).recipe == config.recipe
    for make, wrong in ((specdec.MXConfig, "int8"), (specdec.IntConfig, "mxfp4"), (specdec.SparseConfig, "int4")):
        with pytest.raises(InputError, match="takes one of"):
            make(wrong)
    with pytest.raises(InputError, match=r"gptq looks at.*specdec quantize"):
        read(llama, quantization_config=specdec.IntConfig("int4", method="gptq"))
    with pytest.raises(InputError, match=r"q_proj.*cannot be stored"):
        read(llama, quantization_config=specdec.IntConfig("int4-g128"))


def test_naming_the_package_loads_nothing_heavy() -> None:
    code = "import sys, specdec; assert not {'torch', 'transformers'} & sys.modules.keys(); specdec.MXConfig"
    subprocess.run([sys.executable, "-c", code], check=True)
