"""Blocks of 32 numbers that share a power of two: the codec of OCP Microscaling, for tensors of any leading shape.

OCP Microscaling Formats (MX) Specification, v1.0, 2023. Where it leaves a choice: NaN or infinite inputs make the scale
NaN, or are refused; MXINT8 uses -127 to 127; blocks of zeros take the least scale; shared exponents are clamped to
-127 ... 127. Everything is computed from the bits of float32, by exact steps; no logarithm is taken.

Shape suffixes: K numbers of a row, G = K / 32 blocks of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from specdec.errors import InputError

BLOCK = 32
NAN_SCALE = 255  # the one E8M0 byte that is no power of two: its block is NaN
_FRACTION = 23  # bits, of float32
_BIAS = 127  # of float32, and of E8M0


@dataclass(frozen=True)
class Element:
    """What one number of a block is: sign, exponent, mantissa; or, without an exponent, two's complement / 64.

    Beyond `largest`, the code of the largest finite magnitude, E5M2 has infinity and NaN, E4M3 NaN, the others nothing.
    """

    exponent: int  # bits
    mantissa: int  # bits
    bias: int
    largest: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def integer(self) -> bool:
        return self.exponent == 0

    @property
    def sign(self) -> int:
        """The bit of a code that is its sign."""
        return 1 << (self.bits - 1)

    @property
    def fraction(self) -> int:
        """Bits after the leading one of the largest numbers."""
        return 6 if self.integer else self.mantissa

    @property
    def emin(self) -> int:
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number."""
        return (self.largest >> self.mantissa) - self.bias

    def values(self) -> Tensor:
        """What each code stands for, float32 `[2**bits]`."""
        if self.integer:
            return torch.arange(256).to(torch.uint8).view(torch.int8).float() / 64
        magnitude = torch.arange(self.sign)
        field, steps = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        steps = torch.where(field > 0, steps + (1 << self.mantissa), steps)
        exact = torch.ldexp(steps.float(), field.clamp_min(1) - self.bias - self.mantissa)
        exact[magnitude > self.largest] = torch.nan
        if self.exponent == 5:
            exact[self.largest + 1] = torch.inf
        return torch.cat([exact, -exact])


ELEMENTS = {
    "mxfp8_e4m3": Element(4, 3, 7, 0x7E),
    "mxfp8_e5m2": Element(5, 2, 15, 0x7B),
    "mxfp6_e2m3": Element(2, 3, 1, 0x1F),
    "mxfp6_e3m2": Element(3, 2, 3, 0x1F),
    "mxfp4": Element(2, 1, 1, 0x7),
    "mxint8": Element(0, 7, 0, 127),
}


