"""Drafters by hub id: what is downloaded, and what a download is taken for. The hub is a folder here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import tiny_eagle
import tiny_models
import torch
from safetensors.torch import load_file
from specdec.drafters import EagleDrafter, MedusaDrafter, ModelDrafter, NgramDrafter

from specdec import loading
from specdec.drafter import BuildContext
from specdec.errors import InputError, UnsupportedModelError
from specdec.formats import eagle
from specdec.formats import medusa as medusa_files
from specdec.formats.medusa_heads import HeadShape, MedusaHeads

ID = "somebody/weights"


class Hub:
    """Stands in for the network: `source` is what the hub has, `cache` what was downloaded."""

    def __init__(self, source: Path, cache: Path):
        self.source, self.cache, self.loaded = source, cache, []  # type: tuple[Path, Path, list[str]]
        self.down = False
        cache.mkdir()

    def _fetch(self, name: str) -> str:
        shutil.copy(self.source / name, self.cache / name)
        return str(self.cache / name)

    def cached_file(self, source: str, name: str) -> str:
        if not (self.source / name).is_file():
            raise OSError(f"{source} has no file {name}")
        return self._fetch(name)

    def snapshot_download(self, source: str, *, allow_patterns: Sequence[str], ignore_patterns: Sequence[str]) -> str:
        if self.down:
            raise OSError("no connection\nand a long story")
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source).as_posix()
            kept = any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns)
            if path.is_file() and kept:
                self._fetch(name)
        return str(self.cache)

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.cache.iterdir()}


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("llama")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    (tmp_path / "hub").mkdir()
    made = Hub(tmp_path / "hub", tmp_path / "cache")
    load = loading.load_model

    def load_model(source: str, **options: Any) -> Any:
        made.loaded.append(str(source))
        return load(made.source if source == ID else source, **options)

    monkeypatch.setattr(loading, "cached_file", made.cached_file)
    monkeypatch.setattr(loading, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr("specdec.drafters.model.load_model", load_model)
    monkeypatch.setattr(loading, "load_tokenizer", lambda source, trust: None)
    return made


def resolve(target: Any) -> Any:
    return loading.resolve_drafter(ID, BuildContext(target, dtype=target.dtype, backend="eager"))


def medusa_heads() -> MedusaHeads:
    return MedusaHeads(HeadShape(3, 1, 16, tiny_models.VOCAB, tiny_models.VOCAB, "tied")).double()


def test_a_head_is_downloaded_and_nothing_else(target: Any, hub: Hub) -> None:
    eagle.write_own(hub.source, tiny_eagle.head(target, draft_vocab_size=40))
    for name in ("modeling_eagle.py", "pytorch_model.bin", "training.log"):
        (hub.source / name).write_text("exit(1)")
    (hub.source / "checkpoint-1").mkdir()
    shutil.copy(hub.source / "model.safetensors", hub.source / "checkpoint-1" / "model.safetensors")
    assert isinstance(resolve(target), EagleDrafter)
    assert hub.names == {"config.json", "model.safetensors"}


def test_pickled_heads_are_downloaded_where_there_are_no_others(target: Any, hub: Hub) -> None:
    medusa_files.write(medusa_heads(), hub.source, "somebody/target")
    tensors = load_file(hub.source / "model.safetensors")
    (hub.source / "model.safetensors").unlink()
    torch.save(tensors, hub.source / "medusa_lm_head.pt")
    assert isinstance(resolve(target), MedusaDrafter)
    assert hub.names == {"config.json", "medusa_lm_head.pt"}


def test_of_a_whole_model_the_configuration_is_looked_at(target: Any, hub: Hub) -> None:
    tiny_models.tiny("llama", num_hidden_layers=5).save_pretrained(hub.source)
    assert isinstance(resolve(target), ModelDrafter)
    assert hub.names == {"config.json"}
    assert hub.loaded == [ID]  # transformers downloads it


def test_a_small_model_is_still_a_model(target: Any, hub: Hub) -> None:
    tiny_models.tiny("llama", num_hidden_layers=1).save_pretrained(hub.source)
    assert isinstance(resolve(target), ModelDrafter)
    assert hub.loaded == [ID]


def test_a_head_that_calls_itself_a_model_is_told_by_its_weights(target: Any, hub: Hub) -> None:
    """EAGLE-1 heads are published as a Llama of one layer, pickled."""
    head = tiny_eagle.head(target, eagle_version=1, target_layer_ids=None, own_head=False, draft_vocab_size=None)
    config = head.config
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip
    given = {name: getattr(config, name) for name in fields}
    text = json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **given})
    (hub.source / "config.json").write_text(text)
    torch.save(eagle.own_tensors(head), hub.source / "pytorch_model.bin")
    drafter = resolve(target)
    assert isinstance(drafter, EagleDrafter)
    assert drafter.head.config.eagle_version == 1


def test_a_head_that_cannot_be_downloaded_says_so(target: Any, hub: Hub) -> None:
    medusa_files.write(medusa_heads(), hub.source, "somebody/target")
    hub.down = True
    with pytest.raises(UnsupportedModelError, match="cannot download the drafter somebody/weights: no connection"):
        resolve(target)


def test_an_id_that_nobody_has_is_a_model_that_cannot_be_loaded(target: Any, hub: Hub) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot load a model from"):
        resolve(target)


def test_options_of_a_drafter_that_is_made_already_are_refused(target: Any) -> None:
    with pytest.raises(InputError, match="the ngram drafter is made already: give it max_ngram when you make it"):
        loading.resolve_drafter(NgramDrafter(), BuildContext(target), max_ngram=2)
