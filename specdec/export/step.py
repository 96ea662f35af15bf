"""The static-shape step: a `transformers` model as a function of tokens, positions, slots and masks over its own cache.

Every width of this one module becomes a graph of an artefact. Keys and values are buffers that each call overwrites in
place, so that a step returns nothing but what was computed, and forgetting a token is an index and a mask.

Shape suffixes: T rows of the graph, L rows with logits, S slots (the last is a bin for padding rows), K heads of keys
and values, D their size, H heads of queries, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.export.sections import Section, Span, spans
from specdec.runtime.cache import check_rewindable, layer_types
from specdec.runtime.copies import shared_copy
from specdec.runtime.native import Passing, check_call

_NAME = "specdec_static"
#: How attention is written down: "custom" by ExecuTorch's operators for language models, "plain" in core operators.
ATTENTIONS = ("custom", "plain")
# A hidden slot's score. Finite, so that a row that sees nothing is no NaN.
HIDDEN = -1e9
# Rotary embeddings that choose their frequencies by looking at the positions: a graph cannot.
_ROTARY_BY_LENGTH = ("dynamic", "longrope")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls in place of its own: query `[1, H, T, D]`, the rows' keys and values `[1, K, T, D]`."""
    check_call(module, kwargs, "static", "a static graph does", lacking=attention_mask is None)
    assert attention_mask is not None
    call: _Call = kwargs["static"]
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return call.step.attend(query, key, value, call, layer, attention_mask[0, 0], scale, softcap), None


AttentionInterface.register(_NAME, _attention)


@dataclass
class _Call:
    """What the attention layers of one call need."""

    step: StaticStep
    slots: Tensor = field(default_factory=lambda: torch.empty(0))  # [T], of a step that owns what is cached
    held: Sequence[Tensor] = ()  # keys and values of each layer in turn, where the step is given them
    new: list[Tensor] = field(default_factory=list)  # and what the layers make of the rows, in the same order


@dataclass(frozen=True)
class LayerShape:
    """Of one layer's slots. Layers may differ."""

    heads: int
    key_size: int
    value_size: int


def layer_shapes(model: Any) -> tuple[LayerShape, ...]:
    """Of all layers, found by running one token: configurations name them in too many ways."""
    cache = DynamicCache()
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), past_key_values=cache, use_cache=True)
    shapes = []
    for layer in cache.layers:
        if layer.keys is None or layer.values is None:
            raise UnsupportedModelError(f"{type(model).__name__} has a layer without keys and values of its own")
        shapes.append(LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]))
    return tuple(shapes)


