"""Stored codes to numbers inside a Triton kernel: words of 32 bits in registers, and nothing but shifts and products.

Two codes are worked on at once, one in each half of a word. What comes out is the bit pattern of a bfloat16 whose
exponent is off by a constant: one product with a power of two sets it right, and subnormal codes come out right by
themselves, because bfloat16 has subnormals too.

Shape suffixes: N rows of a tile of weights, K inputs, W words of a row, G groups of a row. A tile may have strips of K
before all that; SHAPE is what it has once decoded, `(N, K)` or `(S, N, K)`.
"""

# Kernels are compiled from their source by Triton, and have no types of Python's.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(pair):
    """Of a word: its low half, then its high half, `[..., 2]` uint16."""
    return tl.join((pair & 0xFFFF).to(tl.uint16), (pair >> 16).to(tl.uint16))


@triton.jit
def _float_bits(pair, B: tl.constexpr, M: tl.constexpr):
    """Two codes of B bits, M of them mantissa, in the low ends of the halves (bits above are junk), as bfloat16 bits.

    NaN and infinity of 8-bit codes keep an exponent below that of bfloat16: see `_specials`.
    """
    field: tl.constexpr = ((1 << (B - 1)) - 1) << (7 - M)
    return ((pair << (16 - B)) & 0x80008000) | ((pair << (7 - M)) & (field | field << 16))


@triton.jit
def _specials(bits, M: tl.constexpr):
    """Sets the exponent of bfloat16 to all ones where an 8-bit code is NaN or infinite: E4M3's last code, E5M2's last
    exponent. A carry out of the code's seven bits finds them."""
    step: tl.constexpr = 1 << (7 - M) if M == 3 else 4 << (7 - M)
    carry: tl.constexpr = 1 << (14 - M)
    fill: tl.constexpr = (0x7F80 & ~(carry - 1)) // carry
    found = ((bits & 0x7FFF7FFF) + (step | step << 16)) & (carry | carry << 16)
    return bits + found * fill


@triton.jit
def _float4(words, SHAPE: tl.constexpr):
    """E2M1 `[N, W]` to bfloat16 bits `[N, K]`."""
    even = tl.join(_halves(_float_bits(words, 4, 1)), _halves(_float_bits(words >> 8, 4, 1)))
    odd = tl.join(_halves(_float_bits(words >> 4, 4, 1)), _halves(_float_bits(words >> 12, 4, 1)))
    return tl.join(even, odd).reshape(SHAPE)


@triton.jit
def _float6(a, b, c, M: tl.constexpr, SHAPE: tl.constexpr):
    """Sixteen codes of 6 bits from each three words `a b c [N, W / 3]`, to bfloat16 bits `[N, K]`.

    Codes i and i + 8 stand 48 bits apart. Once the six halves of the words are paired so, both have the same place.
    """
    r = (a & 0xFFFF) | (b & 0xFFFF0000)
    s = (a >> 16) | (c << 16)
    t = (b & 0xFFFF) | (c & 0xFFFF0000)
    third = ((r >> 12) & 0x000F000F) | ((s << 4) & 0x00300030)
    sixth = ((s >> 14) & 0x00030003) | ((t << 2) & 0x003C003C)
    h0 = _halves(_float_bits(r, 6, M))
    h1 = _halves(_float_bits(r >> 6, 6, M))
    h2 = _halves(_float_bits(third, 6, M))
    h3 = _halves(_float_bits(s >> 2, 6, M))
    h4 = _halves(_float_bits(s >> 8, 6, M))
    h5 = _halves(_float_bits(sixth, 6, M))
    h6 = _halves(_float_bits(t >> 4, 6, M))
    h7 = _halves(_float_bits(t >> 10, 6, M))
    even = tl.join(tl.join(h0, h4), tl.join(h2, h6))
    odd = tl.join(tl.join(h1, h5), tl.join(h3, h7))
    return tl.join(even, odd).reshape(SHAPE)


@triton.jit
def _float8(words, M: tl.constexpr, SHAPE: tl.constexpr):
    """E4M3 (M = 3) or E5M2 `[N, W]` to bfloat16 bits `[N, K]`."""
    even = _specials(_float_bits(words, 8, M), M)
    odd = _specials(_float_bits(words >> 8, 8, M), M)
    return tl.join(_halves(even), _halves(odd)).reshape(SHAPE)


