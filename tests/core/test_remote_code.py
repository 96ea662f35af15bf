"""Code that comes with a draft model runs when it was allowed to, and only then."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_pairs
import torch
from specdec.drafters import HybridDrafter, ModelDrafter
from specdec.drafters.cross_vocab import CrossVocabDrafter
from transformers import dynamic_module_utils

import specdec
from specdec.errors import UnsupportedModelError

CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "specdec_test_own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A draft whose class lies beside its weights; what transformers copies of it stays in the test's folder."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path, str(modules)])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    made = tmp_path / "draft"
    tiny_models.tiny("llama", dtype=torch.float32).save_pretrained(made)
    (made / "modeling_own.py").write_text(CODE)
    config = json.loads((made / "config.json").read_text())
    config |= {"model_type": "specdec_test_own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    }
    (made / "config.json").write_text(json.dumps(config))
    return made


def load(folder: Path, **options: Any) -> specdec.SpeculativeDecoder:
    return specdec.load(tiny_models.tiny("llama", dtype=torch.float32), backend="eager", **options)


def test_a_draft_with_code_of_its_own(folder: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="cannot load a model from"):
        load(folder, drafter=str(folder))
    decoder = load(folder, drafter=str(folder), trust_remote_code=True)
    assert isinstance(decoder.drafter, ModelDrafter)
    assert type(decoder.drafter.model).__name__ == "OwnForCausalLM"
    assert (
        decoder.generate([3, 5, 7], max_new_tokens=6).tokens
        == decoder.generate_plain([3, 5, 7], max_new_tokens=6).tokens
    )


def test_a_draft_inside_another_drafter(folder: Path) -> None:
    decoder = load(folder, drafter="hybrid", drafter_options={"neural": str(folder)}, trust_remote_code=True)
    assert isinstance(decoder.drafter, HybridDrafter)
    target, draft = tiny_pairs.tokenizers()
    options = {"draft": str(folder), "draft_tokenizer": draft, "method": "tli"}
    with pytest.raises(UnsupportedModelError, match="cannot load a model from"):
        load(folder, drafter="cross_vocab", tokenizer=target, drafter_options=options)
    decoder = load(folder, drafter="cross_vocab", tokenizer=target, drafter_options=options, trust_remote_code=True)
    assert isinstance(decoder.drafter, CrossVocabDrafter)
