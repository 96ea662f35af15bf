"""The processes of a run, one or several. There is one group for as long as Python runs; all ask for it here."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from specdec.loading import default_device


def process_group(device: torch.device | None = None) -> Accelerator:
    """The group, for a target on `device` (None: the best there is)."""
    # accelerate joins processes on the CPU only if told so, and refuses to be told so after it found a GPU.
    alone = torch.cuda.is_available() and "WORLD_SIZE" not in os.environ
    return Accelerator(cpu=(device or default_device()).type == "cpu" and not alone)
