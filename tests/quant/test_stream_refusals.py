"""What quantising a checkpoint refuses, in words that name what is wrong, and that nothing half-made is left behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny

from specdec.errors import InputError, MemoryBudgetError, UnsupportedModelError
from specdec.quant import memory, shards
from specdec.quant.plan import prepare
from specdec.quant.source import INDEX, local_folder
from specdec.quant.stream import quantize


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model = tiny("llama", dtype=torch.float32, hidden_size=32, intermediate_size=64, head_dim=8)
    model.save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def source(whole, tmp_path):
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "source")


def file_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def change(folder, name, how):
    file = file_of(folder, name)
    content = load_file(file)
    content[name] = how(content[name])
    save_file(content, file, {"format": "pt"})


def left(folder):
    """Names beside the source."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


# ------------------------------------------------------------------ weights

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [UP, NORM, "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(source, tmp_path, name, value):
    def damage(tensor):
        tensor.view(-1)[5] = value
        return tensor

    change(source, name, damage)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        quantize(prepare(source, "mxfp4"), tmp_path / "out")
    assert left(source) == []


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        (UP, lambda t: t[:60], r"up_proj.weight is \[60, 32\] .* and \[64, 32\] by the configuration"),
        (UP, lambda t: t.to(torch.float8_e4m3fn), r"up_proj.weight is torch.float8_e4m3fn .* full-precision"),
        (UP, lambda t: t.to(torch.int8), r"up_proj.weight is torch.int8"),
        (UP, lambda t: t.to(torch.float8_e8m0fnu), r"up_proj.weight .* is F8_E8M0, which cannot be read"),
    ],
)
def test_weights_of_another_kind(source, name, how, words):
    change(source, name, how)
    with pytest.raises(UnsupportedModelError, match=words):
        prepare(source, "mxfp4")


def test_weights_that_are_not_there(source, tmp_path):
    file = file_of(source, UP)
    content = load_file(file)
    del content[UP]
    save_file(content, file, {"format": "pt"})
    plan = prepare(source, "mxfp4")
    assert UP.removesuffix(".weight") in plan.obstacle
    with pytest.raises((InputError, UnsupportedModelError), match=r"lack 1 of the weights|lack 1 weights.*up_proj"):
        quantize(plan, tmp_path / "out")
    assert left(source) == []


def test_files_that_are_cut_off(source):
    file = file_of(source, UP)
    content = file.read_bytes()
    for size in (len(content) - 10, 6, 0):
        file.write_bytes(content[:size])
        with pytest.raises(UnsupportedModelError, match=rf"cannot read .*{file.name}.*cut short"):
            prepare(source, "int8")


def test_indices_that_do_not_hold(source):
    index = json.loads((source / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    for content, words in (
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {"a": 1}}', "not an index"),
        (json.dumps({"weight_map": {**index["weight_map"], "a": "other.safetensors"}}), "lacks other.safetensors"),
    ):
        (source / INDEX).write_text(content)
        with pytest.raises(UnsupportedModelError, match=words):
            prepare(source, "int8")
    (source / INDEX).write_text(json.dumps(index))
    save_file({**load_file(source / names[1]), UP: torch.zeros(64, 32)}, source / names[1])
    save_file({**load_file(source / names[0]), UP: torch.zeros(64, 32)}, source / names[0])
    with pytest.raises(UnsupportedModelError, match=f"{UP} is both in {names[0]} and {names[1]}"):
        prepare(source, "int8")


def test_an_index_leads_nowhere_else(source, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["a"] = "../secret.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=r"lacks secret.safetensors"):
        prepare(source, "int8")


def test_folders_that_hold_no_weights(source, tmp_path):
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    with pytest.raises(UnsupportedModelError, match="holds no weights"):
        prepare(source, "int8")
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"pickled.*save_pretrained"):
        prepare(source, "int8")
    (source / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match="configuration"):
        prepare(source, "int8")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(UnsupportedModelError, match="no such folder"):
            local_folder(name)


def test_models_that_are_quantised_already(source, tmp_path):
    quantize(prepare(source, "int8"), tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=r"quantised already \(specdec\).*full-precision"):
        prepare(tmp_path / "out", "mxfp4")


# ------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"default": "int4", "rules": [["c_attn", "int8"]]}, "'c_attn' matches none of 15 linear layers"),
        ("int4-g64", r"model.layers.0.self_attn.q_proj \[32, 32\] cannot be stored as int4-g64"),
        ({"default": "int4", "method": "gptk"}, "did you mean 'gptq'"),
        ({"default": "int4", "method": "gptq", "options": {"dampening": 1}}, "did you mean 'damping'"),
        ({"default": "sparse", "method": "gptq"}, "sparse has none"),
    ],
)
def test_recipes_that_do_not_fit(whole, recipe, words):
    with pytest.raises(InputError, match=words):
        prepare(whole, recipe)


