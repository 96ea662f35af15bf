"""The kernels behind `specdec.kernels.triton_packed`: products of rows with codes that are decoded in registers.

Shape suffixes: M rows, K inputs, N outputs, S strips of K.
"""

# Kernels are compiled from their source by Triton, and have no types of Python's.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from specdec.kernels.triton_decode import decoded, nearest, stored


@triton.jit
def _add_strips(acc, BM: tl.constexpr, BN: tl.constexpr):
    """`[4, M, N]` to `[M, N]`: (0 + 1) + (2 + 3), whichever warps hold them."""
    even, odd = tl.split(tl.trans(acc, (1, 2, 0)).reshape(BM, BN, 2, 2))
    low, high = tl.split(even + odd)
    return low + high


@triton.jit(do_not_specialize=["M"])
def product(
    x, codes, scales, zeros, bias, y, M, N, K,
    KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, FIX: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, ZEROS: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    CARRY: tl.constexpr, ACC: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    WORDS: tl.constexpr = 3 if BITS == 6 else 1  # of a unit
    SHAPE: tl.constexpr = (BN, BK) if S == 1 else (S, BN, BK)
    if S == 1:
        acc = tl.zeros((BM, BN), dtype=ACC)
        m, n = row[:, None], col.to(tl.int64)[:, None]
        k = tl.arange(0, BK)[None, :]
        unit = tl.arange(0, BK // UNIT)[None, :]
        group = tl.arange(0, BK // GROUP)[None, :]
    else:
        acc = tl.zeros((S, BM, BN), dtype=ACC)
        m, n = row[None, :, None], col.to(tl.int64)[None, :, None]
        strip = tl.arange(0, S)[:, None, None]
        k = strip * BK + tl.arange(0, BK)[None, None, :]
        unit = strip * (BK // UNIT) + tl.arange(0, BK // UNIT)[None, None, :]
        group = strip * (BK // GROUP) + tl.arange(0, BK // GROUP)[None, None, :]
    x_at = x + m.to(tl.int64) * K + k
    a_at = codes + (n * (K // UNIT) + unit) * WORDS
    scales_at = scales + n * (K // GROUP) + group
    zeros_at = zeros + n * (K // GROUP) + group
    inside = n < N
    scale = tl.load(scales_at, mask=inside & (group * GROUP < K), other=0)
    zero = scale
    if ZEROS:
        zero = tl.load(zeros_at, mask=inside & (group * GROUP < K), other=0)
    for start in range(0, K, S * BK):
        if EVEN:
            rows, weights = m < M, inside
        else:
            rows, weights = (m < M) & (start + k < K), inside & (start + unit * UNIT < K)
        at = start // UNIT * WORDS
        given = tl.load(x_at + start, mask=rows, other=0.0)
        a = tl.load(a_at + at, mask=weights, other=0).to(tl.uint32, bitcast=True)
        b, c = a, a
        if BITS == 6:
            b = tl.load(a_at + at + 1, mask=weights, other=0).to(tl.uint32, bitcast=True)
            c = tl.load(a_at + at + 2, mask=weights, other=0).to(tl.uint32, bitcast=True)
        w = decoded(a, b, c, scale, zero, KIND, BITS, MANTISSA, FIX, GROUP, ZEROS, CARRY, SHAPE)
        # Too narrow to be copied to shared memory ahead of time as the codes are: loaded one turn early instead.
        later = start + S * BK + group * GROUP < K
        scale = tl.load(scales_at + (start + S * BK) // GROUP, mask=inside & later, other=0)
        if ZEROS:
            zero = tl.load(zeros_at + (start + S * BK) // GROUP, mask=inside & later, other=0)
        w = nearest(w, x.dtype.element_ty, ACC, WIDE)
        if WIDE:
            given = given.to(ACC)
        if S == 1:
            acc = tl.dot(given, tl.trans(w), acc, input_precision="ieee", out_dtype=ACC)
        else:
            acc = tl.dot(given, tl.trans(w, (0, 2, 1)), acc, input_precision="ieee", out_dtype=ACC)
    if S != 1:
        acc = _add_strips(acc, BM, BN)
    if BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(ACC)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(y_at, stored(acc, y.dtype.element_ty, WIDE), mask=(row < M)[:, None] & (col < N)[None, :])


@triton.jit
def _popcount(words):
    """Bits set of each uint32; the compiler knows this text for its instruction."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["M"])
def sparse(
    x, mask, values, bias, y, M, N, K, STORED,
    BIAS: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile's weights are gathered from the row's values: a weight's place is the number of bits set before its own.
    No strips: where one begins in the values, only the masks before it can tell."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    word = tl.arange(0, BK // 32)
    bit = tl.arange(0, 32)[None, None, :]
    x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    words_at = mask + col.to(tl.int64)[:, None] * (K // 32) + word[None, :]
    values_at = (values + col.to(tl.int64) * STORED)[:, None, None]
    inside = (col < N)[:, None]
    before = tl.zeros((BN,), dtype=tl.int32)
    acc = tl.zeros((BM, BN), dtype=ACC)
    words = tl.load(words_at, mask=inside & (word * 32 < K)[None, :], other=0).to(tl.uint32, bitcast=True)
    for start in range(0, K, BK):
        given = tl.load(x_at + start, mask=(row < M)[:, None] & (start + k < K)[None, :], other=0.0)
        counts = _popcount(words)
        base = before[:, None] + tl.cumsum(counts, 1) - counts
        spread = words[:, :, None]
        place = base[:, :, None] + _popcount(spread & ((1 << bit) - 1).to(tl.uint32))
        # A damaged mask may have too many bits; it must not read what is not its row's.
        kept = (((spread >> bit.to(tl.uint32)) & 1) != 0) & (place < STORED)
        w = tl.load(values_at + place, mask=kept, other=0.0).reshape(BN, BK)
        before += tl.sum(counts, 1)
        later = (start + BK + word * 32 < K)[None, :]
        words = tl.load(words_at + (start + BK) // 32, mask=inside & later, other=0).to(tl.uint32, bitcast=True)
        w = nearest(w.to(tl.float32), x.dtype.element_ty, ACC, WIDE)
        if WIDE:
            given = given.to(ACC)
        acc = tl.dot(given, tl.trans(w), acc, input_precision="ieee", out_dtype=ACC)
    if BIAS:
        acc += tl.load(bias + col, mask=col < N, other=0.0).to(ACC)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(y_at, stored(acc, y.dtype.element_ty, WIDE), mask=(row < M)[:, None] & (col < N)[None, :])


@triton.jit
def round_rows(x, codes, scales, K, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """See `specdec.kernels.packed.rounded_rows`: the same operations, none of them fused."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    lanes = tl.zeros((BLOCK,), dtype=tl.float32)
    strange = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, K, BLOCK):
        v = tl.load(x + row * K + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        lanes = tl.maximum(lanes, tl.abs(v))
        strange = tl.maximum(strange, (v != v).to(tl.int32))
    largest = tl.maximum(tl.max(lanes, 0), SMALLEST)
    largest = tl.where(tl.max(strange, 0) > 0, float("nan"), largest)  # maxima pass over NaN
    factor = tl.div_rn(127.0, largest)
    for start in range(0, K, BLOCK):
        v = tl.load(x + row * K + start + at, mask=start + at < K, other=0.0).to(tl.float32)
        # 1.5 * 2^23: what is added to it is rounded to an integer, ties to even.
        v = (v * factor + 12582912.0) - 12582912.0
        tl.store(codes + row * K + start + at, v.to(tl.int32).to(tl.int8), mask=start + at < K)
    tl.store(scales + row, tl.div_rn(largest, 127.0))


@triton.jit(do_not_specialize=["M"])
def int8(
    x, x_scales, codes, scales, bias, y, M, N, K,
    BIAS: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Sums are exact, so their order is free."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + row.to(tl.int64)[:, None] * K + k[None, :]
    w_at = codes + col.to(tl.int64)[:, None] * K + k[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float64 if WIDE else tl.int32)
    for start in range(0, K, BK):
        inside = (start + k < K)[None, :]
        a = tl.load(x_at + start, mask=(row < M)[:, None] & inside, other=0)
        b = tl.load(w_at + start, mask=(col < N)[:, None] & inside, other=0)
        if WIDE:
            acc = tl.dot(a.to(tl.float64), tl.trans(b.to(tl.float64)), acc, out_dtype=tl.float64)
        else:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    out = acc.to(tl.int32).to(tl.float32) * tl.load(x_scales + row, mask=row < M, other=0.0)[:, None]
    out = out * tl.load(scales + col, mask=col < N, other=0.0)[None, :]
    if BIAS:
        out += tl.load(bias + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    y_at = y + row.to(tl.int64)[:, None] * N + col[None, :]
    tl.store(y_at, stored(out, y.dtype.element_ty, WIDE), mask=(row < M)[:, None] & (col < N)[None, :])