def _floor(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    return exponent


def _ceil(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    return exponent + (fraction > 0)


def _rceil(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    top = element.largest & ((1 << element.fraction) - 1)
    return exponent + (fraction > top << (_FRACTION - element.fraction))


def _even(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    # From half a step below two on the rounding carries; the tie does as well, two being even.
    half = 1 << (_FRACTION - 1 - element.fraction)
    return exponent + (fraction >= (1 << _FRACTION) - half)


#: How the shared exponent follows from a block's largest magnitude, before the element's own largest exponent is taken
#: off: the specification's floor; the least at which nothing saturates (`rceil`); that of the next power of two
#: (`ceil`); the floor once the magnitude is rounded to the element's mantissa (`even`).
RULES: dict[str, Callable[[Tensor, Tensor, Element], Tensor]] = {
    "floor": _floor,
    "rceil": _rceil,
    "ceil": _ceil,
    "even": _even,
}


def block_scales(
    values_K: Tensor, element: Element, rule: str = "floor", nonfinite: Literal["raise", "nan"] = "raise"
) -> Tensor:
    """E8M0 bytes `[..., K / 32]` of float values `[..., K]`: scale byte b stands for 2^(b - 127).

    `nonfinite`: a block that holds NaN or an infinity is an `InputError`; with "nan" its scale is NaN, and so are all
    its 32 numbers. float64 values are rounded to float32 first.
    """
    largest_G = values_K.float().unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    bad_G = ~torch.isfinite(largest_G)
    if nonfinite == "raise" and bool(bad_G.any()):
        raise InputError(
            f"{int(bad_G.sum())} of {bad_G.numel()} blocks hold NaN or infinite values; "
            "mend them, or store those blocks as NaN with nonfinite='nan'"
        )
    shared_G = (RULES[rule](*_split(largest_G), element) - element.emax).clamp_(-_BIAS, _BIAS)
    return (shared_G + _BIAS).masked_fill_(bad_G, NAN_SCALE).to(torch.uint8)


def block_codes(values_K: Tensor, scales_G: Tensor, element: Element) -> Tensor:
    """Element codes uint8 `[..., K]`: nearest, ties to even, saturating; 0 throughout blocks whose scale is NaN."""
    scaled: Tensor = values_K.float().unflatten(-1, (-1, BLOCK)) * _powers(_BIAS - scales_G.int()).unsqueeze(-1)
    codes: Tensor
    if element.integer:
        # -128 stays unused, as the specification allows: -2.0 would move the scale when its block is packed again.
        codes = (scaled * 64).round_().clamp_(-element.largest, element.largest).to(torch.int8).view(torch.uint8)
    else:
        codes = _float_codes(scaled, element)
    return codes.masked_fill_((scales_G == NAN_SCALE).unsqueeze(-1), 0).flatten(-2)


def _float_codes(scaled: Tensor, element: Element) -> Tensor:
    # The step at a magnitude is 2^(exponent - mantissa bits), below 2^emin that of the subnormals. Counted in steps, a
    # carry into the next exponent, and from subnormal to normal, comes out right by itself.
    least, magnitude = element.emin + _BIAS, scaled.abs()
    field = (magnitude.view(torch.int32) >> _FRACTION).clamp_(least, element.emax + 1 + _BIAS)
    per_step = (2 * _BIAS + element.mantissa - field).bitwise_left_shift_(_FRACTION).view(torch.float32)
    steps = magnitude.mul_(per_step).round_().clamp_max_(2 << element.mantissa).to(torch.int32)
    codes = field.sub_(least).bitwise_left_shift_(element.mantissa).add_(steps).clamp_max_(element.largest)
    negative = scaled.view(torch.int32) < 0  # of -0.0 too
    return codes.to(torch.uint8).add_(negative, alpha=element.sign)


def block_values(codes_K: Tensor, scales_G: Tensor, element: Element) -> Tensor:
    """The float32 numbers `[..., K]` of element codes: exact, subnormals included; NaN where code or scale is NaN.

    What is 2^128 and more becomes infinite. The rules but floor make that of magnitudes that lie just below.
    """
    elements = _table(element, codes_K.device).index_select(0, codes_K.flatten().int()).view(*scales_G.shape, BLOCK)
    scales = _powers(scales_G.int() - _BIAS).masked_fill_(scales_G == NAN_SCALE, torch.nan)
    return (elements * scales.unsqueeze(-1)).flatten(-2)


def _split(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent (floor of log2) and the 23 bits of fraction of non-negative float32."""
    bits = largest.view(torch.int32)
    subnormal = bits < 1 << _FRACTION
    # A subnormal is an integer times 2^-149: the bits of that integer as a float have its exponent and fraction.
    bits = torch.where(subnormal, bits.float().view(torch.int32), bits)
    exponent = (bits >> _FRACTION) - torch.where(subnormal, _BIAS + 149, _BIAS)
    return exponent, bits & ((1 << _FRACTION) - 1)


def _powers(exponents: Tensor) -> Tensor:
    """2.0 ** int32 exponents, exactly; those outside -127 ... 127 as the nearest of these."""
    exponents = exponents.clamp(-_BIAS, _BIAS)
    # 2^-127 is subnormal: its one bit stands in the fraction.
    return (
        ((exponents + _BIAS) << _FRACTION).masked_fill_(exponents == -_BIAS, 1 << (_FRACTION - 1)).view(torch.float32)
    )


@lru_cache(maxsize=64)
def _table(element: Element, device: torch.device) -> Tensor:
    return element.values().to(device)