class StaticStep(nn.Module):
    """`forward(tokens [T], positions [T], slots [T], *masks [T, S]) -> (logits [T, V][, hidden [T, W]])`.

    The row in place t is written to slot `slots[t]`; slot `num_slots` is the bin that padding rows are written to, and
    no mask may show it. One mask per kind of layer that the model has, in the order of `kinds`: `HIDDEN` at slots that
    a row does not see, 0 elsewhere, its own slot among them. With `one_logit`, `rows [1]` comes before the masks and
    names the row whose logits are computed, `[1, V]`. `hidden`: states of all rows that come with the logits, by their
    index in `transformers`' `hidden_states`.

    The model is copied without its tensors being copied, and stays as it was.
    Raises `UnsupportedModelError` for models whose cache cannot be rewound, or that a graph of fixed shape cannot hold.
    """

    one_logit = False

    def __init__(self, model: Any, num_slots: int, *, hidden: Sequence[int] = (), attention: str = "custom"):
        super().__init__()
        check_rewindable(model)
        check_static(model)
        if attention not in ATTENTIONS:
            raise InputError(f"attention is one of {', '.join(ATTENTIONS)}, not {attention!r}")
        config = model.config.get_text_config(decoder=True)
        types = layer_types(config)
        self.num_slots, self.hidden, self.attention = num_slots, tuple(hidden), attention
        self.kinds = tuple(sorted(set(types)))
        self.shapes = layer_shapes(model)
        self.layers = range(len(self.shapes))
        if len(self.shapes) != len(types):
            raise UnsupportedModelError(f"{type(model).__name__} shares keys and values between layers")
        self.model = shared_copy(model, frozen=True)
        for own in {id(m.config): m.config for m in self.model.modules() if hasattr(m, "config")}.values():
            own._attn_implementation = _NAME
        self.make_slots()

    @property
    def slot_names(self) -> list[str]:
        """Of keys and values of each layer in turn, wherever they are handed about."""
        return [f"{part}_{index}" for index in self.layers for part in ("keys", "values")]

    def make_slots(self) -> None:
        for index, shape in enumerate(self.shapes):
            for name, size in (("keys", shape.key_size), ("values", shape.value_size)):
                room = torch.zeros(1, self.num_slots + 1, shape.heads, size, dtype=self.model.dtype)
                self.register_buffer(f"{name}_{index}", room, persistent=False)

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[1, S, K, D]` each."""
        return getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: _Call,
        layer: int,
        mask_TS: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """Write the rows' keys and values `[1, K, T, D]`, and attend; `[1, T, H, D]`."""
        attend = self.attend_custom if self.attention == "custom" else self.attend_plain
        return attend(query, key, value, call, layer, mask_TS, scale, softcap)

    def attend_custom(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: _Call,
        layer: int,
        mask_TS: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """By the operators of `executorch.extension.llm`; `[1, T, H, D]`."""
        if softcap:
            raise UnsupportedModelError("the custom attention knows no soft cap; use attention='plain'")
        keys, values = self.slots_of(layer)
        operators = torch.ops.llama
        for buffer, rows in ((keys, key), (values, value)):
            operators.update_cache_with_indices(rows.transpose(1, 2).contiguous(), buffer, 0, call.slots[None])
        out: Tensor = operators.custom_sdpa(
            query.transpose(1, 2).contiguous(), keys, values, 0, mask_TS, 0.0, False, scale
        )
        return out

    def attend_plain(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        call: _Call,
        layer: int,
        mask_TS: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        """In core operators, which every partitioner knows; `[1, T, H, D]`."""
        keys, values = self.slots_of(layer)
        for buffer, rows in ((keys, key), (values, value)):
            buffer.index_copy_(1, call.slots, rows.transpose(1, 2))
        heads, rows_count, size = query.shape[1:]
        grouped = query.reshape(keys.shape[2], -1, size)  # heads that share keys are rows of one product
        scores = grouped @ keys[0].permute(1, 2, 0) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(heads, rows_count, -1) + mask_TS
        mixed = scores.softmax(-1).view(keys.shape[2], -1, keys.shape[1]) @ values[0].transpose(0, 1)
        return mixed.view(1, heads, rows_count, -1).transpose(1, 2).contiguous()

    @property
    def ends(self) -> bool:
        """Whether it gives logits; a part that does not gives the states that the next one takes for tokens."""
        return self.layers.stop == len(self.shapes)

    def part(self, span: Span) -> Self:
        """Some of the layers by themselves, on the same tensors."""
        twin = copy.copy(self)
        twin._modules = {**self._modules, "model": Section(self.model, span.layers, span.hidden)}
        twin.layers, twin.hidden = span.layers, span.hidden
        own = set(twin.slot_names)
        twin._buffers = {name: tensor for name, tensor in self._buffers.items() if name in own}
        twin._non_persistent_buffers_set = own & self._non_persistent_buffers_set
        return twin

    def in_parts(self, count: int) -> list[Self]:
        """Steps that do the same in turn; itself where one is wanted. `InputError` for more than there are layers."""
        found = spans(len(self.shapes), count, self.hidden)
        return [self] if count == 1 else [self.part(span) for span in found]

    def forward(self, tokens: Tensor, positions: Tensor, slots: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        rows, masks = (more[0], more[1:]) if self.one_logit else (0, more)
        return self.run(tokens, positions, rows, masks, _Call(self, slots))

    def run(
        self, tokens: Tensor, positions: Tensor, rows: Tensor | int, masks: Sequence[Tensor], call: _Call
    ) -> tuple[Tensor, ...]:
        """The model on these rows: logits, and hidden states where they are wanted. Later parts take states."""
        named = {kind: mask[None, None] for kind, mask in zip(self.kinds, masks, strict=True)}
        out = self.model(
            **{"features" if self.layers.start else "input_ids": tokens[None]},
            position_ids=positions[None],
            attention_mask=named if len(named) > 1 else next(iter(named.values())),
            past_key_values=Cache(layers=[Passing() for _ in self.shapes]),
            use_cache=True,
            logits_to_keep=rows,
            static=call,
            **({"output_hidden_states": True} if self.hidden else {}),
        )
        states = (torch.cat([out.hidden_states[i][0] for i in self.hidden], -1),) if self.hidden else ()
        return (out.logits[0], *states)

    def last_only(self) -> Self:
        """The same step, on the same tensors, that gives the logits of one row. Parts without any stay as is."""
        twin = copy.copy(self)
        twin.one_logit = self.ends
        return twin

    def example(self, width: int) -> tuple[Tensor, ...]:
        """Inputs of a graph of that width."""
        masks = [torch.zeros(width, self.num_slots + 1) for _ in self.kinds]
        rows = [torch.zeros(1, dtype=torch.int64)] if self.one_logit else []
        return (self.first_input(width, torch.int64), torch.arange(width), torch.arange(width), *rows, *masks)

    def first_input(self, width: int, integers: torch.dtype) -> Tensor:
        """Tokens, or of a later part the states `[T, H]` that come from the one before."""
        if not self.layers.start:
            return torch.zeros(width, dtype=integers)
        size = self.model.config.get_text_config(decoder=True).hidden_size
        return torch.zeros(width, int(size), dtype=self.model.dtype)

    @property
    def bytes_per_token(self) -> int:
        itemsize: int = self.model.dtype.itemsize
        return sum(shape.heads * (shape.key_size + shape.value_size) for shape in self.shapes) * itemsize


class Swap(nn.Module):
    """`forward(*new) -> old`: exchanges everything that the slots hold, so that one graph serves many texts.

    Tensors `[1, S, K, D]`, keys and values of each layer in turn. The buffers are those of the step, by name.
    """

    def __init__(self, step: StaticStep):
        super().__init__()
        self.names = step.slot_names
        for name in self.names:
            self.register_buffer(name, getattr(step, name), persistent=False)

    def forward(self, *new: Tensor) -> tuple[Tensor, ...]:
        old = []
        for name, tensor in zip(self.names, new, strict=True):
            buffer = getattr(self, name)
            old.append(buffer.clone())
            buffer.copy_(tensor)
        return tuple(old)

    def example(self) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(getattr(self, name)) for name in self.names)


def check_static(model: Any) -> None:
    """Raise `UnsupportedModelError` for what a graph of fixed shape cannot hold."""
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(found) for found in (rope.get("rope_type"), rope.get("type")) if found}
    kinds |= {str(part["rope_type"]) for part in rope.values() if isinstance(part, dict) and "rope_type" in part}
    by_length = kinds & set(_ROTARY_BY_LENGTH)
    if by_length:
        raise UnsupportedModelError(
            f"{type(model).__name__} chooses its rotary frequencies by the text's length ({', '.join(by_length)}), "
            "which a static graph cannot; export a model with default, linear, llama3 or yarn frequencies"
        )
