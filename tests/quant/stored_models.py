"""Tiny models whose layers every format can take, in folders of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
from safetensors.torch import load_file, save_file

FORMATS = (
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4-a8",
    "int4-a8",
    "mxint8",
    "int8",
    "int4",
    "int4-g64-asym",
    "sparse-60",
    "sparse-2x4",
)
_WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def tiny(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    return tiny_models.tiny(name, dtype=dtype, **({"n_embd": 64} if name == "gpt2" else _WIDE), **changes)


def saved(folder: Path, name: str = "llama", **changes: Any) -> Path:
    tiny(name, **changes).save_pretrained(folder)
    return folder


def edited(folder: Path, out: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model's folder with other tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def configured(folder: Path, out: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a model's folder with another configuration."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    edit(config)
    (out / "config.json").write_text(json.dumps(config))
    return out


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    mine, its = a.state_dict(), b.state_dict()
    return mine.keys() == its.keys() and all(
        mine[name].dtype == its[name].dtype and torch.equal(mine[name], its[name]) for name in mine
    )
