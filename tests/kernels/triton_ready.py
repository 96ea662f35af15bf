"""What tests of Triton kernels need before anything else."""

import os
from importlib.util import find_spec

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def need_triton() -> None:
    """Skips the test where kernels run neither on a GPU nor by Triton's interpreter."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton, on Linux")
    if DEVICE.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported
    from specdec.kernels import triton_ops

    if DEVICE.type == "cpu" and not triton_ops.INTERPRETED:
        pytest.skip("no GPU, and triton was imported without TRITON_INTERPRET=1")
