"""Tensors and configurations of a folder of weights, read without running code from it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.errors import UnsupportedModelError


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder. Raises `UnsupportedModelError` where there is none, or none that can be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}; give a folder with a config.json") from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path} is not a JSON object")
    return config


def _files(folder: Path) -> list[Path]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            names = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            # A name is a file beside the index, never a path that leads elsewhere.
            return [folder / Path(name).name for name in sorted(set(names))]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not found:
        raise UnsupportedModelError(f"{folder} holds no weights: neither *.safetensors nor pytorch_model.bin")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weights by name, on the CPU, as they are stored; safetensors are preferred.

    Pickled files are read with `weights_only=True`, which runs no code. Raises `UnsupportedModelError`.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            content = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
            raise UnsupportedModelError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UnsupportedModelError(f"{path} is not a table of tensors")
        tensors.update(content)
    return tensors
