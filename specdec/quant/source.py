"""A checkpoint as it lies on the disk: its tensors one at a time, and which of them a model's layer takes.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from specdec.errors import InputError, UnsupportedModelError

INDEX = "model.safetensors.index.json"
#: What stands beside weights and belongs to the model; never code.
COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def local_folder(source: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id, downloaded now: safetensors, configuration and tokenizer only.

    Raises `UnsupportedModelError` where there is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    if str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
        raise UnsupportedModelError(f"{source}: no such folder")
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", *COMPANIONS], ignore_patterns=["*/*"]))
        # Repositories may hold other layouts of the same weights: only what the index names is wanted.
        names = _indexed(folder / INDEX) if (folder / INDEX).is_file() else ["model.safetensors"]
        found = snapshot_download(str(source), allow_patterns=["*.json", *COMPANIONS, *names], ignore_patterns=["*/*"])
        return Path(found)
    except UnsupportedModelError:
        raise
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"cannot download {source}: {first}; give a folder") from error


def _indexed(index: Path) -> list[str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        # A name is a file beside the index, never a path that leads elsewhere.
        return sorted({Path(name).name for name in table.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{index} is not an index of weights; download it again") from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = _indexed(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UnsupportedModelError(
                f"{folder} lacks {missing[0]}, one of {len(names)} files that its index names; download it again"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir()):
        raise UnsupportedModelError(
            f"{folder} has pickled weights only, which can run code when read; convert it once with "
            "model.save_pretrained(folder), which writes safetensors"
        )
    raise UnsupportedModelError(f"{folder} holds no weights: neither model.safetensors nor {INDEX}")


class Checkpoint:
    """The tensors of a folder of safetensors, sharded or not, read when asked for.

    Raises `UnsupportedModelError` for files that are missing, damaged, or pickled.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = folder, _weight_files(folder)
        self.tensors: dict[str, Stored] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self.files:
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                piece = handle.get_slice(name)
                if piece.get_dtype() not in _DTYPES:
                    raise UnsupportedModelError(f"{name} in {file} is {piece.get_dtype()}, which cannot be read here")
                if name in self.tensors:
                    raise UnsupportedModelError(f"{name} is both in {self.tensors[name].file.name} and {file.name}")
                self.tensors[name] = Stored(file, tuple(piece.get_shape()), _DTYPES[piece.get_dtype()])

    @property
    def num_bytes(self) -> int:
        return sum(stored.num_bytes for stored in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor; its pages are the file's own, and are read when touched."""
        tensor: Tensor = self._handle(self.tensors[name].file).get_tensor(name)
        return tensor

    def read_rows(self, name: str, rows: slice, transposed: bool = False) -> Tensor:
        """Rows `[n, K]` of a matrix; of its transpose where the file holds `[K, N]`."""
        piece = self._handle(self.tensors[name].file).get_slice(name)
        found: Tensor = piece[:, rows].T.contiguous() if transposed else piece[rows]
        return found

    def digests(self) -> dict[str, str]:
        """sha256 of each file."""
        found = {}
        for file in self.files:
            digest = hashlib.sha256()
            with file.open("rb") as content:
                while piece := content.read(1 << 22):
                    digest.update(piece)
            found[file.name] = digest.hexdigest()
        return found

    def close(self) -> None:
        self._open = None

    def _handle(self, file: Path) -> Any:
        """One file is open at a time."""
        if self._open is None or self._open[0] != file:
            try:
                self._open = (file, safe_open(file, "pt"))
            except (OSError, SafetensorError) as error:
                raise UnsupportedModelError(
                    f"cannot read {file}: {str(error).splitlines()[0]}; it is damaged or cut short: download it again"
                ) from error
        return self._open[1]


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """`UnsupportedModelError` where it cannot be read, or says that the weights are quantised already."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"cannot read the configuration of {folder}: {first}") from error
    found = getattr(config, "quantization_config", None)
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", "?")
        raise UnsupportedModelError(
            f"{folder} is quantised already ({method}); start from the full-precision checkpoint"
        )
    return config


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The model that `config` describes, without weights: on the meta device."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"no causal language model can be made of this configuration: {first}") from error


def model_names(model: Any, keys: list[str]) -> dict[str, str]:
    """`{key of the checkpoint: name in the model}`, as `from_pretrained` would find it.

    Only keys that stand for one of the model's tensors as a whole: those that transformers splits or merges are left
    out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    wanted = model.state_dict()
    found = {}
    for key in keys:
        name, merged = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name, merged = key, None
        if merged is None and name in wanted:
            found[key] = name
    return found


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """`InputError` unless a folder of results can stand there; `overwrite` replaces model folders only."""
    parent = out.resolve().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--out {out}: cannot write into {parent}")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
        raise InputError(f"--out {out} holds the model that is read; choose another folder")
    if any(out.iterdir()):
        if not overwrite:
            raise InputError(f"--out {out} is not empty; choose another folder, or add --overwrite")
        if not (out / "config.json").is_file():
            raise InputError(f"--out {out} is no model folder, and is not overwritten; choose another")
