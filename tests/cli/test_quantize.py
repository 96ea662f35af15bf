"""`specdec quantize` as a user runs it: what it prints, what it writes, how it refuses."""

from __future__ import annotations

import argparse
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec
from specdec import cli
from specdec.cli.quantize import num_bytes
from specdec.quant.recipe import Recipe


def invoke(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_hidden_layers": 3}
    tiny("llama-tied", dtype=torch.float32, vocab_size=TEXT_VOCAB, **sizes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str):
        code = invoke("quantize", str(model), *map(str, arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_it_writes_a_model_and_prints_what_became_of_it(run, model, tmp_path):
    code, out, err = run("--recipe", "w4a16", "--out", tmp_path / "out", "--json", tmp_path / "report.json")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert any(line.startswith("model.layers.*.mlp.up_proj ×2 64×32 mxint8 8.25") for line in lines)
    assert any(line.startswith("model.layers.2.mlp.up_proj 64×32 int4 4.5") for line in lines)
    assert any(line.startswith(f"lm_head {TEXT_VOCAB}×32 mxint8 8.25 tied") for line in lines)
    assert lines[-1] == f"specdec compare --target {tmp_path / 'out'}"
    assert model.name in err
    assert "of memory" in err
    report = json.loads((tmp_path / "report.json").read_text())
    assert Recipe.of(report["recipe"]) == Recipe.of("w4a16")
    assert len(report["layers"]) == 22
    assert report["bytes_after"] == report["estimate"]["result"]
    decoder = specdec.load(str(tmp_path / "out"), "ngram", backend="eager")
    options = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3}
    assert decoder.generate("def f(", **options).tokens == decoder.generate_plain("def f(", **options).tokens


def test_a_dry_run_writes_nothing(run, tmp_path):
    code, dry, _ = run("--recipe", "mx6", "--dry-run", "--out", tmp_path / "out")
    assert code == 0
    assert list(tmp_path.iterdir()) == []
    code, real, _ = run("--recipe", "mx6", "--out", tmp_path / "out")
    assert code == 0
    assert real.startswith(dry)
    assert run("--recipe", "mx6", "--dry-run")[0] == 0


def test_every_layer_on_a_line_of_its_own(run):
    _, out, err = run("--recipe", "mx6", "--dry-run", "--every-layer", "--quiet")
    assert sum(line.startswith("model.layers.") for line in out.splitlines()) == 21
    assert err == ""


def test_a_recipe_from_a_file_and_a_method_with_options(run, tmp_path, model):
    (tmp_path / "recipe.json").write_text('{"default": "int4", "rules": [["down_proj", null]]}')
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "for i in range(10):\n    print(i)\n" * 20}))
    options = ("--calibration", tmp_path / "text.jsonl", "--calibration-rows", "2", "--calibration-length", "32")
    method = ("--method", "gptq", "--method-option", "damping=0.05")
    code, out, _ = run("--recipe", tmp_path / "recipe.json", *method, *options, "--out", tmp_path / "out")
    assert code == 0
    assert "kept by the recipe" in out
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["recipe"]
    assert (recipe["method"], recipe["options"]) == ("gptq", {"damping": 0.05})
    assert specdec.load(str(tmp_path / "out"), "ngram", backend="eager").generate("def", max_new_tokens=3).tokens


def test_pruned_weights_take_less_on_the_disk(run, tmp_path):
    options = ("--recipe", "sparse-90", "--out", tmp_path / "out", "--storage", "delta-csc")
    code, out, _ = run(*options, "--json", tmp_path / "report.json")
    assert code == 0
    assert re.search(r"on the disk: .* in delta-csc", out)
    assert run("--recipe", "sparse-90", "--out", tmp_path / "packed")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    sizes = {
        name: sum(tensor.nbytes for tensor in load_file(tmp_path / name / "model.safetensors").values())
        for name in ("out", "packed")
    }
    assert report["bytes_stored"] == sizes["out"] < sizes["packed"] == report["bytes_after"]
    texts = [specdec.load(str(tmp_path / name), "ngram", backend="eager").generate("def f(").text for name in sizes]
    assert texts[0] == texts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "packed", "report.json"]
    assert run(*options)[0] == 2
    assert run(*options, "--overwrite")[0] == 0
    code, _, err = run("--recipe", "int4", "--out", tmp_path / "other", "--storage", "delta-csc")
    assert code == 2
    assert "delta-csc" in err
    assert not (tmp_path / "other").exists()


def test_the_embedded_target_is_the_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert invoke("quantize", "--recipe", "w4a16", "--dry-run") == 0
    assert "model.layers.*.mlp.down_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "mx6"), "--out DIR, or --dry-run"),
        (("--recipe", "w4a61", "--dry-run"), "did you mean 'w4a16'"),
        (("--recipe", "int4-g64", "--dry-run"), "model.layers.0.self_attn.q_proj [32, 32]"),
        (("--recipe", "int4", "--method", "gptk", "--dry-run"), "did you mean 'gptq'"),
        (("--recipe", "int4", "--method", "gptq", "--method-option", "grid=3", "--dry-run"), "no option 'grid'"),
        (("--recipe", "int4", "--out", "OUT", "--memory-budget", "1kB"), "the budget is 1,000"),
        (("--recipe", "int4", "--out", "OUT", "--max-shard-size", "0"), "at least 1 byte"),
        (("--recipe", "int4", "--out", "OUT", "--threads", "0"), "--threads"),
        (("--recipe", "int4", "--out", "OUT/a/b"), "cannot write into"),
        (("--recipe", "int4", "--method", "gptq", "--calibration", "nowhere.txt", "--out", "OUT"), "nowhere.txt"),
        (("--recipe", "int4", "--out", "OUT", "--json", "/nowhere/a.json"), "--json"),
    ],
)
def test_wrong_input(run, tmp_path, arguments, words):
    code, out, err = run(*(word.replace("OUT", str(tmp_path / "out")) for word in arguments))
    assert code == 2
    assert out == ""
    assert words in err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_needs_overwrite(run, tmp_path):
    given = ("--recipe", "int8", "--out", tmp_path / "out")
    assert run(*given)[0] == 0
    code, _, err = run(*given)
    assert code == 2
    assert "add --overwrite" in err
    assert run(*given, "--dry-run")[0] == 2
    assert run(*given, "--overwrite")[0] == 0


def test_sizes_as_people_write_them():
    wanted = {"7": 7, "2GB": 2 * 10**9, "500 MiB": 500 << 20, "1.5k": 1500, "1TiB": 1 << 40, "3b": 3}
    assert {text: num_bytes(text) for text in wanted} == wanted
    for text in ("", "GB", "-1", "2X", "1,5k", "1 e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            num_bytes(text)
    assert cli.build_parser("quantize").parse_args(["quantize", "--recipe", "mx6"]).max_shard_size == 1 << 30
