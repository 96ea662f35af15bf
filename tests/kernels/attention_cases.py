"""Steps for the attention tests, and what they must give: plain torch in float64, over the slots a row may see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec import kernels


@dataclass(frozen=True)
class Shape:
    heads: int = 6
    kv_heads: int = 2
    size: int = 40
    value_size: int = 24
    softcap: float = 0.0
    window: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def scale(self) -> float:
        return self.size**-0.5


def rows(shape: Shape, num: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values `[heads, num, size]`."""
    noise = torch.Generator().manual_seed(seed)
    sizes = ((shape.heads, shape.size), (shape.kv_heads, shape.size), (shape.kv_heads, shape.value_size))
    q, k, v = (torch.randn(h, num, d, generator=noise).to(shape.dtype) for h, d in sizes)
    return q, k, v


def chain(start: int, num: int) -> tuple[Tensor, Tensor]:
    """Block and block positions of `num` causal rows behind `start` slots."""
    places = torch.arange(start, start + num)
    return torch.ones(num, num, dtype=torch.bool).tril(), places


def tree(start: int, parents: list[int]) -> tuple[Tensor, Tensor]:
    """The same for tree nodes; parent -1 is the last slot of the prefix."""
    block = torch.eye(len(parents), dtype=torch.bool)
    depths = []
    for node, parent in enumerate(parents):
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        if parent >= 0:
            block[node] |= block[parent]
    places = start + torch.tensor(depths)
    return block, places


def attend(shape: Shape, handle: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Tensor:
    """`[M, H, E]`."""
    out = kernels.attend(q[None], k[None], v[None], handle, layer, shape.scale, shape.softcap, shape.window)
    return out[0]


def step(
    shape: Shape, slots: object, start: int, prefix: int, q: Tensor, k: Tensor, v: Tensor, *seen: Tensor
) -> Tensor:
    """One forward of one sequence."""
    steps = kernels.steps()
    steps.add(slots, start, q.shape[1], prefix, *seen)
    return attend(shape, steps.handle(), q, k, v)


def one_by_one(shape: Shape, q: Tensor, k: Tensor, v: Tensor, capacity: int = 4096) -> tuple[Tensor, object]:
    """Plain decoding: every row alone, in a cache of its own."""
    slots = kernels.slots(1)
    slots.reserve(capacity)
    outputs = []
    for i in range(q.shape[1]):
        row = (t[:, i : i + 1] for t in (q, k, v))
        outputs.append(step(shape, slots, i, i, *row, *chain(i, 1)))
    return torch.cat(outputs), slots


def prefilled(shape: Shape, k: Tensor, v: Tensor, capacity: int = 4096, kv_cache: str | None = None) -> object:
    """A cache that holds these keys and values, written in one step."""
    slots = kernels.slots(1, kv_cache)
    slots.reserve(capacity)
    num = k.shape[1]
    step(shape, slots, 0, 0, torch.zeros(shape.heads, num, shape.size, dtype=shape.dtype), k, v, *chain(0, num))
    return slots


def expected(shape: Shape, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """float64 `[M, H, E]`; `visible` bool `[M, C]` with the window already applied."""
    group = shape.heads // shape.kv_heads
    keys, values = (t.double().repeat_interleave(group, 0) for t in (k, v))
    logits = q.double() @ keys.transpose(1, 2) * shape.scale
    if shape.softcap:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ values).transpose(0, 1)
