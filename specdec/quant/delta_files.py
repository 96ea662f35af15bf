"""Pruned weights in delta-CSC as a safetensors file, with a manifest in its metadata.

Matrix `up_proj` lies in tensors `up_proj.weight_values`, `up_proj.weight_gaps`, ... (see `specdec.quant.delta_csc`);
the manifest is a JSON object with, for each matrix, its format, shape, gap width, and a CRC-32 of every tensor.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.delta_csc import Half, best_gap, check, compress, dense, expand, tensors_of, values_of
from specdec.quant.delta_streams import GAPS
from specdec.quant.format import Format, Parts, parse
from specdec.quant.linear import PREFIX

MANIFEST = "specdec_delta_csc"  # in the file's metadata
_VERSION = 1
_HALVES = {half.name: half for half in (Half(torch.float16), Half(torch.bfloat16))}
_FIELDS = {"format", "outputs", "inputs", "gap", "crc32"}
_LARGEST = 1 << 24  # outputs or inputs: a damaged manifest asks for no more memory than that


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight `[N, K]` in delta-CSC: what `compress` returned, and what `expand` needs to know."""

    format: Format
    N: int
    K: int
    gap: int
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, format: Format, parts: Parts, N: int, K: int, gap: int | None = None) -> Matrix:
        """Of a format's parts; `gap` None takes the best width for as many zeros as there are."""
        if gap is None:
            format.check(parts, N, K)
            zeros = 1 - int(torch.count_nonzero(dense(format, parts))) / max(1, N * K)
            gap = best_gap(zeros, values_of(format).bits, max(1, K))
        return cls(format, N, K, gap, compress(format, parts, N, K, gap))

    @classmethod
    def of_weight(cls, weight_NK: Tensor, gap: int | None = None) -> Matrix:
        """Of a pruned float16 or bfloat16 weight, value by value."""
        half = Half(weight_NK.dtype)
        N, K = weight_NK.shape
        return cls.of(half, half.pack(weight_NK), N, K, gap)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def parts(self, name: str = "a weight") -> dict[str, Tensor]:
        """The format's parts again. `InputError` that names `name` when the tensors are damaged."""
        return expand(self.format, self.tensors, self.N, self.K, self.gap, name)


def save(path: str | Path, matrices: Mapping[str, Matrix]) -> None:
    """Write matrices by name. `InputError` when there are none, or the file cannot be written."""
    if not matrices:
        raise InputError("there are no matrices to save")
    tensors: dict[str, Tensor] = {}
    manifest: dict[str, Any] = {"version": _VERSION, "matrices": {}}
    for name, matrix in matrices.items():
        sums = {}
        for part, tensor in matrix.tensors.items():
            tensors[_tensor_name(name, part)] = tensor.contiguous()
            sums[part] = _crc32(tensor)
        manifest["matrices"][name] = {
            "format": matrix.format.name,
            "outputs": matrix.N,
            "inputs": matrix.K,
            "gap": matrix.gap,
            "crc32": sums,
        }
    try:
        save_file(tensors, path, {"format": "pt", MANIFEST: json.dumps(manifest)})
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {path}: {str(error).splitlines()[0]}") from error


def load(path: str | Path) -> dict[str, Matrix]:
    """The matrices of a file by name.

    Nothing of the file is trusted: `InputError`, naming the tensor, for a manifest or streams that are cut, changed, or
    do not fit together.
    """
    try:
        with safe_open(path, framework="pt") as file:
            entries = _manifest((file.metadata() or {}).get(MANIFEST), path)
            stored = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}; make or copy it again") from error
    matrices = {name: _matrix(name, entry, stored, path) for name, entry in entries.items()}
    if stored:
        raise InputError(f"{path} holds {next(iter(stored))}, of which its manifest does not know; make it again")
    return matrices


def _manifest(text: str | None, path: str | Path) -> dict[str, Any]:
    if text is None:
        raise InputError(f"{path} has no manifest of delta-CSC matrices; give a file that specdec's save wrote")
    try:
        manifest = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"the manifest of {path} is damaged: {error}; make the file again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("matrices"), dict):
        raise InputError(f"the manifest of {path} lists no matrices; make the file again")
    if manifest.get("version") != _VERSION:
        raise InputError(
            f"{path} is of version {manifest.get('version')!r}; this specdec reads version {_VERSION}: "
            "make the file again, or update specdec"
        )
    return dict(manifest["matrices"])


def _matrix(name: str, entry: Any, stored: dict[str, Tensor], path: str | Path) -> Matrix:
    """Takes its tensors out of `stored`."""
    what = f"{name} in the manifest of {path}"
    if not isinstance(entry, dict) or set(entry) != _FIELDS or not isinstance(entry["crc32"], dict):
        raise InputError(f"{what} is damaged: it has {', '.join(sorted(_FIELDS))}; make the file again")
    if not isinstance(entry["format"], str):
        raise InputError(f"{what} names no format; make the file again")
    format = _HALVES.get(entry["format"]) or parse(entry["format"])
    N, K = (_whole(entry[field], range(1, _LARGEST), f"'{field}' of {what}") for field in ("outputs", "inputs"))
    gap = _whole(entry["gap"], GAPS, f"'gap' of {what}")
    tensors = {}
    for part in tensors_of(format, N, K):
        tensor = _tensor_name(name, part)
        if tensor not in stored:
            raise InputError(f"{path} lacks {tensor}; make or copy it again")
        tensors[part] = stored.pop(tensor)
        if entry["crc32"].get(part) != _crc32(tensors[part]):
            raise InputError(f"{tensor} of {path} is not what was saved: its checksum differs; copy the file again")
    check(format, tensors, N, K, gap, f"{name} in {path}")
    return Matrix(format, N, K, gap, tensors)


def _whole(value: Any, allowed: range, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise InputError(f"{what} is a whole number from {allowed[0]} to {allowed[-1]}, not {value!r}")
    return value


def _tensor_name(matrix: str, part: str) -> str:
    return f"{matrix}.{PREFIX}{part}"


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)
