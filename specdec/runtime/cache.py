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
from specdec.quant.kv import KVFormat

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
    """One layer: keys and values `[B, heads, S, head_dim]`. Sliding layers keep every slot; the mask hides old ones.

    With a `format`, `keys` and `values` are its codes, and their scales stand beside them, `[B, heads, S, ...]`. What
    attention reads is unpacked from them, rows of the same step included.
    """

    is_sliding = False

    def __init__(self, cursor: Cursor, index: int = 0, format: KVFormat | None = None):
        super().__init__()
        self.cursor, self.index, self.format = cursor, index, format
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None

    def _stored(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return (rows, None) if self.format is None else self.format.pack(rows)

    def _room(self, like: Tensor | None) -> Tensor | None:
        """As `like`, with as many slots as there are."""
        return None if like is None else like.new_zeros(*like.shape[:2], self.cursor.capacity, like.shape[3])

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self.format is not None:
            for rows in (key_states, value_states):
                self.format.check(rows.shape[3], f"layer {self.index}")
        self.keys, self.key_scales = map(self._room, self._stored(key_states[:, :, :1]))
        self.values, self.value_scales = map(self._room, self._stored(value_states[:, :, :1]))
        self.is_initialized = True

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """All that is stored, of all slots; nothing before the first write."""
        held = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(buffer for buffer in held if buffer is not None) if self.is_initialized else ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        return self._put(keys, self.key_scales, key_states), self._put(values, self.value_scales, value_states)

    def _put(self, codes: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
        """Write the step's rows, and read all up to them."""
        start, end = self.cursor.start, self.cursor.end
        codes[:, :, start:end], new_scales = self._stored(rows)
        if self.format is None or scales is None or new_scales is None:
            return codes[:, :, :end]
        scales[:, :, start:end] = new_scales
        return self.format.unpack(codes[:, :, :end], scales[:, :, :end], rows.dtype)

    def grow(self) -> None:
        self.copy(self, None)

    def copy(self, other: SlotLayer, length: int | None) -> None:
        """Take what the other layer holds in its first `length` slots (None: in all), into room of this cursor's."""
        if not other.is_initialized:  # a part of the model that has not run yet
            return
        for name in ("keys", "values", "key_scales", "value_scales"):
            old = getattr(other, name)
            new = self._room(old)
            if new is not None:
                size = old.shape[2] if length is None else length
                new[:, :, :size] = old[:, :, :size]
            setattr(self, name, new)
        self.is_initialized = True

    def gather(self, slots: Tensor, start: int) -> None:
        """Move the given slots so that they lie one after another from `start`: codes and scales, as they are."""
        for buffer in self.buffers:
            buffer[:, :, start : start + len(slots)] = buffer[:, :, slots.to(buffer.device)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.end, 0

    def get_seq_length(self) -> int:
        return self.cursor.start

    def get_max_length(self) -> int:
        return self.cursor.capacity


class SlotCache(Cache):
    """A `transformers` cache over slots. `transformers` writes through `update`; the session moves the cursor.

    `format`: how keys and values are stored; None as they are computed.
    """

    def __init__(self, num_layers: int, limit: int, format: KVFormat | None = None):
        self.cursor = Cursor()
        self.limit, self.format = limit, format
        super().__init__(layers=[SlotLayer(self.cursor, index, format) for index in range(num_layers)])

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
        twin = SlotCache(len(self.layers), self.limit, self.format)
        twin.cursor.capacity = self.cursor.capacity
        for mine, its in zip(self.layers, twin.layers, strict=True):
            its.copy(mine, length)
        return twin

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)
