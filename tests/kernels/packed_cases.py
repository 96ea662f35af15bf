"""What tests of products with stored weights on the device kernels share."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import Tensor

from specdec.quant.format import Parts

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4")
CODED = (*FLOATS, "mxint8", "int4", "int4-g64-asym", "int4-g128")
NAMES = (*CODED, "int8", "sparse", "sparse-50", "sparse-2x4")


def packed_kernels() -> ModuleType:
    """The module; skips the test where its kernels run neither on a GPU nor by Triton's interpreter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    if DEVICE.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
    from specdec.kernels import triton_ops, triton_packed

    if DEVICE.type == "cpu" and not triton_ops.INTERPRETED:
        pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1")
    return triton_packed


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(parts: Parts) -> dict[str, Tensor]:
    return {name: part.to(DEVICE) for name, part in parts.items()}
