"""Files of weights that are damaged, or that say what they should not: an error in our words, and nothing is run."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_eagle
import tiny_models
import torch
from safetensors.torch import save_file
from specdec.drafters import EagleDrafter

from specdec.errors import UnsupportedModelError
from specdec.formats import medusa
from specdec.formats.files import load_pickled, read_config, read_tensors
from specdec.formats.medusa_heads import HeadShape, MedusaHeads


def damaged(zipped: bool, tmp_path: Path) -> list[bytes]:
    path = tmp_path / "whole"
    torch.save({"a": torch.arange(100)}, path, _use_new_zipfile_serialization=zipped)
    whole, rng = path.read_bytes(), random.Random(0)
    found = [b"", b"<html>not found</html>", whole[:50], whole[: len(whole) // 2]]
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(4):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        found.append(bytes(changed))
    return found


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_refused_in_our_words(zipped: bool, tmp_path: Path) -> None:
    path, said = tmp_path / "pytorch_model.bin", []
    for content in damaged(zipped, tmp_path):
        path.write_bytes(content)
        try:
            load_pickled(path)  # what was changed may be a number
        except UnsupportedModelError as error:
            said.append(str(error))
    assert len(said) >= 4
    assert all(message.startswith(f"cannot read {path}: ") for message in said)


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize("reader", [read_tensors, medusa.read])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_code_is_not_run(reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"fc.weight": Runs()}))
    with pytest.raises(UnsupportedModelError, match="convert it where you trust it"):
        reader(tmp_path)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', b"\xff\xfe"])
def test_an_index_that_is_none_is_refused(content: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UnsupportedModelError, match="download it again"):
        read_tensors(tmp_path)


def test_an_index_leads_to_no_other_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"secret": torch.ones(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"secret": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match="cannot read"):
        read_tensors(inside)


def test_a_configuration_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(UnsupportedModelError, match="cannot be read"):
        read_config(tmp_path)


def test_a_pickle_of_something_else_is_no_eagle_head(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    shape = tiny_eagle.config(tiny_models.tiny("llama"))
    given = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": shape.hidden_size}
    assert not EagleDrafter.recognises(given, tmp_path)


def test_medusa_heads_without_a_configuration_are_read(tmp_path: Path) -> None:
    heads = MedusaHeads(HeadShape(2, 1, 16, 64, 64, "own")).double()
    medusa.write(heads, tmp_path, "somebody/target")
    medusa.export(tmp_path, tmp_path, "original")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").unlink()
    assert medusa.read(tmp_path).shape.num_heads == 2


def test_heads_in_the_old_format_of_torch_are_read(tmp_path: Path) -> None:
    heads = MedusaHeads(HeadShape(2, 1, 16, 64, 64, "own")).double()
    named = {
        f"{k}.0.linear.{part}": getattr(heads.blocks[k][0], part).data for k in (0, 1) for part in ("weight", "bias")
    }
    named.update({f"{k}.1.weight": heads.projections[k].weight.data for k in (0, 1)})
    torch.save(named, tmp_path / "medusa_lm_head.pt", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(medusa.read(tmp_path).projections[1].weight, heads.projections[1].weight)
