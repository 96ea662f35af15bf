"""A program in several parts: layers in a row each, run in turn. What goes from one to the next are hidden states.

Each part is lowered, stored and loaded by itself, so that none outgrows what a device takes at once.

Shape suffixes: M rows of a graph, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.runtime.cache import layer_types
from specdec.runtime.copies import StandIn
from specdec.runtime.parts import Entry, Exit, PartOutput, layers_path, with_layers_at, with_module


@dataclass(frozen=True)
class Span:
    """`hidden`: states that the part gives beside its result, by `transformers`' index."""

    layers: range
    hidden: tuple[int, ...]
    ends: bool

    @property
    def num_slots(self) -> int:
        """Tensors of keys and values."""
        return 2 * len(self.layers)


def spans(num_layers: int, parts: int, hidden: Sequence[int] = ()) -> list[Span]:
    """As many layers in each part as go, the first parts one more. `InputError` for more parts than layers."""
    if not 1 <= parts <= num_layers:
        raise InputError(f"parts is a whole number from 1 to the {num_layers} layers of the model, not {parts}")
    size, more = divmod(num_layers, parts)
    found, start = [], 0
    for index in range(parts):
        stop = start + size + (index < more)
        # A state between two parts is what goes from one to the other.
        given = tuple(i for i in hidden if start < i < stop or (i == 0 and not start) or i == stop == num_layers)
        found.append(Span(range(start, stop), given, stop == num_layers))
        start = stop
    return found


class _NoEmbeddings(nn.Module):
    """In place of embeddings whose result nobody reads, so that their table is no part of what is written out."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = width, dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, self.width, dtype=self.dtype, device=tokens.device)


class Section(StandIn):
    """Layers in a row of a model, which is run by several of them in turn.

    One that begins behind the first layer takes `features [1, M, H]` and has no embeddings; one that ends before the
    last gives those of the next in place of logits, and has no head. `hidden`: states that it gives besides, by
    `transformers`' index; from 0 in the first, up to the last in the last, and otherwise those between its layers.
    """

    def __init__(self, model: Any, layers: range, hidden: Sequence[int] = ()):
        super().__init__()
        config = model.config.get_text_config(decoder=True)
        path, kinds = layers_path(model), layer_types(config)
        self.starts, self.ends = layers.start == 0, layers.stop == len(kinds)
        self.hidden, self.stop = tuple(hidden), layers.stop
        taps = [i for i in self.hidden if i < layers.stop] + ([] if self.ends else [layers.stop])
        self.exits = {i: Exit(kinds[max(i - 1, 0)]) for i in taps}
        self.entry = None if self.starts else Entry(kinds[layers.start])
        stack: list[tuple[nn.Module, str]] = [] if self.entry is None else [(self.entry, self.entry.attention_type)]
        for i in (*layers, layers.stop):
            if i in self.exits:
                stack.append((self.exits[i], self.exits[i].attention_type))
            if i in layers:
                stack.append((model.get_submodule(path)[i], kinds[i]))
        inner = with_layers_at(model, path, [module for module, _ in stack], [kind for _, kind in stack])
        names = {id(module): name for name, module in model.named_modules()}
        if not self.starts:
            nothing = _NoEmbeddings(int(config.hidden_size), model.dtype)
            inner = with_module(inner, names[id(model.get_input_embeddings())], nothing)
        if not self.ends:
            inner = with_module(inner, names[id(model.get_output_embeddings())], nn.Identity())
        self.inner, self.config = inner, model.config

    def _forget(self) -> None:
        for tap in self.exits.values():
            tap.wire.states = None
        if self.entry is not None:
            self.entry.wire.states = None

    def forward(
        self,
        *,
        position_ids: Tensor,
        input_ids: Tensor | None = None,
        features: Tensor | None = None,
        output_hidden_states: bool = False,
        **given: Any,
    ) -> PartOutput:
        normed = self.ends and self.stop in self.hidden  # the last state is what the head reads
        try:
            if self.entry is not None:
                self.entry.wire.states, input_ids = features, torch.zeros_like(position_ids)
            out = self.inner(
                input_ids=input_ids,
                position_ids=position_ids,
                **given,
                **({"output_hidden_states": True} if normed else {}),
            )
            states = {i: kept for i, tap in self.exits.items() if (kept := tap.wire.states) is not None}
        finally:
            self._forget()
        if normed:
            states[self.stop] = out.hidden_states[-1]
        return PartOutput(out.logits if self.ends else states[self.stop], states)


#: Runs one part on its inputs in order.
Call = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]


def by_part(parts: Sequence[Span], tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Of keys and values of all layers in turn, those of each part."""
    first = 0
    for span in parts:
        yield tensors[first : first + span.num_slots]
        first += span.num_slots


def in_turn(
    parts: Sequence[Span], call: Call, inputs: Sequence[Tensor], num_held: int, num_masks: int, hidden: Sequence[int]
) -> tuple[Tensor, ...]:
    """One step through all parts, with inputs and outputs as if they were one.

    `inputs`: what `StaticStep.example` or `IoStep.example` lists; the last `num_held` are keys and values that graphs
    are given, before them stand `num_masks` masks, and before those the row that logits are wanted of, if one is.
    """
    if len(parts) == 1:
        return tuple(call(0, inputs))
    held, others = inputs[len(inputs) - num_held :], inputs[: len(inputs) - num_held]
    masks, numbers = others[len(others) - num_masks :], others[1 : len(others) - num_masks]
    passing = inputs[0]
    states: dict[int, Tensor] = {}
    new: list[Tensor] = []
    # Tokens, positions, and slots where the graphs write keys and values; behind them may stand a row.
    fixed = 1 if num_held else 2
    for index, (span, own) in enumerate(zip(parts, by_part(parts, held), strict=True)):
        passing, *more = call(index, (passing, *(numbers if span.ends else numbers[:fixed]), *masks, *own))
        if span.hidden:
            states |= dict(zip(span.hidden, more[0].chunk(len(span.hidden), -1), strict=True))
            more = more[1:]
        if not span.ends:
            states[span.layers.stop] = passing
        new += more
    return (passing, *([torch.cat([states[i] for i in hidden], -1)] if hidden else []), *new)


def swapped(parts: Sequence[Span], call: Call, new: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What all parts' slots held, in exchange for `new`; keys and values of each layer in turn."""
    return tuple(old for index, own in enumerate(by_part(parts, new)) for old in call(index, own))


def numbered(name: str, index: int) -> str:
    """The name of a part's file: model.pte, model_1.pte, …"""
    stem, dot, end = name.partition(".")
    return f"{stem}_{index}{dot}{end}" if index else name
