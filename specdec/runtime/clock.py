"""Moments, on the time line of the host or of a device that works on after the host has gone ahead."""

from __future__ import annotations

import time
from typing import Any

import torch


class HostClock:
    """What the host does is done when it goes on."""

    lags = False

    def mark(self) -> Any:
        """This moment."""
        return time.perf_counter()

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one moment to another, both of them over."""
        seconds: float = end - start
        return seconds


class DeviceClock(HostClock):
    """A CUDA device: a moment is when its stream gets there. A mark waits for nothing; `between` needs both over."""

    lags = True

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def between(self, start: Any, end: Any) -> float:
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def clock_of(device: torch.device) -> HostClock:
    return DeviceClock(device) if device.type == "cuda" else HostClock()
