"""A program in several parts: layers in a row each, run in turn. What goes from one to the next are hidden states.

Each part is lowered, stored and loaded by itself, so that none outgrows what a device takes at once.

Shape suffixes: T rows of a graph, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import InputError


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


#: Runs one part on its inputs in order.
Call = Callable[[int, Sequence[Tensor]], Sequence[Tensor]]


def in_turn(
    parts: Sequence[Span], call: Call, inputs: Sequence[Tensor], num_held: int, num_masks: int, hidden: Sequence[int]
) -> tuple[Tensor, ...]:
    """One step through all parts, with inputs and outputs as if they were one.

    `inputs`: what `StaticStep.example` or `IoStep.example` lists; the last `num_held` are keys and values that graphs
    are given, before them stand `num_masks` masks, and before those the row that logits are wanted of, if one is.
    """
    held, others = inputs[len(inputs) - num_held :], inputs[: len(inputs) - num_held]
    masks, numbers = others[len(others) - num_masks :], others[1 : len(others) - num_masks]
    passing, first = inputs[0], 0
    states: dict[int, Tensor] = {}
    new: list[Tensor] = []
    # Tokens, positions, and slots where the graphs write keys and values; behind them may stand a row.
    fixed = 1 if num_held else 2
    for index, span in enumerate(parts):
        own = held[first : first + span.num_slots] if num_held else ()
        first += span.num_slots
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
    old: list[Tensor] = []
    for index, span in enumerate(parts):
        old += call(index, new[len(old) : len(old) + span.num_slots])
    return tuple(old)


def numbered(name: str, index: int) -> str:
    """The name of a part's file: model.pte, model_1.pte, …"""
    stem, dot, end = name.partition(".")
    return f"{stem}_{index}{dot}{end}" if index else name
