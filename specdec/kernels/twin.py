"""The device kernels in plain torch: the same plans, the same slots, one row at a time.

For tests on machines without the device, and to read. A row is computed alone, so that its bits cannot depend on
others; they are not those of the device.

Shape suffixes: M rows of one step, V key/value heads, G query heads per key/value head, D key size, E value size,
C slots, N slots that a row sees.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch
from torch import Tensor

from specdec.kernels.plan import PARTS, Layout, views

# Keys and values by address, of all models: sequences of two models may share them.
_MEMORIES: WeakValueDictionary[int, Tensor] = WeakValueDictionary()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times `weight [N, K]` transposed, plus `bias [N]`. Lossless: yes."""
    rows = [torch.nn.functional.linear(row[None], weight, bias) for row in x.reshape(-1, x.shape[-1])]
    return torch.cat(rows).view(*x.shape[:-1], weight.shape[0])


def row_sum(x: Tensor) -> Tensor:
    """Sums over the last axis `[..., K] -> [...]`. Lossless: yes."""
    return torch.stack([row.sum() for row in x.reshape(-1, x.shape[-1])]).view(x.shape[:-1])


class TwinKernels:
    """See `specdec.kernels.triton_ops.TritonKernels`. Addresses are looked up among what was registered."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.num_parts = PARTS
        self.linear = linear
        self.row_sum = row_sum

    def register(self, memory: Tensor) -> None:
        """Let plans name this memory by its address."""
        _MEMORIES[memory.data_ptr()] = memory

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float, softcap: float, window: int
    ) -> Tensor:
        num_rows, num_kv = q.shape[2], self.layout.heads[layer][0]
        plan = views(handle, num_rows)
        fields = plan.rows.tolist()
        planes = {row[0]: self.layout.planes(_MEMORIES[row[0]], layer) for row in fields if row[4] >= 0}
        for m, (address, _, _, _, slot) in enumerate(fields):
            if slot >= 0:
                planes[address][0][:, slot], planes[address][1][:, slot] = k[0, :, m], v[0, :, m]
        out = q.new_zeros(1, num_rows, q.shape[1], v.shape[3])
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        for m, (address, _, plain, length, _) in enumerate(fields):
            if not length:
                continue
            first = max(0, int(plan.positions[m]) - window + 1) if window else 0
            slots_N = torch.cat((torch.arange(plain), plan.tail[m, : length - plain]))[first:]
            keys_VND, values_VNE = (plane[:, slots_N].to(exact) for plane in planes[address])
            query_VGD = q[0, :, m].to(exact).view(num_kv, -1, q.shape[3])
            logits_VGN = query_VGD @ keys_VND.transpose(1, 2) * scale
            if softcap:
                logits_VGN = softcap * torch.tanh(logits_VGN / softcap)
            out[0, m] = (logits_VGN.softmax(-1) @ values_VNE).flatten(0, 1).to(q.dtype)
        return out
