"""The streams of delta-CSC: which values of a matrix are left, the gaps between them, and how many each column has.

See `specdec.quant.delta_csc` for the layout. Shape suffixes: N columns, K rows of a column, E stored values.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import row_chunks
from specdec.quant.format import Parts

GAPS = range(2, 7)  # bits
DEFAULT_GAP = 4


def encode(dense_NK: Tensor, gap: int = DEFAULT_GAP) -> dict[str, Tensor]:
    """`values` (of the dtype of `dense_NK`, 8 or 16 bits each), `gaps` and `counts` of a matrix on the CPU."""
    check_gap(gap)
    N, K = dense_NK.shape
    counts = np.zeros(N, np.int64)
    gaps, values = [np.zeros(0, np.uint8)], [dense_NK.new_zeros(0)]
    for rows in row_chunks(dense_NK):
        block = dense_NK[rows]
        codes, ends, counts[rows] = _block_gaps((block != 0).numpy(), gap)
        entries = block.new_zeros(len(codes))
        entries[torch.from_numpy(ends - 1)] = block[block != 0]
        gaps.append(codes)
        values.append(entries)
    packed = pack_codes(np.concatenate(gaps), gap)
    return {"values": torch.cat(values), "gaps": packed, "counts": torch.from_numpy(counts).to(count_dtype(K))}


def _block_gaps(kept_NK: NDArray, gap: int) -> tuple[NDArray, NDArray, NDArray]:
    """Gap codes of all entries; behind which entry each kept value ends; and the count of each column."""
    K, longest = kept_NK.shape[1], (1 << gap) - 1
    flat = np.flatnonzero(kept_NK)
    row = flat // K
    first = np.ones(len(flat), bool)
    first[1:] = row[1:] != row[:-1]
    before = np.empty_like(flat)
    before[1:] = flat[:-1]
    before[first] = row[first] * K - 1
    skipped = flat - before - 1
    ends = np.cumsum((skipped >> gap) + 1)
    codes = np.full(ends[-1] if len(ends) else 0, longest, np.uint8)
    codes[ends - 1] = skipped & longest
    bounds = np.concatenate(([0], np.cumsum(kept_NK.sum(1))))
    return codes, ends, np.diff(np.concatenate(([0], ends))[bounds])


def decode(tensors: Parts, N: int, K: int, gap: int, where: str = "in delta-CSC") -> Tensor:
    """The matrix `[N, K]` of `values`, `gaps` and `counts`. `InputError`, ending in `where`, for damaged streams."""
    out = tensors["values"].new_zeros(N, K)
    for rows, entries, flat in _blocks(tensors, N, K, gap, where):
        out[rows].view(-1)[torch.from_numpy(flat)] = tensors["values"][entries]
    return out


def check_streams(tensors: Parts, N: int, K: int, gap: int, where: str = "in delta-CSC") -> None:
    """What `decode` checks, without making the matrix."""
    for _ in _blocks(tensors, N, K, gap, where):
        continue


def _blocks(tensors: Parts, N: int, K: int, gap: int, where: str) -> Iterator[tuple[slice, slice, NDArray]]:
    """Some columns after others: which, which entries are theirs, and where in the flattened block each one stands."""
    check_gap(gap)
    counts = checked_counts(tensors["counts"], N, K, where)
    values, num_stored = tensors["values"], int(counts.sum())
    if values.shape != (num_stored,):
        raise InputError(
            f"'values' {where} is [{num_stored}], as the counts say; found {list(values.shape)}: the file is damaged"
        )
    if values.is_floating_point() and not torch.isfinite(values).all():
        raise InputError(f"'values' {where} hold NaN or infinite numbers; the file is damaged")
    codes = unpack_codes(tensors["gaps"], gap, num_stored, f"'gaps' {where}")
    starts = np.concatenate(([0], np.cumsum(counts)))
    for rows in row_chunks(torch.empty(N, K, dtype=torch.uint8, device="meta")):
        entries = slice(starts[rows.start], starts[rows.stop])
        flat = _block_positions(codes[entries], counts[rows], K, where)
        _check_dummies(values[entries] == 0, codes[entries], counts[rows], gap, where)
        yield rows, entries, flat


def _block_positions(codes: NDArray, counts: NDArray, K: int, where: str) -> NDArray:
    """Where each entry stands in the flattened block."""
    starts = np.concatenate(([0], np.cumsum(counts)))
    passed = np.concatenate(([0], np.cumsum(codes.astype(np.int64) + 1)))
    lengths = passed[starts[1:]] - passed[starts[:-1]]
    if (lengths > K).any():
        raise InputError(
            f"'gaps' {where} reach input {int(lengths.max())} of {K} in one column: the file is damaged, or was "
            "written with another gap width"
        )
    base = np.arange(len(counts)) * K - passed[starts[:-1]]
    flat: NDArray = passed[1:] + np.repeat(base, counts) - 1
    return flat


def _check_dummies(zero_E: Tensor, codes: NDArray, counts: NDArray, gap: int, where: str) -> None:
    zeros = zero_E.numpy()
    last = np.cumsum(counts)[counts > 0] - 1
    if (zeros & (codes != (1 << gap) - 1)).any() or zeros[last].any():
        raise InputError(
            f"'values' {where} hold a zero that no gap needs: the file is damaged, or has another gap width"
        )


def checked_counts(counts_N: Tensor, N: int, K: int, where: str) -> NDArray:
    if counts_N.shape != (N,):
        raise InputError(f"'counts' {where} is [{N}]; found {list(counts_N.shape)}")
    counts: NDArray = counts_N.to(torch.int64).numpy()
    if N and (counts.min() < 0 or counts.max() > K):
        wrong = counts[(counts < 0) | (counts > K)][0]
        raise InputError(f"'counts' {where} has {wrong} stored values in a column of {K}; the file is damaged")
    return counts


def count_dtype(K: int) -> torch.dtype:
    return torch.uint16 if K < 1 << 16 else torch.int32


def check_gap(gap: int) -> None:
    if gap not in GAPS:
        raise InputError(f"gaps have {GAPS[0]} to {GAPS[-1]} bits, not {gap}")


def pack_codes(codes: NDArray, bits: int) -> Tensor:
    """uint8 codes as one bit string: eight of them are `bits` bytes."""
    eights = np.zeros((-(-len(codes) // 8), 8), np.uint8)
    eights.reshape(-1)[: len(codes)] = codes
    words = np.zeros(len(eights), "<u8")
    for i in range(8):
        words |= eights[:, i].astype("<u8") << np.uint64(bits * i)
    packed = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)
    return torch.from_numpy(packed[: -(-len(codes) * bits // 8)].copy())


def unpack_codes(stream: Tensor, bits: int, count: int, what: str) -> NDArray:
    """`count` codes of a bit string, which must end there, on zero bits."""
    size = -(-count * bits // 8)
    if stream.dtype != torch.uint8 or stream.shape != (size,):
        raise InputError(
            f"{what} is {size} bytes for {count} codes of {bits} bits; found {stream.dtype} {list(stream.shape)}: "
            "the file is damaged, or was written with another gap width"
        )
    groups = -(-count // 8)
    padded = np.zeros(groups * bits, np.uint8)
    padded[:size] = stream.numpy()
    eights = np.zeros((groups, 8), np.uint8)
    eights[:, :bits] = padded.reshape(groups, bits)
    words = eights.view("<u8").reshape(-1)
    codes = np.empty(groups * 8, np.uint8)
    for i in range(8):
        codes[i::8] = (words >> np.uint64(bits * i)) & np.uint64((1 << bits) - 1)
    if codes[count:].any():
        raise InputError(f"{what} does not end on zero bits; the file is damaged")
    return codes[:count]
