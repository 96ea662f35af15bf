"""Weights that are hard to round: every magnitude, ties, subnormals, ends of the range."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.quant.blocks import BLOCK, ELEMENTS, Element

LARGEST = torch.finfo(torch.float32).max
LEAST = 2.0**-149
FAMILIES = sorted(ELEMENTS)
# Of the specification: largest exponent, largest magnitude, least normal and least magnitude, bytes of a block.
TABLE = {
    "mxfp8_e4m3": (8, 448.0, 2.0**-6, 2.0**-9, 33),
    "mxfp8_e5m2": (15, 57344.0, 2.0**-14, 2.0**-16, 33),
    "mxfp6_e2m3": (2, 7.5, 1.0, 0.125, 25),
    "mxfp6_e3m2": (4, 28.0, 0.25, 0.0625, 25),
    "mxfp4": (2, 6.0, 1.0, 0.5, 17),
    "mxint8": (0, 127 / 64, 1 / 64, 1 / 64, 33),
}


def every_magnitude(N: int = 512, K: int = 512, seed: int = 0) -> Tensor:
    """float32 `[N, K]`: any finite bit pattern; rows of one magnitude; blocks within some octaves."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (N, K), generator=generator).to(torch.int32).view(torch.float32)
    bits = torch.where(torch.isfinite(bits), bits, torch.zeros(()))
    normal = torch.randn(N, K, generator=generator)
    exponents = torch.randint(-160, 130, (N, K // 32, 1), generator=generator).expand(-1, -1, 32).flatten(-2)
    octaves = torch.randint(-12, 1, (N, K), generator=generator)
    blocks = torch.ldexp(normal.double(), exponents + octaves).clamp(-LARGEST, LARGEST).float()
    kind = torch.arange(N).unsqueeze(1) % 3
    return torch.where(kind == 0, bits, torch.where(kind == 1, normal, blocks))


def ties(element: Element) -> tuple[Tensor, Tensor]:
    """Middles between neighbouring magnitudes of an element, and the even code of each two: float32 and int64 `[T]`."""
    magnitudes = element.values()[: element.largest + 1].double()
    codes = torch.arange(element.largest)
    return ((magnitudes[:-1] + magnitudes[1:]) / 2).float(), codes + codes % 2


def block_of(*values: float) -> Tensor:
    """One block `[1, 32]`: the values, then zeros."""
    row = torch.zeros(1, BLOCK)
    row[0, : len(values)] = torch.tensor(values)
    return row
