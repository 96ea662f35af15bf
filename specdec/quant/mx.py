"""OCP Microscaling (MX) v1.0: blocks of 32 numbers share a power of two.

Shape suffixes: N rows, K columns, G = K / 32 blocks of a row. (OCP Microscaling Formats (MX) Specification, v1.0, 2023.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import pack_bits, packed_bytes, row_chunks, unpack_bits
from specdec.quant.format import GridFormat, Part, Parts, register_format

BLOCK = 32
NAN_SCALE = 255  # the one E8M0 byte that is no power of two: its block is NaN
_MANTISSA = (1 << 23) - 1  # of float32


@dataclass(frozen=True)
class Element:
    """What one number of a block is: sign, exponent, mantissa; or, without an exponent, two's complement / 64."""

    exponent: int  # bits
    mantissa: int  # bits
    bias: int
    largest: int  # the code of the largest finite magnitude

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def integer(self) -> bool:
        return self.exponent == 0

    @property
    def emin(self) -> int:
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number."""
        return (self.largest >> self.mantissa) - self.bias

    def values(self) -> Tensor:
        """What each code stands for, float32 `[2**bits]`: NaN and infinities where the element has them."""
        if self.integer:
            return torch.arange(256).to(torch.uint8).view(torch.int8).float() / 64
        magnitude = torch.arange(1 << (self.bits - 1))
        field, low = magnitude >> self.mantissa, (magnitude & ((1 << self.mantissa) - 1)).float()
        hidden = (field > 0).float()
        scale = 2.0 ** (field.clamp_min(1) - self.bias - self.mantissa).float()
        found = (low + hidden * (1 << self.mantissa)) * scale
        # Beyond the largest finite code E5M2 has infinity and then NaN; E4M3 has NaN alone.
        beyond = magnitude > self.largest
        found[beyond] = torch.nan
        if self.exponent == 5:
            found[self.largest + 1] = torch.inf
        return torch.cat([found, -found])


ELEMENTS = {
    "mxfp8_e4m3": Element(4, 3, 7, 0x7E),
    "mxfp8_e5m2": Element(5, 2, 15, 0x7B),
    "mxfp6_e2m3": Element(2, 3, 1, 0x1F),
    "mxfp6_e3m2": Element(3, 2, 3, 0x1F),
    "mxfp4": Element(2, 1, 1, 0x7),
    "mxint8": Element(0, 7, 0, 127),
}


def _split(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent (floor of log2) and 23 bits of fraction of non-negative float32, subnormals included, from the bits."""
    bits = largest.view(torch.int32)
    subnormal = bits <= _MANTISSA
    # A subnormal is an integer times 2^-149; that integer as a float has exponent and fraction in its bits again.
    bits = torch.where(subnormal, bits.float().view(torch.int32), bits)
    return (bits >> 23) - torch.where(subnormal, 127 + 149, 127), bits & _MANTISSA


