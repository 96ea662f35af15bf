"""Tensors and configurations of a folder of weights, read without running code from it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.errors import SpecdecError, UnsupportedModelError

# What code stumbles over that was given a word for a number, or a size below one.
_STUMBLES = (ArithmeticError, AttributeError, LookupError, RuntimeError, StrictDataclassError, TypeError, ValueError)


@contextmanager
def describing(what: str) -> Iterator[None]:
    """Around code that makes something of a configuration's fields: `UnsupportedModelError` where they make no sense.

    What it says is the last line of what the code stumbled over, which names the field in errors of `transformers`.
    """
    try:
        yield
    except SpecdecError:
        raise
    except _STUMBLES as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedModelError(
            f"config.json describes no {what}: {lines[-1] if lines else type(error).__name__}; download it again"
        ) from error


def names_of(config: Mapping[str, Any]) -> list[str]:
    """The model classes that a configuration names; none where it names them in another way than as a list of words."""
    named = config.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder. Raises `UnsupportedModelError` where there is none, or none that can be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}; give a folder with a config.json") from error
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{path} is not a JSON object")
    return config


def load_pickled(path: Path, location: str = "cpu", mmap: bool = False) -> Any:
    """What a pickled file holds, read with `weights_only=True`, which runs no code. Raises `UnsupportedModelError`."""
    try:
        # torch maps no files in its format of before 2020.
        return torch.load(path, map_location=location, weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsupportedModelError(
            f"cannot read {path}: it is pickled with code that would run, or damaged; convert it where you trust it, "
            "with safetensors.torch.save_file(dict of tensors, file)"
        ) from error
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"cannot read {path}: {first}") from error


def _indexed(path: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UnsupportedModelError(f"{path} cannot be read: {error}; download it again") from error
    names = named.get("weight_map") if isinstance(named, Mapping) else None
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for name in names.values()):
        raise UnsupportedModelError(f"{path} has no weight_map of file names; download it again")
    return sorted(set(names.values()))


def _files(folder: Path) -> list[Path]:
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            # A name is a file beside the index, never a path that leads elsewhere.
            return [folder / Path(name).name for name in _indexed(folder / index)]
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not found:
        raise UnsupportedModelError(f"{folder} holds no weights: neither *.safetensors nor pytorch_model.bin")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's weights by name, on the CPU, as they are stored; safetensors are preferred.

    Raises `UnsupportedModelError` where they cannot be read without running code.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(folder):
        try:
            content = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise UnsupportedModelError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
        if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
            raise UnsupportedModelError(f"{path} is not a table of tensors")
        tensors.update(content)
    return tensors
