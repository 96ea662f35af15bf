"""Weights of four bits whose products round the activations too, to int8 by rows: the option "a8" of a format.

Whole numbers times whole numbers are what processors multiply fastest. Shape suffixes: N outputs, K inputs, G groups of
32 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import unpack_bits
from specdec.quant.blocks import ELEMENTS
from specdec.quant.format import Format, GridFormat, Part, Parts
from specdec.quant.integer import Int4
from specdec.quant.mx import MXFormat

#: What stands last in the name of such a format.
OPTION = "a8"
#: Inputs whose products are summed exactly before a scale comes in.
GROUP = 32


class RowsRounded(GridFormat):
    """The weights of `inner`, stored as it stores them; each row of activations is rounded to int8 by its own scale.

    `inner`: int4 in any group size, or mxfp4, whose elements are halves of whole numbers.
    Lossless: no, weights and activations are rounded; no row depends on another.
    """

    rounds_rows = True

    def __init__(self, inner: GridFormat):
        self.inner = inner

    @property
    def name(self) -> str:
        return f"{self.inner.name}-{OPTION}"

    def whole_numbers(self, parts: Parts) -> tuple[Tensor, Tensor, float]:
        """Weights as int8 `[N, K]`, the scale of each group float32 `[N, G]`, and a unit: their product is exact."""
        codes = parts["codes"]
        K = codes.shape[1] * 2
        nibbles = unpack_bits(codes, 4, K)
        if isinstance(self.inner, MXFormat):
            twice = (ELEMENTS["mxfp4"].values() * 2).to(torch.int8).to(codes.device)
            powers = parts["scales"].int()
            scales = torch.ldexp(torch.ones_like(powers, dtype=torch.float32), powers - 127)
            return twice[nibbles.long()], scales.masked_fill(powers == 255, torch.nan), 0.5
        per_group = self.inner.group(K)
        zeros = parts["zeros"].to(torch.int8) if "zeros" in parts else torch.full((), 8, dtype=torch.int8)
        spread = zeros.repeat_interleave(per_group, 1) if zeros.ndim else zeros.to(codes.device)
        return nibbles.to(torch.int8) - spread, parts["scales"].float().repeat_interleave(per_group // GROUP, 1), 1.0

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return self.inner.parts(N, K)

    def group(self, K: int) -> int:
        return self.inner.group(K)

    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        return self.inner.fit(weight_NK)

    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        return self.inner.encode(weight_NK, fitted)

    def nearest(self, columns_NM: Tensor, fitted: Parts) -> Tensor:
        return self.inner.nearest(columns_NM, fitted)

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.inner.unpack(parts, dtype)

    def check(self, parts: Mapping[str, Tensor], N: int, K: int) -> None:
        self.inner.check(parts, N, K)


def with_rounded_rows(inner: Format) -> RowsRounded:
    """`InputError` for formats that have no whole numbers of four bits."""
    if not isinstance(inner, Int4) and not (isinstance(inner, MXFormat) and inner.family == "mxfp4"):
        raise InputError(
            f"'{inner.name}-{OPTION}' is no weight format: {OPTION} (activations rounded to int8) goes with int4 and "
            "mxfp4; int8 always does so"
        )
    return RowsRounded(inner)
