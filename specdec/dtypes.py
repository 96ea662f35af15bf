"""How a dtype is written for people and in files."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`: as `getattr(torch, name)` reads it back."""
    return str(dtype).removeprefix("torch.")
