"""Quantising from file to file: the stored bits, what is copied, what loads again, and what memory it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from specdec.errors import InputError
from specdec.loading import load_model, load_tokenizer
from specdec.quant import stream
from specdec.quant.calibrate import calibrate
from specdec.quant.format import Format, Part, parse, register_format
from specdec.quant.layers import candidates, weight_of
from specdec.quant.methods import apply, calibration, prepare_model
from specdec.quant.plan import prepare
from specdec.quant.recipe import Recipe
from specdec.quant.report import Report
from specdec.quant.source import INDEX
from specdec.quant.stream import quantize

FORMATS = (
    "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "mxfp6_e2m3-rceil",
    "int8", "int4", "int4-g64", "int4-asym", "sparse", "sparse-60", "sparse-2x4",
)  # fmt: skip
DOWN = "down_proj|dense_4h_to_h|mlp.c_proj"
MIXED = {"default": "int4", "head": "mxint8", "rules": [["layers.0|h.0", "int8"], [DOWN, "mxfp6_e2m3"]]}
MIXED["optional"] = True  # experts are no linear layers
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


def wide(name="llama", dtype=torch.bfloat16, **changes):
    sizes = {"n_embd": 64} if name == "gpt2" else WIDE
    return tiny(name, dtype=dtype, **{**sizes, **changes})


def saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tied bfloat16 model in several files, its vocabulary that of a byte tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    return saved(wide("llama-tied", vocab_size=TEXT_VOCAB), folder, max_shard_size="60KB")


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def logits(model):
    return model(input_ids=torch.arange(1, 25)[None]).logits


# ------------------------------------------------------------------ the stored bits


@pytest.mark.parametrize("format", FORMATS)
def test_stored_bits_are_those_of_the_loaded_model(source, tmp_path, format, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK", 700)  # a few rows at a time
    plan = prepare(source, {"default": format})
    report = quantize(plan, tmp_path / "out")
    stored, whole = tensors(tmp_path / "out"), tensors(source)
    model = load_model(source, dtype=torch.bfloat16)
    wanted = {
        f"{name}.weight_{part}": tensor
        for name in candidates(model).shapes
        for part, tensor in parse(format).pack(weight_of(model.get_submodule(name)).detach()).items()
    }
    copied = {name: whole[name] for name in whole if "norm" in name or "embed" in name}
    assert set(stored) == set(wanted) | set(copied)
    assert [name for name, tensor in {**wanted, **copied}.items() if not same(tensor, stored[name])] == []
    assert sum(tensor.nbytes for tensor in stored.values()) == report.after == plan.estimate.result


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gpt-neox", "qwen3", "mixtral", "phi"])
@pytest.mark.parametrize("recipe", [MIXED, {"default": "mxfp4", "head": None}])
def test_what_loads_again_is_the_quantised_model(architecture, recipe, tmp_path):
    wide(architecture).save_pretrained(tmp_path / "source")
    plan = prepare(tmp_path / "source", recipe)
    assert plan.obstacle is None
    report = quantize(plan, tmp_path / "out")
    loaded = load_model(tmp_path / "out", dtype="auto")
    wanted = prepare_model(load_model(tmp_path / "source", dtype="auto"), recipe)
    assert torch.equal(logits(loaded), logits(wanted))
    found = Report.of_model(loaded)
    assert {(one.module, one.format, one.after) for one in found.layers} == {
        (one.module, one.format, one.after) for one in report.layers
    }
    assert sum(found.kept_bytes().values()) == sum(report.kept_bytes().values())


def test_a_tied_head_is_stored_apart_and_the_embedding_stays(source, tmp_path):
    plan = prepare(source, "int4")
    assert plan.unties
    assert next(layer for layer in plan.report.layers if layer.module == "lm_head").before == 0
    quantize(plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"] is True
    quantize(prepare(source, {"default": "int4", "head": None}), tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_tied_pair_that_the_files_name_after_its_head(tmp_path):
    wide("llama-tied").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="auto")
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    whole["lm_head.weight"] = whole.pop("model.embed_tokens.weight")
    save_file(whole, file, {"format": "pt"})
    quantize(prepare(tmp_path, "int8"), tmp_path / "out")
    loaded = load_model(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded), logits(prepare_model(model, "int8")))


def test_keys_without_the_base_models_prefix(tmp_path):
    wide("gpt2").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="auto")
    file = tmp_path / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"}
    )
    quantize(prepare(tmp_path, "mxint8"), tmp_path / "out")
    loaded = load_model(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded), logits(prepare_model(model, "mxint8")))


class Together(Format):
    """int8 with one scale for the whole matrix: some rows cannot be made without the others."""

    name = "together"

    def parts(self, N, K):
        return {"codes": Part((N, K), torch.int8), "scales": Part((1,), torch.float32)}

    def pack(self, weight_NK):
        scales = weight_NK.abs().amax().float()[None] / 127
        return {"codes": (weight_NK.float() / scales).round().to(torch.int8), "scales": scales}

    def unpack(self, parts, dtype=torch.float32):
        return (parts["codes"].float() * parts["scales"]).to(dtype)


def test_a_format_that_needs_the_whole_matrix_gets_it(source, tmp_path, monkeypatch):
    from specdec.quant import format

    monkeypatch.setattr(format, "_FAMILIES", dict(format._FAMILIES))
    register_format("together", lambda options: Together())
    monkeypatch.setattr(stream, "CHUNK", 700)
    quantize(prepare(source, "together"), tmp_path / "out")
    weight = tensors(source)["model.layers.0.mlp.up_proj.weight"]
    stored = tensors(tmp_path / "out")
    assert same(stored["model.layers.0.mlp.up_proj.weight_scales"], Together().pack(weight)["scales"])
    format.parse.cache_clear()


# ------------------------------------------------------------------ files


def test_files_beside_the_weights(source, tmp_path):
    (source / "LICENSE").write_text("as you like")
    (source / "modeling.py").write_text("raise SystemExit")
    quantize(prepare(source, "w4a16"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "tokenizer.json", "generation_config.json", "provenance.json"} <= names
    assert "modeling.py" not in names
    assert load_tokenizer(tmp_path / "out")("def")["input_ids"] == load_tokenizer(source)("def")["input_ids"]
    record = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert Recipe.of(record["recipe"]) == Recipe.of("w4a16")
    assert set(record["source_sha256"]) == {path.name for path in source.glob("*.safetensors")}
    assert record["source"] == source.name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "specdec", "recipe": Recipe.of("w4a16").to_dict()}


def test_shards(source, tmp_path):
    quantize(prepare(source, "int8"), tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()
    assert not (tmp_path / "one" / INDEX).exists()
    quantize(prepare(source, "int8", max_shard=20_000), tmp_path / "many")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == len(set(index["weight_map"].values())) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert index["metadata"]["total_size"] == sum(sizes)
    for file, size in zip(files, sizes, strict=True):
        assert size <= 20_000 or len(load_file(file)) == 1
        assert set(load_file(file)) == {name for name, where in index["weight_map"].items() if where == file.name}
        assert file.stat().st_mode & 0o777 == (tmp_path / "many" / "config.json").stat().st_mode & 0o777
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert set(one) == set(many)
    assert all(same(one[name], many[name]) for name in one)
    assert torch.equal(logits(load_model(tmp_path / "one")), logits(load_model(tmp_path / "many")))


def test_whoever_asks_is_told_how_far_it_is(source, tmp_path):
    heard = []
    plan = prepare(source, "int8")
    quantize(plan, tmp_path / "out", told=lambda *words: heard.append(words))
    done = [words[0] for words in heard]
    assert done == sorted(done)
    assert done[-1] == heard[0][1] == plan.checkpoint.num_bytes
    assert [words[2] for words in heard[:-1]] == list(plan.checkpoint.tensors)


# ------------------------------------------------------------------ memory

_MEASURE = """
    import json, sys
    import torch
    torch.set_num_threads(1)
    from specdec.quant.plan import prepare
    from specdec.quant.stream import quantize
    from specdec.loading import load_model

    def held():
        "Bytes of this process that no file backs: pages of a mapped checkpoint are not among them."
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        return int(line.split()[1]) << 10

    source, out, warm = sys.argv[1:]
    quantize(prepare(warm, "int8"), out + "-warm")
    plan = prepare(source, "int8", max_shard=2 << 20)
    before, most = held(), [0]
    quantize(plan, out, told=lambda *_: most.append(held() - before))
    streamed = max(most)
    model = load_model(source, dtype="auto")
    total = sum(float(p.sum()) for p in model.parameters())  # reads every page
    private = [p.detach().clone() for p in model.parameters()]
    print(json.dumps({"peak": plan.estimate.peak, "streamed": streamed, "loaded": held() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_that_of_a_shard_and_a_layer(tmp_path):
    # 24 layers of 2 MiB: far more than a shard, and than what an allocator may keep.
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "head_dim": 64}
    (tmp_path / "source").mkdir()
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, dtype="bfloat16", **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "source")
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in LlamaForCausalLM(config).state_dict().items()}
    table = {name: f"part{re.sub('[^0-9]', '', name)}.safetensors" for name in shapes}
    for file in set(table.values()):
        part = {name: torch.randn(shapes[name]).bfloat16() for name in shapes if table[name] == file}
        save_file(part, tmp_path / "source" / file)
    (tmp_path / "source" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    wide().save_pretrained(tmp_path / "warm")
    code = textwrap.dedent(_MEASURE)
    given = [str(tmp_path / name) for name in ("source", "out", "warm")]
    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loaded"] > 40 << 20, "the measure sees a model that is loaded"
    assert found["streamed"] < found["peak"] < 24 << 20


# ------------------------------------------------------------------ where the files' tensors are not the model's


@pytest.fixture
def conversions(monkeypatch):
    """A table of how transformers reads checkpoints that a test may change."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table
    table = dict(conversion_mapping._checkpoint_conversion_mapping_cache)
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", table)


def test_keys_that_are_the_models_own_stay_although_a_renaming_would_fit(source, conversions):
    plan = prepare(source, "int8")
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [WeightRenaming("mlp", "ffn")], overwrite=True)
    assert prepare(source, "int8").keys == plan.keys


@pytest.fixture
def fused(tmp_path, conversions):
    """A checkpoint with queries, keys and values in one tensor, which transformers takes apart."""
    wide("llama", num_key_value_heads=4).save_pretrained(tmp_path / "fused")
    model = load_model(tmp_path / "fused", dtype="auto")
    file = tmp_path / "fused" / "model.safetensors"
    whole = load_file(file)
    for i in range(2):
        at = f"model.layers.{i}.self_attn"
        whole[f"{at}.qkv.weight"] = torch.cat([whole.pop(f"{at}.{x}_proj.weight") for x in "qkv"])
    save_file(whole, file, {"format": "pt"})
    names = [f"self_attn.{x}_proj.weight" for x in "qkv"]
    apart = WeightConverter("self_attn.qkv.weight", names, operations=[Chunk(dim=0)])
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [apart], overwrite=True)
    return tmp_path / "fused", model


@pytest.mark.parametrize("recipe", ["int8", {"default": "int4", "method": "awq", "options": {"grid": 4}}])
def test_a_checkpoint_that_is_put_together_otherwise_goes_through_the_model(fused, tmp_path, recipe):
    folder, model = fused
    plan = prepare(folder, recipe)
    assert "q_proj.weight alone" in plan.obstacle
    prepared = None
    text = torch.arange(120).view(5, 24) % 60
    if plan.calibrates:
        prepared = apply(model, recipe, text)
    report = quantize(plan, tmp_path / "out", prepared=prepared)
    loaded = load_model(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded), logits(prepare_model(model, recipe, text)))
    assert Report.of_model(loaded).after == report.after
    assert Recipe.of(loaded.config.quantization_config.recipe) == Recipe.of(recipe)


# ------------------------------------------------------------------ methods


@pytest.mark.parametrize(
    "recipe",
    [
        {"default": "int4", "method": "gptq"},
        {"default": "int4", "method": "awq", "options": {"grid": 4}},
        {"default": "int8", "method": "smoothquant"},
    ],
)
def test_methods_that_look_at_activations(source, tmp_path, recipe):
    text = tmp_path / "text.txt"
    text.write_text("def area(r):\n    return 3.14159 * r ** 2\n" * 40)
    plan = prepare(source, recipe)
    with pytest.raises(InputError, match="looks at activations"):
        quantize(plan, tmp_path / "out")
    prepared = calibrate(plan, text, rows=4, length=48)
    quantize(plan, tmp_path / "out", prepared=prepared)
    model = load_model(source, dtype=torch.bfloat16)
    tokens = calibration.tokens(text, model, load_tokenizer(source), rows=4, length=48)
    wanted = prepare_model(model, recipe, tokens)
    assert torch.equal(logits(load_model(tmp_path / "out", dtype="auto")), logits(wanted))
    quantize(prepare(source, {**recipe, "method": "rtn", "options": {}}), tmp_path / "plain")
    one, other = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert set(one) == set(other)
    assert not all(same(one[name], other[name]) for name in one)
    if recipe["method"] != "gptq":  # scales moved into norms
        assert prepared.changed
        assert not same(*(t["model.layers.0.input_layernorm.weight"] for t in (one, other)))


def test_the_model_writes_its_own_text(source):
    plan = prepare(source, {"default": "int4", "method": "gptq"})
    made = [calibrate(plan, rows=2, length=24, seed=seed) for seed in (0, 0, 1)]
    name = "model.layers.1.mlp.down_proj"
    assert same(made[0].parts[name]["codes"], made[1].parts[name]["codes"])
    assert not same(made[0].parts[name]["codes"], made[2].parts[name]["codes"])
