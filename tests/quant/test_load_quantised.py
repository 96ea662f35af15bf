"""Decoding on stored weights: the same tokens with and without a draft, loading by name, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import stored_models as made
import tiny_models
import torch

import specdec
from specdec.cli import main
from specdec.errors import InputError, UnsupportedModelError
from specdec.kernels import ops, packed
from specdec.loading import load_model
from specdec.policy import Fixed
from specdec.quant.format import parse
from specdec.quant.hf import empty_model
from specdec.quant.linear import named_packed, stored_as
from specdec.quant.methods import prepare_model
from specdec.runtime import graph
from specdec.runtime.backends.compiled import CompiledBackend
from specdec.runtime.native import NativeModel
from specdec.vocabulary import output_size

PROMPTS = [made.PROMPT, [9, 1, 4, 9, 1, 4, 9], [2]]
native = pytest.mark.skipif(not ops.available(), reason="no native kernels here")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.saved(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stored(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    load_model(llama, quantize="mxfp4", device="cpu").save_pretrained(folder)
    return folder


def _decoders(folder: Path, format: str, backend: str, dtype: str) -> Iterator[specdec.SpeculativeDecoder]:
    options: dict[str, Any] = {"dtype": dtype, "backend": backend, "quantize": format, "policy": Fixed(3)}
    smaller = "mxfp4" if not format.startswith("mxfp4") else {"default": "mxfp4", "rules": [["up_proj", "sparse-90"]]}
    yield specdec.load(folder, "ngram", **options)
    yield specdec.load(folder, str(folder), draft_quantize="int4", **options)
    yield specdec.load(folder, "self_quant", drafter_options={"scheme": smaller}, **options)


@pytest.mark.parametrize("format", made.FORMATS)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", "float64"), pytest.param("compiled", "float32", marks=native)]
)
def test_the_same_tokens_with_every_draft_alone_and_together(
    format: str, backend: str, dtype: str, llama: Path
) -> None:
    if backend == "compiled" and not packed.invariant(torch.device("cpu"), parse(format)):
        pytest.skip(f"no kernel for {format}")
    accepted = 0
    for decoder in _decoders(llama, format, backend, dtype):
        assert stored_as(decoder.target) == format
        options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.7, "seed": 5, "strict": True}
        plain = [decoder.generate_plain(prompt, **options).tokens for prompt in PROMPTS]
        alone = [decoder.generate(prompt, **options) for prompt in PROMPTS]
        assert [out.tokens for out in alone] == plain
        assert [out.tokens for out in decoder.generate(PROMPTS, **options)] == plain
        accepted += sum(out.stats.num_accepted_draft_tokens for out in alone)
        if backend == "compiled":
            assert decoder.backend.numerics == "invariant"
    assert accepted


@native
@pytest.mark.parametrize("format", made.FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_rows_keep_their_bits_on_the_native_kernels(format: str, dtype: str, llama: Path) -> None:
    model = load_model(llama, dtype=dtype, quantize=format, device="cpu")
    shared = NativeModel(model)
    mine, its = named_packed(shared.model), named_packed(model)
    assert all(mine[name].parts[p].data_ptr() == its[name].parts[p].data_ptr() for name in its for p in its[name].parts)
    invariant = packed.invariant(torch.device("cpu"), parse(format))
    assert shared.stock == ([] if invariant else ["PackedLinear"])
    if not invariant:
        pytest.skip(f"no kernel for {format}")
    wide = tiny_models.session(model, backend="compiled")
    wide.append(made.PROMPT)
    together = wide.forward().logits
    one_by_one = tiny_models.session(model, backend="compiled")
    for token in made.PROMPT:
        one_by_one.append([token])
        last = one_by_one.forward().logits
    assert torch.equal(together[-1], last[-1])


def test_a_compiled_graph_is_found_again_by_a_process_without_the_weights(stored: Path) -> None:
    model = load_model(stored, device="cpu")
    config = type(model.config).from_dict(json.loads(json.dumps(model.config.to_dict(), default=str)))
    empty = empty_model(type(model), config, torch.float32)
    assert {name: t.shape for name, t in empty.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    if ops.available():
        assert graph.fingerprint(NativeModel(empty)) == graph.fingerprint(NativeModel(model))
        plain = type(model)(type(model.config)(**{**config.to_dict(), "quantization_config": None}))
        assert graph.fingerprint(NativeModel(plain)) != graph.fingerprint(NativeModel(model))


def test_names_recipes_and_folders(llama: Path, stored: Path, tmp_path: Path) -> None:
    recipe = {"default": "int4", "head": "mxint8", "rules": [["q_proj", None]]}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for given in (recipe, str(tmp_path / "recipe.json")):
        layers = named_packed(specdec.load(llama, quantize=given, backend="eager").target)
        assert {name.rpartition(".")[2]: layer.format.name for name, layer in layers.items()} == {
            **dict.fromkeys(("k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"), "int4"),
            "lm_head": "mxint8",
        }
    again = specdec.load(stored, backend="eager")
    assert stored_as(again.target) == "mxfp4"
    assert stored_as(specdec.load(stored, quantize="mxfp4", backend="eager").target) == "mxfp4"
    made_before = load_model(llama, quantize="mxfp4", device="cpu")
    assert made.same(made_before, again.target)
    spread = load_model(stored, device_map={"": "cpu"})
    assert made.same(made_before, spread)


def test_the_embedded_pair() -> None:
    decoder = specdec.load(drafter="model", quantize="int8", draft_quantize="int8")
    assert (stored_as(decoder.target), stored_as(decoder.drafter.model)) == ("int8", "int8")
    out = decoder.generate("def area(shape):\n", max_new_tokens=12)
    assert out.tokens == decoder.generate_plain("def area(shape):\n", max_new_tokens=12).tokens
    assert out.stats.num_accepted_draft_tokens > 3


def test_a_stored_draft_with_a_vocabulary_of_its_own(llama: Path) -> None:
    ids = list(range(0, 64, 2))
    decoder = specdec.load(
        llama, str(llama), draft_quantize="mxfp6_e2m3", drafter_options={"vocabulary": ids}, backend="eager"
    )
    head = decoder.drafter._backend.model.get_output_embeddings()
    assert output_size(decoder.drafter._backend.model) == head.out_features == len(ids)
    whole = decoder.drafter.model.get_output_embeddings().weight_in(torch.float32)
    assert torch.equal(head.weight_in(torch.float32), whole[ids])
    plain = decoder.generate_plain(made.PROMPT, max_new_tokens=12).tokens
    assert decoder.generate(made.PROMPT, max_new_tokens=12, strict=True).tokens == plain


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantize": "mxfp5"}, "no recipe or format is called 'mxfp5'"),
        ({"quantize": {"default": "int4", "rules": [["conv", "int8"]]}}, "'conv' matches none"),
        ({"quantize": "int4-g128"}, "q_proj.*cannot be stored as int4-g128"),
        ({"quantize": "int8", "quantization_config": specdec.QuantConfig("int8")}, "the same in two ways"),
        ({"draft_quantize": "int8", "drafter": "ngram"}, "the ngram drafter loads no whole model"),
        ({"draft_quantize": "int8"}, "the none drafter loads no whole model"),
    ],
)
def test_wrong_options(options: dict[str, Any], says: str, llama: Path) -> None:
    with pytest.raises(InputError, match=says):
        specdec.load(llama, backend="eager", **options)


def test_models_that_are_loaded_or_stored_already(llama: Path, stored: Path) -> None:
    model = load_model(llama, device="cpu")
    with pytest.raises(InputError, match="the target is a model that is loaded already"):
        specdec.load(model, quantize="int8")
    with pytest.raises(InputError, match="the draft is loaded already"):
        specdec.load(model, model, draft_quantize="int8")
    with pytest.raises(InputError, match=r"are stored already \(mxfp4\): leave quantize out"):
        specdec.load(stored, quantize="int8")


@pytest.mark.parametrize(
    ("method", "fields", "library"),
    [
        ("gptq", {"bits": 4, "group_size": 32}, "gptqmodel"),
        ("awq", {"bits": 4, "group_size": 32}, "gptqmodel"),
        ("compressed-tensors", {"format": "pack-quantized", "config_groups": {}}, "compressed_tensors"),
        ("torchao", {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao"),
        ("bitsandbytes", {"load_in_8bit": True}, "bitsandbytes"),
    ],
)
def test_other_libraries_formats_stay_theirs(
    method: str, fields: dict[str, Any], library: str, llama: Path, tmp_path: Path
) -> None:
    """Without the library transformers says which one is missing, and nothing of ours stands before that."""
    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed")
    content = {"quant_method": method, **fields}
    folder = made.configured(llama, tmp_path / "other", lambda config: config.update(quantization_config=content))
    with pytest.raises(UnsupportedModelError, match=r"(?i)pip install|requires|not installed"):
        specdec.load(folder)
    with pytest.raises(InputError, match=f"are stored already.*{method}"):
        specdec.load(folder, quantize="int8")


def test_on_the_command_line(stored: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "info.json"
    assert main(["info", "--target", str(stored), "--json", str(report)]) == 0
    found = json.loads(report.read_text())["models"][str(stored)]
    model = load_model(llama, device="cpu")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["formats"]["mxfp4"]["layers"] == 15
    assert found["formats"]["mxfp4"]["bits_per_weight"] == 4.25
    assert "15 layers as mxfp4" in capsys.readouterr().out
    assert main(["generate", "import os", "--quantize", "mxfp5", "--quiet"]) == 2
    assert "no recipe or format is called 'mxfp5'" in capsys.readouterr().err
    words = ["generate", "x = [", "--quantize", "int8", "--drafter", "ngram", "--max-new-tokens", "4", "--quiet"]
    assert main(words) == 0


@native
def test_a_backend_opens_models_with_stored_weights_and_no_others(stored: Path) -> None:
    model = load_model(stored, device="cpu")
    assert CompiledBackend.open(model, compile="never").numerics == "invariant"
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="quantised by another library"):
        CompiledBackend.open(model, compile="never")


@pytest.mark.skipif(not ops.available(), reason="no compiled kernels")
def test_formats_of_the_same_size_do_not_share_a_graph() -> None:
    model = made.tiny()
    marks = {graph.fingerprint(NativeModel(prepare_model(model, name))) for name in ("mxfp6_e2m3", "mxfp6_e3m2")}
    assert len(marks) == 2
    assert graph.fingerprint(NativeModel(prepare_model(model, "mxfp6_e2m3"))) in marks