@triton.jit
def _nibbles(words, SHAPE: tl.constexpr):
    """Unsigned codes of 4 bits `[N, W]` to the bfloat16 bits of 128 + code, `[N, K]`."""
    h0 = _halves((words & 0x000F000F) | 0x43004300)
    h1 = _halves(((words >> 4) & 0x000F000F) | 0x43004300)
    h2 = _halves(((words >> 8) & 0x000F000F) | 0x43004300)
    h3 = _halves(((words >> 12) & 0x000F000F) | 0x43004300)
    return tl.join(tl.join(h0, h2), tl.join(h1, h3)).reshape(SHAPE)


@triton.jit
def _signed8(words, SHAPE: tl.constexpr):
    """Two's complement codes of 8 bits `[N, W]` to float32 `[N, K]`: 2^23 + 128 + code is a float with the code in its
    last bits, and takes no conversion."""
    flipped = words ^ 0x80808080
    even = tl.join(flipped & 0xFF, (flipped >> 16) & 0xFF)
    odd = tl.join((flipped >> 8) & 0xFF, (flipped >> 24) & 0xFF)
    bits = tl.join(even, odd).reshape(SHAPE) | 0x4B000000
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _carried(bits, CARRY: tl.constexpr):
    """The numbers of bfloat16 bits in CARRY, bfloat16 or float32."""
    if tl.bfloat16 == CARRY:
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _powers(scales, CARRY: tl.constexpr):
    """E8M0 bytes: 2^(byte - 127), which is subnormal for 0; NaN for 255."""
    bits = tl.where(scales == 0, 0x0040, tl.where(scales == 255, 0x7FC0, scales.to(tl.int32) << 7))
    return _carried(bits, CARRY)


@triton.jit
def over_groups(values, SHAPE: tl.constexpr, GROUP: tl.constexpr):
    """`[N, G]` to `[N, K]`: each value for all inputs of its group."""
    flat: tl.constexpr = (SHAPE[0], SHAPE[1] // GROUP, GROUP)
    wide: tl.constexpr = flat if len(SHAPE) == 2 else (SHAPE[0], SHAPE[1], SHAPE[-1] // GROUP, GROUP)
    return tl.broadcast_to(tl.expand_dims(values, -1), wide).reshape(SHAPE)


@triton.jit
def _nearest_bits(values):
    """Bits of float32 numbers rounded to bfloat16, ties to even: the interpreter cuts off, and loses subnormals."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return tl.where(values == values, rounded, 0x7FC00000).to(tl.uint32)


@triton.jit
def nearest(values, DTYPE: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr):
    """`values` rounded to DTYPE; with WIDE, for the interpreter, given in ACC."""
    if WIDE and tl.bfloat16 == DTYPE:
        return _nearest_bits(values).to(tl.float32, bitcast=True)
    elif WIDE:
        return values.to(DTYPE).to(ACC)
    else:
        return values.to(DTYPE)


@triton.jit
def stored(values, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """`values` rounded to DTYPE, as they are stored."""
    if WIDE and tl.bfloat16 == DTYPE:
        return (_nearest_bits(values) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(DTYPE)


@triton.jit
def decoded(
    a, b, c, scales, zeros,
    KIND: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, FIX: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, CARRY: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Weights `[N, K]` in CARRY: of words `a [N, W]` (and `b`, `c` where 3 words hold 16 codes of 6 bits), with
    `scales [N, G]` and, with ZEROS, `zeros [N, G]` as stored. FIX: the power of two that sets exponents right."""
    if KIND == "int4":
        raw = _carried(_nibbles(a, SHAPE), CARRY)
        if ZEROS:
            raw -= over_groups((zeros.to(tl.float32) + 128.0).to(CARRY), SHAPE, GROUP)
        else:
            raw -= tl.full(SHAPE, 136.0, CARRY)
        return raw * over_groups(scales.to(CARRY), SHAPE, GROUP)
    power = _powers(scales, CARRY)
    if KIND == "integer":
        # The least scale over 64 is the least bfloat16 there is.
        power *= tl.full((1,) * len(SHAPE), FIX, CARRY)
        raw = _signed8(a, SHAPE).to(CARRY)
    else:
        if BITS == 4:
            bits = _float4(a, SHAPE)
        elif BITS == 6:
            bits = _float6(a, b, c, MANTISSA, SHAPE)
        else:
            bits = _float8(a, MANTISSA, SHAPE)
        raw = _carried(bits, CARRY) * tl.full(SHAPE, FIX, CARRY)
    return raw * over_groups(power, SHAPE, GROUP)
