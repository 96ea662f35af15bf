"""Work of fixed shapes on a device, recorded once as a CUDA graph and then replayed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Captured(ABC):
    """`call` reads buffers that stay where they are, and returns tensors: on CUDA always the same ones, since its
    kernels are recorded with their addresses. Elsewhere there is no graph, and `run` calls it each time.

    What `run` returns is to be copied before the next run.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, ...] = ()

    @abstractmethod
    def call(self) -> tuple[Tensor, ...]: ...

    def capture(self, device: torch.device, pool: Any) -> None:
        """Run once aside, so that kernels are compiled and memory is there; then record. Nothing on a CPU.

        `pool`: memory that graphs share which never run at the same time.
        """
        if device.type != "cuda":
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self.call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self.outputs = self.call()
        self.graph = graph

    def run(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            return self.call()
        self.graph.replay()
        return self.outputs