def _floor(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    return exponent


def _ceil(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    return exponent + (fraction > 0)


def _rceil(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    top = element.largest & ((1 << element.mantissa) - 1) if not element.integer else 63
    width = element.mantissa if not element.integer else 6
    return exponent + (fraction > top << (23 - width))


def _even(exponent: Tensor, fraction: Tensor, element: Element) -> Tensor:
    # Rounding the mantissa carries into the exponent from half a step below two on (a tie there goes up: two is even).
    width = element.mantissa if not element.integer else 6
    return exponent + (fraction >= (1 << 23) - (1 << (22 - width)))


#: How the shared exponent follows from a block's largest magnitude, before the element's own largest exponent is taken
#: off: the specification's floor; the least at which nothing saturates (`rceil`); the next power of two (`ceil`); the
#: floor once the magnitude is rounded to the element's mantissa (`even`).
RULES: dict[str, Callable[[Tensor, Tensor, Element], Tensor]] = {
    "floor": _floor,
    "rceil": _rceil,
    "ceil": _ceil,
    "even": _even,
}


def _power(exponent: Tensor) -> Tensor:
    """2.0 ** exponent for int32 in [-127, 127], exactly: -127 is a subnormal float32."""
    bits = torch.where(exponent == -127, 1 << 22, (exponent + 127) << 23)
    return bits.to(torch.int32).view(torch.float32)


def block_scales(
    values_NK: Tensor, element: Element, rule: str = "floor", nonfinite: Literal["raise", "nan"] = "raise"
) -> Tensor:
    """E8M0 bytes `[N, K / 32]` of the blocks of a row.

    `nonfinite`: a NaN or an infinity in a block is an `InputError`, or ("nan") makes its scale 255 and so the whole
    block NaN. Blocks of zeros take the least scale.
    """
    blocks = values_NK.float().unflatten(-1, (-1, BLOCK))
    largest_NG = blocks.abs().amax(-1)
    bad = ~torch.isfinite(largest_NG)
    if nonfinite == "raise" and bool(bad.any()):
        raise InputError(f"{int(bad.sum())} blocks hold NaN or infinite values; they can be stored as NaN blocks only")
    shared = (RULES[rule](*_split(largest_NG), element) - element.emax).clamp(-127, 127)
    return (shared + 127).masked_fill_(bad, NAN_SCALE).to(torch.uint8)


def block_codes(values_NK: Tensor, scales_NG: Tensor, element: Element) -> Tensor:
    """Element codes `[N, K]`, one a byte: nearest, ties to even, saturating; 0 where a block's scale is NaN."""
    shared = scales_NG.to(torch.int32) - 127
    dead_NG1 = (scales_NG == NAN_SCALE).unsqueeze(-1)
    scaled = values_NK.float().unflatten(-1, (-1, BLOCK)) * _power(-shared.clamp_max(127)).unsqueeze(-1)
    if element.integer:
        # -128 stays unused, as the specification allows: -2.0 would move the scale when its block is packed again.
        codes = (scaled * 64).round_().clamp_(-element.largest, element.largest).to(torch.int8).view(torch.uint8)
        return codes.masked_fill_(dead_NG1, 0).flatten(-2)
    # The step at a magnitude is 2^(exponent - mantissa bits), that of subnormals below emin. Counted in steps, a carry
    # into the next exponent, and from the subnormals into the normals, comes out right by itself.
    least, magnitude = element.emin + 127, scaled.abs()
    field = (magnitude.view(torch.int32) >> 23).clamp_(least, element.emax + 128)
    step = (254 + element.mantissa - field).bitwise_left_shift_(23).view(torch.float32)
    steps = magnitude.mul_(step).round_().clamp_max_(1 << (element.mantissa + 1)).to(torch.int32)
    codes = field.sub_(least).bitwise_left_shift_(element.mantissa).add_(steps).clamp_max_(element.largest)
    codes = codes.to(torch.uint8).add_((scaled.view(torch.int32) < 0).to(torch.uint8) << (element.bits - 1))
    return codes.masked_fill_(dead_NG1, 0).flatten(-2)


@lru_cache(maxsize=64)
def _table(element: Element, device: torch.device) -> Tensor:
    return element.values().to(device)


def block_values(codes_NK: Tensor, scales_NG: Tensor, element: Element) -> Tensor:
    """The float32 numbers `[N, K]` of element codes: exact; NaN where the scale is NaN or the code is."""
    exact = _table(element, codes_NK.device).index_select(0, codes_NK.flatten().int()).view(*scales_NG.shape, BLOCK)
    shared = scales_NG.to(torch.int32) - 127
    scale = _power(shared.clamp_max(127)).masked_fill_(scales_NG == NAN_SCALE, torch.nan)
    return (exact * scale.unsqueeze(-1)).flatten(-2)


class MXFormat(GridFormat):
    """Blocks of 32 along K: parts `codes` (bit strings, see `specdec.quant.bits`) and `scales` (E8M0 bytes).

    float32 weights are taken as they are, float64 ones rounded to float32 first. Lossless: no, weights are rounded.
    """

    def __init__(self, family: str, rule: str = "floor"):
        self.family, self.rule, self.element = family, rule, ELEMENTS[family]

    @property
    def name(self) -> str:
        return self.family if self.rule == "floor" else f"{self.family}-{self.rule}"

    def parts(self, N: int, K: int) -> dict[str, Part]:
        if K % BLOCK or K == 0:
            raise InputError(
                f"{self.name} stores blocks of {BLOCK} inputs; a weight [{N}, {K}] has {K}. "
                "Keep this module in its dtype, or quantise it as int8"
            )
        codes = Part((N, packed_bytes(K, self.element.bits)), torch.uint8)
        return {"codes": codes, "scales": Part((N, K // BLOCK), torch.uint8)}

    def group(self, K: int) -> int:
        return BLOCK

    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        N, K = weight_NK.shape
        scales = torch.empty(N, K // BLOCK, dtype=torch.uint8, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            scales[rows] = block_scales(weight_NK[rows], self.element, self.rule)
        return {"scales": scales}

    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        N, K = weight_NK.shape
        size, bits = packed_bytes(K, self.element.bits), self.element.bits
        codes = torch.empty(N, size, dtype=torch.uint8, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            codes[rows] = pack_bits(block_codes(weight_NK[rows], fitted["scales"][rows], self.element), bits)
        return codes

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        scales = parts["scales"]
        N, K = scales.shape[0], scales.shape[1] * BLOCK
        out = torch.empty(N, K, dtype=dtype, device=scales.device)
        for rows in row_chunks(out):
            codes = unpack_bits(parts["codes"][rows], self.element.bits, K)
            out[rows] = block_values(codes, scales[rows], self.element).to(dtype)
        return out

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` when blocks are stored that are NaN."""
        super().check(parts, N, K)
        scales = parts["scales"]
        bad = 0 if scales.is_meta else int((scales == NAN_SCALE).sum())
        if bad:
            raise InputError(
                f"'scales' of {self.name} weights [{N}, {K}] mark {bad} blocks as NaN; the file is damaged, or was "
                "made from a model with NaN weights"
            )


def _make(family: str, options: tuple[str, ...]) -> MXFormat:
    rules = [option for option in options if option in RULES]
    unknown = [option for option in options if option not in RULES]
    if unknown or len(rules) > 1:
        raise InputError(
            f"{'-'.join((family, *options))!r} is no weight format: {family} takes one scale rule of {', '.join(RULES)}"
        )
    return MXFormat(family, rules[0] if rules else "floor")


for _family in ELEMENTS:
    register_format(_family, partial(_make, _family))
