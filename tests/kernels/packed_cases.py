"""What tests of products with stored weights on the device kernels share."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from triton_ready import DEVICE, need_triton

from specdec.quant.format import Parts

FLOATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
CODED = (*FLOATS, "mxint8", "int4", "int4-g64-asym", "int4-g128")
NAMES = (*CODED, "int8", "sparse", "sparse-50", "sparse-2x4")


def packed_kernels() -> ModuleType:
    """The module; skips the test where its kernels run neither on a GPU nor by Triton's interpreter."""
    need_triton()
    from specdec.kernels import triton_packed

    return triton_packed


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(parts: Parts) -> dict[str, Tensor]:
    return {name: part.to(DEVICE) for name, part in parts.items()}
