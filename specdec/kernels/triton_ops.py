"""Batch-invariant kernels for GPUs, in Triton: products, norms and attention whose rows do not know of each other.

One program text and one tile per weight shape serve every number of rows, and no sum is split by it: an output is
accumulated over the same tiles in the same order whether its row is alone or one of many. `specdec/kernels/twin.py`
says the same in plain torch; Triton's interpreter (`TRITON_INTERPRET=1`) runs these very kernels on the CPU.

Shape suffixes: M rows of one step, K inputs, N outputs, H query heads, V key/value heads, G query heads per key/value
head, D key size, E value size, C slots of a cache, S parts of a row's keys.
"""

# Kernels are compiled from their source by Triton, and have no types of Python's.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.plan import FIELDS, PARTS, TILE, Layout, views

_ROWS = 16  # of one tile of a product: the least that tensor cores take, whatever the number of rows
# Rows of one attention launch: bounds its scratch. Rows do not know of each other, so cutting changes no bit.
_LAUNCH = 64
_ACCUMULATE = {torch.float64: tl.float64}
# The interpreter multiplies numpy arrays, which have no bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _bits(dtype: torch.dtype) -> Any:
    return _ACCUMULATE.get(dtype, tl.float32)


@triton.jit(do_not_specialize=["M"])
def _linear(
    x, w, bias, y, M, N, K,
    BIAS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # Row tiles vary fastest: those that read the same weights run side by side, and the cache serves all but one.
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    k = tl.arange(0, BK)
    x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = w + col[:, None] * K + k[None, :]
    acc = tl.zeros((BM, BN), dtype=ACC)
    for start in range(0, K, BK):
        if EVEN:
            a = tl.load(x_at + start, mask=(row < M)[:, None], other=0.0)
            b = tl.load(w_at + start, mask=(col < N)[:, None], other=0.0)
        else:
            inside = (start + k < K)[None, :]
            a = tl.load(x_at + start, mask=(row < M)[:, None] & inside, other=0.0)
            b = tl.load(w_at + start, mask=(col < N)[:, None] & inside, other=0.0)
        if WIDE:
            a, b = a.to(ACC), b.to(ACC)
        acc = tl.dot(a, tl.trans(b), acc, input_precision="ieee", out_dtype=ACC)
    if BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(ACC)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=(row < M)[:, None] & (col < N)[None, :])


