"""From the host to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int] | Tensor, device: torch.device | str) -> Tensor:
    """The values (int64 when they are numbers) on `device`; already there, they are returned as they are.

    A plain `.to(device)` of host memory waits until a CUDA device has done all its work. Pinned memory is copied while
    the host goes on; torch keeps it until the copy is done.
    """
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64)
    device = torch.device(device)
    if device.type != "cuda" or host.is_cuda:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)
