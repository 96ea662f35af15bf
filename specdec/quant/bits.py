"""Codes of a few bits as bytes: each row one little-endian bit string.

Code i of a row lies in bits [b*i, b*i + b) of the row's bytes, low bits first. Shape suffixes: N rows, K codes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specdec.errors import InputError

#: Widths of codes, and how many codes fill whole bytes.
WIDTHS = {4: 2, 6: 4, 8: 1}
_ON_CPU, _ON_DEVICE = 1 << 17, 1 << 24


def packed_bytes(K: int, bits: int) -> int:
    """Bytes of a row of K codes. `InputError` for other widths than 4, 6 and 8, or when the row ends within a byte."""
    if bits not in WIDTHS:
        raise InputError(f"codes of {bits} bits cannot be packed; choose one of {', '.join(map(str, WIDTHS))}")
    if K % WIDTHS[bits]:
        raise InputError(f"rows of {K} codes of {bits} bits end within a byte; K must be a multiple of {WIDTHS[bits]}")
    return K * bits // 8


def pack_bits(codes_NK: Tensor, bits: int) -> Tensor:
    """uint8 codes `[..., K]` below `2**bits` as bytes `[..., K * bits / 8]`; higher bits must be zero."""
    size = packed_bytes(codes_NK.shape[-1], bits)
    if codes_NK.dtype != torch.uint8:
        raise InputError(f"codes to pack are uint8; found {codes_NK.dtype}")
    if bits == 8:
        return codes_NK
    groups = codes_NK.unflatten(-1, (-1, WIDTHS[bits])).unbind(-1)
    out = codes_NK.new_empty(*codes_NK.shape[:-1], size)
    if bits == 4:
        return torch.bitwise_or(groups[0], groups[1] << 4, out=out)
    a, b, c, d = groups
    out[..., 0::3] = a | b << 6
    out[..., 1::3] = b >> 2 | c << 4
    out[..., 2::3] = c >> 4 | d << 2
    return out


def unpack_bits(packed: Tensor, bits: int, K: int) -> Tensor:
    """The codes `[..., K]` of bytes `[..., K * bits / 8]`. `InputError` for any other size or dtype."""
    size = packed_bytes(K, bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != size:
        raise InputError(
            f"{K} codes of {bits} bits are {size} bytes of uint8; found {packed.shape[-1]} of {packed.dtype}"
        )
    if bits == 8:
        return packed
    out = packed.new_empty(*packed.shape[:-1], K)
    if bits == 4:
        out[..., 0::2] = packed & 15
        out[..., 1::2] = packed >> 4
        return out
    x, y, z = packed.unflatten(-1, (-1, 3)).unbind(-1)
    out[..., 0::4] = x & 63
    out[..., 1::4] = (x >> 6 | y << 2) & 63
    out[..., 2::4] = (y >> 4 | z << 4) & 63
    out[..., 3::4] = z >> 2
    return out


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices of rows small enough that what is computed from one stays in the cache, and peak memory small."""
    N, K = matrix.shape
    step = max(1, (_ON_CPU if matrix.device.type == "cpu" else _ON_DEVICE) // max(1, K))
    return (slice(start, min(start + step, N)) for start in range(0, N, step))