def _linear_tile(num_outputs: int, num_inputs: int, itemsize: int) -> tuple[int, int, int]:
    """Outputs and inputs of one tile, and warps: from the weight's shape alone, never from the rows.

    Narrow weights take narrow tiles, so that there are enough programs to read memory at its speed.
    """
    outputs = 16 if num_outputs < 8192 else 32 if num_outputs < 32768 else 64
    inputs = max(16, min((512 if outputs == 16 else 256) // itemsize, triton.next_power_of_2(num_inputs)))
    return outputs, inputs, 2 if outputs == 16 else 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times `weight [N, K]` transposed, plus `bias [N]`: `[..., N]`.

    float16, bfloat16, float32 (accumulated in float32 and rounded once; no TF32) or float64, all of one type on one
    CUDA device. A row's bits do not depend on the number of rows.

    Lossless: yes.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    num_rows, num_inputs = flat.shape
    num_outputs = weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    block_n, block_k, warps = _linear_tile(num_outputs, num_inputs, x.dtype.itemsize)
    if num_rows:
        _linear[(triton.cdiv(num_rows, _ROWS), triton.cdiv(num_outputs, block_n))](
            flat, weight, weight if bias is None else bias, out, num_rows, num_outputs, num_inputs,
            BIAS=bias is not None, EVEN=num_inputs % block_k == 0, WIDE=INTERPRETED, ACC=_bits(x.dtype),
            BM=_ROWS, BN=block_n, BK=block_k, num_warps=warps, num_stages=4,
        )  # fmt: skip
    return out.view(*x.shape[:-1], num_outputs)


@triton.jit
def _row_sum(x, y, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    lanes = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, N, BLOCK):
        lanes += tl.load(x + row * N + start + at, mask=start + at < N, other=0.0).to(ACC)
    tl.store(y + row, tl.sum(lanes, 0).to(y.dtype.element_ty))


def row_sum(x: Tensor) -> Tensor:
    """Sums over the last axis `[..., K] -> [...]`, in x's dtype; each is accumulated in one order.

    Lossless: yes.
    """
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(flat.shape[0], dtype=x.dtype, device=x.device)
    if flat.shape[0]:
        block = min(4096, triton.next_power_of_2(flat.shape[1]))
        _row_sum[(flat.shape[0],)](flat, out, flat.shape[1], ACC=_bits(x.dtype), BLOCK=block, num_warps=4)
    return out.view(x.shape[:-1])


@triton.jit
def _store(
    k, v, rows, offset, k_head, k_row, v_head, v_row,
    V: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.load(rows + row * F + 4)
    if slot >= 0:
        memory = tl.load(rows + row * F).to(tl.pointer_type(k.dtype.element_ty))
        capacity = tl.load(rows + row * F + 1)
        d = tl.arange(0, BD)
        e = tl.arange(0, BE)
        key = tl.load(k + head * k_head + row * k_row + d, mask=d < D)
        value = tl.load(v + head * v_head + row * v_row + e, mask=e < E)
        tl.store(memory + (offset + head * D) * capacity + slot * D + d, key, mask=d < D)
        tl.store(memory + (offset + V * D + head * E) * capacity + slot * E + e, value, mask=e < E)


@triton.jit
def _share(position, length, WINDOW: tl.constexpr, BS: tl.constexpr, PARTS_MAX: tl.constexpr):
    """First position that a row sees, its first and last tile, and tiles per part: from the row's own place alone."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    begin = first // BS
    end = (length + BS - 1) // BS
    each = tl.maximum((end - begin + PARTS_MAX - 1) // PARTS_MAX, 1)
    return first, begin, end, each


# One program for all steps: nothing is compiled anew for the strides of some number of rows, or for launched parts.
@triton.jit(do_not_specialize=["T", "q_head", "q_row", "num_parts"])
def _attend_part(
    q, rows, tail, positions, mixed, top, total, offset, T, q_head, q_row, num_parts,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    V: tl.constexpr, G: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, F: tl.constexpr,
    PARTS_MAX: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    memory = tl.load(rows + row * F).to(tl.pointer_type(q.dtype.element_ty))
    capacity = tl.load(rows + row * F + 1)
    plain = tl.load(rows + row * F + 2)
    length = tl.load(rows + row * F + 3)
    first, begin, end, each = _share(tl.load(positions + row), length, WINDOW, BS, PARTS_MAX)
    low = begin + part * each
    high = tl.minimum(low + each, end)
    if low < high:
        g = tl.arange(0, BG)
        d = tl.arange(0, BD)
        e = tl.arange(0, BE)
        query = tl.load(
            q + (head * G + g)[:, None] * q_head + row * q_row + d[None, :],
            mask=(g < G)[:, None] & (d < D)[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            query = query.to(ACC)
        keys_at = memory + (offset + head * D) * capacity
        values_at = memory + (offset + V * D + head * E) * capacity
        highest = tl.full((BG,), float("-inf"), dtype=ACC)
        weight = tl.zeros((BG,), dtype=ACC)
        acc = tl.zeros((BG, BE), dtype=ACC)
        for tile in range(low, high):
            j = tile * BS + tl.arange(0, BS)
            seen = (j >= first) & (j < length)
            late = tl.load(tail + row * T + (j - plain), mask=seen & (j >= plain), other=0)
            slot = tl.where(j < plain, j, late)
            keys = tl.load(keys_at + slot[:, None] * D + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
            values = tl.load(
                values_at + slot[:, None] * E + e[None, :], mask=seen[:, None] & (e < E)[None, :], other=0.0
            )
            if WIDE:
                keys, values = keys.to(ACC), values.to(ACC)
            scores = tl.dot(query, tl.trans(keys), input_precision="ieee", out_dtype=ACC) * SCALE
            if SOFTCAP > 0:
                # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both ends
                scores = SOFTCAP * (1.0 - 2.0 / (tl.exp(scores * (2.0 / SOFTCAP)) + 1.0))
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            fade = tl.exp(highest - higher)
            share = tl.exp(scores - higher[:, None])
            weight = weight * fade + tl.sum(share, 1)
            acc = acc * fade[:, None]
            acc = tl.dot(share.to(values.dtype), values, acc, input_precision="ieee", out_dtype=ACC)
            highest = higher
        at = (row.to(tl.int64) * V * G + head * G + g) * num_parts + part
        tl.store(top + at, highest, mask=g < G)
        tl.store(total + at, weight, mask=g < G)
        tl.store(mixed + at[:, None] * E + e[None, :], acc, mask=(g < G)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["num_parts"])
def _attend_merge(
    out, rows, positions, mixed, top, total, num_parts,
    WINDOW: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BS: tl.constexpr, F: tl.constexpr,
    PARTS_MAX: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(rows + row * F + 3)
    _, begin, end, each = _share(tl.load(positions + row), length, WINDOW, BS, PARTS_MAX)
    e = tl.arange(0, BE)
    highest = tl.full((1,), float("-inf"), dtype=ACC)
    weight = tl.zeros((1,), dtype=ACC)
    acc = tl.zeros((BE,), dtype=ACC)
    first = (row * H + head) * num_parts
    for at in range(first, first + (end - begin + each - 1) // each):
        here = tl.load(top + at)
        higher = tl.maximum(highest, here)
        fade = tl.exp(highest - higher)
        share = tl.exp(here - higher)
        weight = weight * fade + tl.load(total + at) * share
        acc = acc * fade + tl.load(mixed + at * E + e, mask=e < E, other=0.0) * share
        highest = higher
    if end > begin:  # rows that pad a step to its width see nothing
        acc = acc / weight
    tl.store(out + (row * H + head) * E + e, acc.to(out.dtype.element_ty), mask=e < E)


class TritonKernels:
    """`linear`, `row_sum` and `attend` on the keys and values of sequences that `layout` describes.

    `num_parts`: parts that are launched per row, set before a call; at least what the longest row of it takes
    (`plan.num_parts`). It changes no bit.
    """

    def __init__(self, layout: Layout):
        self.layout = layout
        self.num_parts = PARTS
        self.linear = linear
        self.row_sum = row_sum

    def register(self, memory: Tensor) -> None:
        """Kernels follow the addresses of the plan by themselves."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor:
        """Writes the new rows `k [1, V, M, D]` and `v [1, V, M, E]`, and attends `q [1, H, M, D]`: `[1, M, H, E]`.

        `handle` is the step's plan. Query heads share key/value heads in groups of H / V; logits are scaled, then, with
        a `softcap`, softcap * tanh(logits / softcap); with a `window`, a row at position t sees positions above
        t - window only. A row is accumulated over tiles of positions, in their order: other rows, the capacity, and
        the slots in which its ancestors stand change none of its bits.

        Lossless: yes.
        """
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        num_kv, size, value_size = self.layout.heads[layer]
        num_heads, num_rows = q.shape[1], q.shape[2]
        offset = self.layout.offsets[layer]
        plan = views(handle, num_rows)
        wide, acc = INTERPRETED, _bits(q.dtype)
        blocks = {"BE": max(16, triton.next_power_of_2(value_size)), "F": FIELDS}
        block_d = max(16, triton.next_power_of_2(size))
        group = num_heads // num_kv
        _store[(num_rows, num_kv)](
            k, v, plan.rows, offset, k.stride(1), k.stride(2), v.stride(1), v.stride(2),
            V=num_kv, D=size, E=value_size, BD=block_d, **blocks, num_warps=1,
        )  # fmt: skip
        out = torch.empty(1, num_rows, num_heads, value_size, dtype=q.dtype, device=q.device)
        count = min(num_rows, _LAUNCH)
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        mixed = torch.empty(count, num_heads, self.num_parts, value_size, dtype=exact, device=q.device)
        top, total = (torch.empty(count, num_heads, self.num_parts, dtype=exact, device=q.device) for _ in range(2))
        for low in range(0, num_rows, _LAUNCH):
            high = min(low + _LAUNCH, num_rows)
            rows, positions, tail = plan.rows[low:high], plan.positions[low:high], plan.tail[low:high]
            _attend_part[(high - low, num_kv, self.num_parts)](
                q[:, :, low:], rows, tail, positions, mixed, top, total, offset, tail.shape[1], q.stride(1),
                q.stride(2), self.num_parts, SCALE=scale, SOFTCAP=softcap, WINDOW=window, V=num_kv, G=group, D=size,
                E=value_size, BG=max(16, triton.next_power_of_2(group)), BD=block_d, BS=TILE, PARTS_MAX=PARTS, ACC=acc,
                WIDE=wide, **blocks, num_warps=4, num_stages=2,
            )  # fmt: skip
            _attend_merge[(high - low, num_heads)](
                out[:, low:], rows, positions, mixed, top, total, self.num_parts, WINDOW=window, H=num_heads,
                E=value_size, BS=TILE, PARTS_MAX=PARTS, ACC=acc, **blocks, num_warps=1,
            )  # fmt: skip
        return out