# ------------------------------------------------------------------ where to


def test_a_folder_with_content_is_replaced_on_demand_only(source, tmp_path):
    out = tmp_path / "out"
    quantize(prepare(source, "int8"), out)
    plan = prepare(source, "int4")
    with pytest.raises(InputError, match=r"not empty.*--overwrite"):
        quantize(plan, out)
    quantize(plan, out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]["default"] == "int4"
    assert left(source) == ["out"]
    (tmp_path / "empty").mkdir()
    quantize(plan, tmp_path / "empty")


def test_folders_that_are_never_replaced(source, tmp_path):
    plan = prepare(source, "int8")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("sir")
    (tmp_path / "file").write_text("")
    for out, words in (
        (tmp_path / "letters", "no model folder"),
        (source, "holds the model that is read"),
        (tmp_path, "holds the model that is read"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "missing" / "out", "cannot write into"),
    ):
        with pytest.raises(InputError, match=words):
            quantize(plan, out, overwrite=True)
    assert (tmp_path / "letters" / "dear.txt").read_text() == "sir"
    assert left(source) == ["file", "letters"]


def test_what_is_interrupted_leaves_everything_as_it_was(source, tmp_path):
    out = tmp_path / "out"
    quantize(prepare(source, "int8"), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def stop(done, of, name):
        if done > of / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(prepare(source, "int4", max_shard=4000), out, overwrite=True, told=stop)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        quantize(prepare(source, "int4"), tmp_path / "new", told=stop)
    assert left(source) == ["out"]


def test_a_replacement_that_fails_at_the_last_step_is_undone(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    quantize(prepare(source, "int8"), out)
    rename = shards.Path.rename

    def fail(self, target):
        if self.suffix == ".partial":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(shards.Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        quantize(prepare(source, "int4"), out, overwrite=True)
    monkeypatch.undo()
    assert json.loads((out / "config.json").read_text())["quantization_config"]["recipe"]["default"] == "int8"
    assert left(source) == ["out"]


# ------------------------------------------------------------------ memory and disk


def test_work_that_cannot_fit_is_refused_with_the_figures(source, tmp_path, monkeypatch):
    plan = prepare(source, "int8")
    assert plan.estimate.source == sum(
        t.nbytes for file in source.glob("*.safetensors") for t in load_file(file).values()
    )
    peak = f"{plan.estimate.peak:,}"
    with pytest.raises(MemoryBudgetError, match=rf"up to {peak} bytes.* budget is 1,000.*--max-shard-size"):
        quantize(plan, tmp_path / "out", memory_budget=1000)
    quantize(plan, tmp_path / "out", memory_budget=plan.estimate.peak)
    monkeypatch.setattr(memory, "available_memory", lambda: plan.estimate.peak - 1)
    with pytest.raises(MemoryBudgetError, match=rf"{peak} bytes of memory; {plan.estimate.peak - 1:,} are free"):
        quantize(plan, tmp_path / "other")
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    usage = shutil.disk_usage(tmp_path)._replace(free=plan.estimate.result - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(MemoryBudgetError, match=rf"takes {plan.estimate.result:,} bytes; the disk of .* has "):
        quantize(plan, tmp_path / "other")
    with pytest.raises(InputError, match="at least 1 byte"):
        prepare(source, "int8", max_shard=0)


def test_estimates_follow_what_is_held(whole):
    plain = prepare(whole, "int8").estimate
    small = prepare(whole, "int8", max_shard=1000).estimate
    assert small.peak < plain.peak
    assert small.result == plain.result == plain.loaded < plain.source
    assert prepare(whole, {"default": "int8", "method": "smoothquant"}).estimate.peak > plain.source + plain.result


def test_memory_that_is_free(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   50 kB\n")
    assert list(memory._system(tmp_path / "meminfo")) == [50 << 10]
    assert list(memory._system(tmp_path / "missing")) == []
    assert list(memory._control_group(tmp_path)) == []
    for name, content in (
        ("memory.max", "1000"),
        ("memory.current", "700"),
        ("memory.stat", "anon 500\ninactive_file 120\nactive_file 80"),
    ):
        (tmp_path / name).write_text(content + "\n")
    assert list(memory._control_group(tmp_path)) == [500]
    (tmp_path / "memory.max").write_text("max\n")
    assert list(memory._control_group(tmp_path)) == []
    found = memory.available_memory()
    assert found is None or found > 0
