"""Keys and values in fewer bits: how a cache stores a row, in torch. `specdec/kernels/native/kv.h` does the same.

A row is what one layer keeps of one head for one token. It is rounded once, when it is written; whoever reads it, in
the same step or later, reads what the stored codes stand for. So a text depends on what is stored and on nothing else,
and speculative and plain decoding on the same kind of cache agree as they do on one that rounds nothing.

Shape suffixes: D numbers of a row.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError, UnsupportedModelError
from specdec.kernels.packed import rounded_rows
from specdec.quant.blocks import BLOCK, ELEMENTS, block_codes, block_scales, block_values


class KVFormat(ABC):
    """One way of storing rows of keys and values. Stateless.

    Lossless: no, keys and values are rounded; decoding on them is as lossless as it is without.
    """

    name: str

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """Of a row of `size` numbers, exactly."""

    @abstractmethod
    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Float rows `[..., D]` as codes `[..., D]`, a byte each, and scales `[..., S]`.

        float64 is rounded to float32 first. What shares a scale with a NaN or an infinity comes back as NaN.
        """

    @abstractmethod
    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """`[..., D]`: what is stored, exact in float32, then rounded to `dtype` once."""

    def obstacle(self, size: int) -> str | None:
        """Why rows of `size` numbers cannot be stored, in a few words; None when they can."""
        return None

    def check(self, size: int, where: str) -> None:
        """`UnsupportedModelError`, naming the place and the size, when rows of `size` numbers cannot be stored."""
        reason = self.obstacle(size)
        if reason:
            raise UnsupportedModelError(
                f"{where} has heads of size {size}, and {reason}; use kv_cache='int8', which takes any size"
            )


class Int8Rows(KVFormat):
    """int8 codes and one float32 scale per row: its largest magnitude becomes 127, ties go to even. D + 4 bytes."""

    name = "int8"

    def num_bytes(self, size: int) -> int:
        return size + torch.float32.itemsize

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        codes, scales = rounded_rows(rows.reshape(-1, rows.shape[-1]))
        broken = ~torch.isfinite(scales)
        codes, scales = codes.masked_fill_(broken, 0), scales.masked_fill_(broken, torch.nan)
        return codes.view(rows.shape), scales.view(*rows.shape[:-1], 1)

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return (codes.float() * scales).to(dtype)


class MXFP8Rows(KVFormat):
    """E4M3 codes and one E8M0 scale per block of 32 (OCP Microscaling v1.0, floor rule). 33 bytes per 32 numbers."""

    name = "mxfp8"
    element = ELEMENTS["mxfp8_e4m3"]

    def num_bytes(self, size: int) -> int:
        return size + size // BLOCK

    def pack(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = block_scales(rows, self.element, nonfinite="nan")
        return block_codes(rows, scales, self.element), scales

    def unpack(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return block_values(codes, scales, self.element).to(dtype)

    def obstacle(self, size: int) -> str | None:
        return f"mxfp8 stores blocks of {BLOCK}" if size % BLOCK else None


_FORMATS: dict[str, KVFormat] = {format.name: format for format in (Int8Rows(), MXFP8Rows())}
#: Names for `kv_cache=`; None stores keys and values as the model computes them.
KV_CACHES = tuple(_FORMATS)


def kv_format(name: str | None) -> KVFormat | None:
    """The format of that name; None for None. `InputError` that lists those there are."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in _FORMATS:
        near = difflib.get_close_matches(str(name), KV_CACHES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no kv_cache is called {name!r}; {hint}there are: {', '.join(KV_CACHES)}, and None for neither"
        )
    return _FORMATS[name]


def bytes_per_token(config: Any, dtype: torch.dtype, kv_cache: str | None = None) -> int | None:
    """Bytes of keys and values that one token takes in all layers, by a model's configuration.

    None when the configuration does not tell, as for models that keep something else than keys and values. Raises
    `UnsupportedModelError` when the format cannot store rows of this size. A loaded model's backend measures it:
    `backend.bytes_per_token`.
    """
    config = config.get_text_config(decoder=True)
    heads, format = getattr(config, "num_attention_heads", None), kv_format(kv_cache)
    if not isinstance(heads, int) or getattr(config, "kv_lora_rank", None) is not None:
        return None
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    if not isinstance(kv_heads, int):
        return None
    if format is not None:
        format.check(size, "the model")
    row = size * dtype.itemsize if format is None else format.num_bytes(size)
    return 2 * int(config.num_hidden_layers) * kv_heads * row
