"""The slot cache: preallocated keys and values, written by slot, rolled back by index.

Shape suffixes: B sequences, S slots, M new rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from specdec.errors import UnsupportedModelError

# Lengths grow through these; beyond the last, by multiples of it.
BUCKETS = (128, 256, 512, 1024, 2048, 4096)
# Layers whose keys and values stand in slots of their own, so that forgetting one is forgetting its slot.
REWINDABLE = frozenset({"full_attention", "sliding_attention"})


def bucket(length: int, limit: int) -> int:
    """The smallest bucket that holds `length` slots, never more than the context `limit`."""
    fitting = [size for size in BUCKETS if size >= length]
    return min(limit, fitting[0] if fitting else -(-length // BUCKETS[-1]) * BUCKETS[-1])


def layer_types(config: Any) -> tuple[str, ...]:
    """One type per layer, from the configuration; models that name none have a sliding window or full attention."""
    named = getattr(config, "layer_types", None)
    if named is None and "local" in getattr(config, "attention_layers", ()):
        # GPT-Neo: its local window counts slots, not positions.
        return tuple("full_attention" if kind == "global" else kind for kind in config.attention_layers)
    if named is not None:
        return tuple(named)
    kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return (kind,) * int(config.num_hidden_layers)


def check_rewindable(model: Any) -> None:
    """Raise `UnsupportedModelError`, naming the layer type, when the model's state cannot be rolled back."""
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; specdec decodes decoder-only causal models")
    other = sorted(set(layer_types(config)) - REWINDABLE)
    if not other and getattr(model, "_is_stateful", False):
        other = ["recurrent state"]
    if other:
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(other)}, whose cache cannot be rewound after a rejected token. "
            "Models whose layers are full or sliding-window attention work; use model.generate for this one."
        )
    # Wrappers pass keyword arguments through; a model of transformers' own says in its signature what it takes.
    unplaced = (
        isinstance(model, PreTrainedModel) and "position_ids" not in inspect.signature(type(model).forward).parameters
    )
    if unplaced or getattr(config, "alibi", False):
        raise UnsupportedModelError(
            f"{name} takes no position_ids: its positions follow the cache (as ALiBi's do), and drafted branches would "
            "stand at wrong ones. Models with rotary or learned positions work; use model.generate for this one."
        )


@dataclass
class Cursor:
    """Where the next step writes; one for all layers."""

    start: int = 0
    end: int = 0
    capacity: int = 0


class SlotLayer(CacheLayerMixin):
    """One layer: keys and values `[B, heads, S, head_dim]`. Sliding layers keep every slot; the mask hides old ones."""

    is_sliding = False

    def __init__(self, cursor: Cursor):
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            torch.zeros(*s.shape[:2], self.cursor.capacity, s.shape[3], dtype=s.dtype, device=s.device)
            for s in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.cursor.start, self.cursor.end
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grow(self) -> None:
        if not self.is_initialized:
            return
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = torch.zeros(*old.shape[:2], self.cursor.capacity, old.shape[3], dtype=old.dtype, device=old.device)
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def gather(self, slots: Tensor, start: int) -> None:
        """Move the given slots so that they lie one after another from `start`."""
        if not self.is_initialized:  # a part of the model that has not run yet
            return
        for buffer in (self.keys, self.values):
            buffer[:, :, start : start + len(slots)] = buffer[:, :, slots.to(buffer.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.end, 0

    def get_seq_length(self) -> int:
        return self.cursor.start

    def get_max_length(self) -> int:
        return self.cursor.capacity


class SlotCache(Cache):
    """A `transformers` cache over slots. `transformers` writes through `update`; the session moves the cursor."""

    def __init__(self, num_layers: int, limit: int):
        self.cursor = Cursor()
        self.limit = limit
        super().__init__(layers=[SlotLayer(self.cursor) for _ in range(num_layers)])

    def place(self, start: int, count: int) -> None:
        """The next step writes `count` rows from slot `start`; grows to the next bucket when they do not fit."""
        if start + count > self.cursor.capacity:
            self.cursor.capacity = bucket(start + count, max(self.limit, start + count))
            for layer in self.layers:
                layer.grow()
        self.cursor.start, self.cursor.end = start, start + count

    def gather(self, slots: Sequence[int], start: int) -> None:
        """Commit: `slots` become the slots from `start` on. Nothing moves when they already are."""
        if list(slots) == list(range(start, start + len(slots))):
            return
        index = torch.tensor(list(slots), dtype=torch.int64)
        for layer in self.layers:
            layer.gather(index, start)

    def fork(self, length: int) -> SlotCache:
        """An independent copy of the first `length` slots."""
        twin = SlotCache(len(self.layers), self.limit)
        twin.cursor.capacity = self.cursor.capacity
        for mine, its in zip(self.layers, twin.layers, strict=True):
            if mine.is_initialized:
                its.lazy_initialization(mine.keys, mine.values)
                its.keys[:, :, :length] = mine.keys[:, :, :length]
                its.values[:, :, :length] = mine.values[:, :, :length]
        return twin

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values))
