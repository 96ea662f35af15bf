"""What the machine allows: its read bandwidth, and the bytes that one decoding step must read."""

from __future__ import annotations

import time
from typing import Any

import torch

from specdec.bench.timing import synchronize

# Far beyond any cache, so that every pass reads memory.
BUFFER_BYTES = 256 << 20
_PASSES = 4


class ReadProbe:
    """Sums a 256 MiB float32 buffer, with as many threads as torch has.

    The best pass counts: nothing reads faster than the machine can, and much may read slower.
    """

    describes = f"torch.sum over {BUFFER_BYTES >> 20} MiB of float32, the best pass"

    def __init__(self, device: Any = "cpu", num_bytes: int = BUFFER_BYTES):
        self.device = torch.device(device)
        self.buffer = torch.ones(num_bytes // 4, dtype=torch.float32, device=self.device)

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
    """Bytes that one step at width 1 reads: every parameter once, but of the input embedding only the token's row,
    and the keys and values of `length` tokens.

    A tied embedding is read whole, as the output head.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    tied = head is not None and head.weight.data_ptr() == embedding.data_ptr()
    seen: dict[int, int] = {p.data_ptr(): p.nbytes for p in model.parameters()}
    if not tied:
        seen[embedding.data_ptr()] = embedding[0].nbytes
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = 2 * config.num_hidden_layers * heads * size * embedding.element_size() * length
    return sum(seen.values()) + int(kv)
