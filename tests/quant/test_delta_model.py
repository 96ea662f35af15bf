"""Whole models in delta-CSC: folder to folder and back, and read straight from there."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant import delta_model
from specdec.quant.delta_model import compress_folder, expand_folder
from specdec.quant.hf import QuantConfig
from specdec.quant.pruning import magnitude

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MIXED = {"default": "sparse-90", "rules": [["down_proj", "mxfp6_e2m3"], ["q_proj", "int8"], ["k_proj", "int4"]]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pruned model with stored weights of several formats, and that in delta-CSC."""
    root = tmp_path_factory.mktemp("models")
    model = magnitude(tiny_models.tiny("llama", dtype=torch.float32, **SHAPE), 0.9)
    model.save_pretrained(root / "full")
    config = QuantConfig({**MIXED, "head": None})
    AutoModelForCausalLM.from_pretrained(root / "full", quantization_config=config).save_pretrained(root / "stored")
    told: list[tuple[int, int, str]] = []
    sizes = compress_folder(root / "stored", root / "delta", told=lambda *what: told.append(what))
    return root, sizes, told


def tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def test_a_folder_comes_back_bit_by_bit(folders, tmp_path):
    root, sizes, told = folders
    expand_folder(root / "delta", tmp_path / "back", max_shard=20_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert same(tensors(tmp_path / "back"), tensors(root / "stored"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", root / "stored")]
    assert configs[0] == configs[1]
    assert told[0][0] == 0
    assert told[-1] == (sizes.before, sizes.before, "")


def test_only_what_becomes_smaller_is_changed(folders):
    root, sizes, _ = folders
    before, after = tensors(root / "stored"), tensors(root / "delta")
    assert sizes.after < 0.95 * sizes.before
    assert sizes.before == sum(value.nbytes for value in before.values())
    assert sizes.after == sum(value.nbytes for value in after.values())
    changed = {name.rpartition(".")[0] for name in before if name.endswith(("_mask", "_codes"))} & set(sizes.gaps)
    assert {name.rpartition(".")[2] for name in changed} == {
        "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    kept = [name for name in before if name.rpartition(".")[0] not in sizes.gaps]
    assert any("k_proj" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert set(sizes.gaps.values()) <= {4, 5, 6}


def test_one_gap_for_all(folders, tmp_path):
    root, sizes, _ = folders
    found = compress_folder(root / "stored", tmp_path / "delta", gap=4)
    assert set(found.gaps.values()) == {4}
    assert found.after > sizes.after


def test_folders_that_are_refused(folders, tmp_path):
    root, _, _ = folders
    with pytest.raises(InputError, match="not stored by specdec"):
        compress_folder(root / "full", tmp_path / "out")
    with pytest.raises(InputError, match="lies in delta-csc already"):
        compress_folder(root / "delta", tmp_path / "out")
    with pytest.raises(InputError, match="does not lie in delta-csc"):
        expand_folder(root / "stored", tmp_path / "out")
    with pytest.raises(InputError, match="is not empty"):
        compress_folder(root / "stored", root / "full")
    with pytest.raises(UnsupportedModelError, match="no such folder"):
        expand_folder(root / "nothing", tmp_path / "out")
    dense = tiny_models.tiny("llama", dtype=torch.float32, **SHAPE)
    dense.save_pretrained(tmp_path / "full")
    config = QuantConfig({"default": "sparse-50", "head": None})
    AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=config).save_pretrained(
        tmp_path / "half"
    )
    with pytest.raises(InputError, match=r"no layer of .* is smaller"):
        compress_folder(tmp_path / "half", tmp_path / "out")
    assert not (tmp_path / "out").exists()  # whole or not at all


def damaged(folders, tmp_path, change=None, storage=None):
    out = tmp_path / "damaged"
    shutil.copytree(folders[0] / "delta", out)
    if change is not None:
        held = load_file(out / "model.safetensors")
        change(held)
        save_file(held, out / "model.safetensors", {"format": "pt"})
    if storage is not None:
        config = json.loads((out / "config.json").read_text())
        storage(config["quantization_config"]["storage"])
        (out / "config.json").write_text(json.dumps(config))
    return out


LAYER = "model.layers.1.mlp.up_proj"
DAMAGES = {
    "cut": (lambda t: t.update({f"{LAYER}.weight_gaps": t[f"{LAYER}.weight_gaps"][:-1]}), f"'gaps' of {LAYER}"),
    "long": (lambda t: t.update({f"{LAYER}.weight_values": t[f"{LAYER}.weight_values"].repeat(2)}), f"of {LAYER}"),
    "counts": (lambda t: t[f"{LAYER}.weight_counts"].fill_(60), f"of {LAYER}"),
    "nothing": (lambda t: [t.pop(f"{LAYER}.weight_{part}") for part in ("values", "gaps", "counts")], f"lack {LAYER}"),
    "missing": (lambda t: t.pop(f"{LAYER}.weight_counts"), f"lack {LAYER}.weight_counts"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_streams_name_the_layer(folders, tmp_path, kind):
    change, match = DAMAGES[kind]
    with pytest.raises(InputError, match=match):
        expand_folder(damaged(folders, tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


STORAGES = {
    "version": (lambda s: s.update(version=2), "version 2"),
    "layout": (lambda s: s.update(layout="zip"), "layout that is unknown"),
    "gaps": (lambda s: s.update(gaps=[1]), "layout that is unknown"),
    "width": (lambda s: s["gaps"].update({LAYER: 9}), "gaps of 9 bits"),
    "other width": (lambda s: s["gaps"].update({LAYER: 2}), f"of {LAYER}"),
    "layer": (lambda s: s["gaps"].update({"lm_head": 4}), "lm_head in delta-(csc|CSC), which"),
}


@pytest.mark.parametrize("kind", STORAGES)
def test_configurations_that_do_not_fit(folders, tmp_path, kind):
    storage, match = STORAGES[kind]
    with pytest.raises(InputError, match=match):
        expand_folder(damaged(folders, tmp_path, storage=storage), tmp_path / "out")


def test_the_layout_is_named_in_the_configuration(folders):
    root, sizes, _ = folders
    storage = json.loads((root / "delta" / "config.json").read_text())["quantization_config"]["storage"]
    assert storage == {"layout": delta_model.LAYOUT, "version": 1, "gaps": dict(sizes.gaps)}


# ---------------------------------------------------------------- read straight from there


def test_from_pretrained_reads_it_as_if_it_were_expanded(folders, tmp_path):
    root, _, _ = folders
    expected = AutoModelForCausalLM.from_pretrained(root / "stored")
    found = AutoModelForCausalLM.from_pretrained(root / "delta")
    assert same(found.state_dict(), expected.state_dict())
    ids = torch.arange(10)[None]
    assert torch.equal(found(ids).logits, expected(ids).logits)
    # What is saved is what runs.
    found.save_pretrained(tmp_path / "again")
    assert same(tensors(tmp_path / "again"), tensors(root / "stored"))
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "storage" not in config["quantization_config"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_from_pretrained_names_the_layer_of_damaged_streams(folders, tmp_path, kind):
    change, match = DAMAGES[kind]
    with pytest.raises(InputError, match=match):
        AutoModelForCausalLM.from_pretrained(damaged(folders, tmp_path, change))


@pytest.mark.parametrize("kind", STORAGES)
def test_from_pretrained_refuses_configurations_that_do_not_fit(folders, tmp_path, kind):
    storage, match = STORAGES[kind]
    with pytest.raises(InputError, match=match):
        AutoModelForCausalLM.from_pretrained(damaged(folders, tmp_path, storage=storage))
