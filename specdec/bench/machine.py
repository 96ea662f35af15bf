"""The machine: its read bandwidth and the bytes that one decoding step must read; the memory that was used."""

from __future__ import annotations

import time
from typing import Any

import torch

from specdec.bench.timing import synchronize
from specdec.quant.linear import PackedLinear

# Far beyond any cache, so that every pass reads memory; on a GPU long beside the start of a kernel, too.
BUFFER_BYTES = 256 << 20
_GPU_BUFFER_BYTES = 4 << 30
_PASSES = 4


class ReadProbe:
    """Sums a float32 buffer of 256 MiB (4 GiB on a GPU), with as many threads as torch has.

    The best pass counts: nothing reads faster than the machine can, and much may read slower.
    """

    def __init__(self, device: Any = "cpu", num_bytes: int | None = None):
        self.device = torch.device(device)
        num_bytes = self.size(self.device) if num_bytes is None else num_bytes
        self.buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=self.device)

    @staticmethod
    def size(device: torch.device) -> int:
        """Bytes that are read."""
        return _GPU_BUFFER_BYTES if device.type == "cuda" else BUFFER_BYTES

    @classmethod
    def describe(cls, device: torch.device) -> str:
        return f"torch.sum over {cls.size(device) >> 20} MiB of float32, the best pass"

    @torch.inference_mode()
    def __call__(self) -> float:
        """Bytes per second of the best of a few passes."""
        best = 0.0
        for _ in range(_PASSES):
            synchronize(self.device)
            started = time.perf_counter()
            self.buffer.sum()
            synchronize(self.device)
            best = max(best, self.buffer.nbytes / (time.perf_counter() - started))
        return best


def streamed_bytes(model: Any, length: int) -> int:
    """Bytes that one step at width 1 reads: every weight once, as it is stored, but of the input embedding only the
    token's row, and the keys and values of `length` tokens.

    A tied embedding is read whole, as the output head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    tied = getattr(head, "weight", None) is not None and head.weight.data_ptr() == embedding.data_ptr()
    stored = [t for m in model.modules() if isinstance(m, PackedLinear) for t in m.parts.values()]
    seen: dict[int, int] = {p.data_ptr(): p.nbytes for p in [*model.parameters(), *stored]}
    if not tied:
        seen[embedding.data_ptr()] = embedding[0].nbytes
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * heads * size * embedding.element_size() * length
    return sum(seen.values()) + int(kv)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the highest point so far: of the process, and on the accelerator if there is one."""
    peak: dict[str, int] = {}
    try:
        import resource
        import sys
    except ImportError:  # no such module on Windows
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
