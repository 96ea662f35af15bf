"""OCP Microscaling formats for weights: MXFP8, MXFP6, MXFP4 and MXINT8, truly packed.

33, 25, 17 and 33 bytes per 32 weights. Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import pack_bits, packed_bytes, row_chunks, unpack_bits
from specdec.quant.blocks import BLOCK, ELEMENTS, NAN_SCALE, RULES, block_codes, block_scales, block_values
from specdec.quant.format import GridFormat, Part, Parts, finite, register_format


class MXFormat(GridFormat):
    """Blocks of 32 inputs along K: parts `codes` (bit strings, see `specdec.quant.bits`) and `scales` (E8M0 bytes).

    `rule`: how scales are chosen (`specdec.quant.blocks.RULES`); the specification's is "floor". Others are part of the
    name, as in "mxfp6_e2m3-rceil". Lossless: no, weights are rounded.
    """

    def __init__(self, family: str, rule: str = "floor"):
        self.family, self.rule, self.element = family, rule, ELEMENTS[family]

    @property
    def name(self) -> str:
        return self.family if self.rule == "floor" else f"{self.family}-{self.rule}"

    def parts(self, N: int, K: int) -> dict[str, Part]:
        if K % BLOCK or K == 0:
            raise InputError(
                f"{self.name} stores blocks of {BLOCK} inputs, and a weight [{N}, {K}] has {K}: K must be a multiple "
                f"of {BLOCK}. Keep this module in its dtype, or store it as int8"
            )
        codes = Part((N, packed_bytes(K, self.element.bits)), torch.uint8)
        return {"codes": codes, "scales": Part((N, K // BLOCK), torch.uint8)}

    def group(self, K: int) -> int:
        return BLOCK

    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        part = self.parts(*weight_NK.shape)["scales"]
        scales = torch.empty(part.shape, dtype=part.dtype, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            scales[rows] = block_scales(weight_NK[rows], self.element, self.rule)
        return {"scales": scales}

    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        part = self.parts(*weight_NK.shape)["codes"]
        codes = torch.empty(part.shape, dtype=part.dtype, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            of_rows = block_codes(finite(weight_NK[rows]), fitted["scales"][rows], self.element)
            codes[rows] = pack_bits(of_rows, self.element.bits)
        return codes

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        scales = parts["scales"]
        N, K = scales.shape[0], scales.shape[1] * BLOCK
        out = torch.empty(N, K, dtype=dtype, device=scales.device)
        for rows in row_chunks(out):
            codes = unpack_bits(parts["codes"][rows], self.element.bits, K)
            out[rows] = block_values(codes, scales[rows], self.element)
        return out

    def nearest(self, columns_NM: Tensor, fitted: Parts) -> Tensor:
        # Divided by their scales, numbers of all rows fill blocks whose scale is one.
        shared_N1 = fitted["scales"].int() - 127
        scaled = torch.ldexp(columns_NM.float(), -shared_N1)
        blocks = torch.nn.functional.pad(scaled.flatten(), (0, -scaled.numel() % BLOCK))
        ones = torch.full((len(blocks) // BLOCK,), 127, dtype=torch.uint8, device=blocks.device)
        points = block_values(block_codes(blocks, ones, self.element), ones, self.element)
        return torch.ldexp(points[: scaled.numel()].view_as(scaled), shared_N1)

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` when blocks or codes are stored that are NaN or infinite."""
        super().check(parts, N, K)
        codes, scales = parts["codes"], parts["scales"]
        if scales.is_meta:
            return
        blocks = int((scales == NAN_SCALE).sum())
        # Only elements of 8 bits have such codes, one a byte.
        beyond = self.element.largest + 1 < self.element.sign
        numbers = sum(int((codes[rows] & 0x7F > self.element.largest).sum()) for rows in row_chunks(codes) if beyond)
        if blocks or numbers:
            found = f"{blocks} NaN blocks in 'scales'" if blocks else f"{numbers} NaN or infinite numbers in 'codes'"
            raise InputError(
                f"{self.name} weights [{N}, {K}] hold {found}, which this library never writes: the file is damaged, "
                "or was made from a model that is"
            )


def _make(family: str, options: tuple[str, ...]) -> MXFormat:
    rules = [option for option in options if option in RULES]
    if len(rules) != len(options) or len(rules) > 1:
        raise InputError(
            f"{'-'.join((family, *options))!r} is no weight format: {family} takes one scale rule of {', '.join(RULES)}"
        )
    return MXFormat(family, *rules)


for _family in ELEMENTS:
    register_format(_family, partial(_make, _family))
