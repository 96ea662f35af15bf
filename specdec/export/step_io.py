"""The static step with keys and values outside: what is cached comes in, the rows' own go out, the host writes them.

This is the form that NPUs want: graphs without state, whose inputs and outputs all have a fixed shape. Keys lie
transposed, as a product with queries reads them.

Shape suffixes: T rows of the graph, S slots, K heads of keys and values, D their size, H heads of queries, V
vocabulary, W width of hidden states; G rows of all heads that share keys and values, H / K times T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from specdec.export.step import StaticStep, _Call

#: A hidden slot's score where products are half precision: e^-1000 is 0 there, and sums with it are finite.
HIDDEN_HALF = -1000.0


class IoStep(StaticStep):
    """`forward(tokens [T], positions [T], *masks [T, S + T], *held) -> (logits [T, V][, hidden [T, W]], *new)`.

    `held`: keys `[K, D, S]` and values `[K, S, D]` of each layer in turn; `new`: those of the rows, `[K, D, T]` and
    `[K, T, D]`, for the host to write wherever it wants them to stand. A mask's first S columns are the slots, the
    last T the rows themselves: a row sees itself there, and in a tree its ancestors. A slot that the rows are to be
    written to must not be shown. Masks and `one_logit` are otherwise those of `StaticStep`; there is no bin.

    Integers may be int32. Rotary embeddings are looked up in tables of `num_positions` rows, computed beforehand: the
    angle of a late position has no place in half precision.

    `calibration_BT`: text, int64, for those who round what the graphs compute.
    """

    calibration_BT: Tensor | None = None

    def __init__(
        self, model: Any, num_slots: int, *, num_positions: int | None = None, hidden: Sequence[int] = ()
    ) -> None:
        super().__init__(model, num_slots, hidden=hidden, attention="plain")
        self.num_positions = num_positions or num_slots
        _tabulate_rotary(self.model, self.num_positions)
        with torch.no_grad():
            self(*self.example(1))  # fills the tables

    def make_slots(self) -> None:
        """The host has them."""

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
        """Over slots and rows, without putting the two together: that would copy the slots at every step."""
        first = 2 * (layer - self.layers.start)
        keys_KDS, values_KSD = call.held[first : first + 2]
        own_KDT, own_KTD = key[0].transpose(1, 2), value[0]
        call.new += [own_KDT, own_KTD]
        heads, rows, size = query.shape[1:]
        num_shared, width = own_KTD.shape[0], own_KTD.shape[2]
        query_KGD = (query[0] * scale).reshape(num_shared, -1, size)
        scores = torch.cat((query_KGD @ keys_KDS, query_KGD @ own_KDT), -1)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        weights = (scores.view(heads, rows, -1) + mask_TS).softmax(-1).view(num_shared, heads // num_shared * rows, -1)
        slots = self.num_slots
        mixed = weights[:, :, :slots] @ values_KSD + weights[:, :, slots:] @ own_KTD
        return mixed.view(1, heads, rows, width).transpose(1, 2)

    def forward(self, tokens: Tensor, positions: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        row, more = (more[0], more[1:]) if self.one_logit else (None, more)
        masks, held = more[: len(self.kinds)], more[len(self.kinds) :]
        call = _Call(self, held=held)
        with self._one_row(row):
            return (*self.run(tokens, positions, 0, masks, call), *call.new)

    @contextmanager
    def _one_row(self, row: Tensor | None) -> Iterator[None]:
        """The head sees that row only. `logits_to_keep` would do but for its index, which has to be int64 in ONNX."""

        def choose(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            assert row is not None
            return (given[0].index_select(1, row), *given[1:])

        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose) if row is not None else None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def empty(self) -> tuple[Tensor, ...]:
        """Keys and values of a text that has none yet."""
        made: list[Tensor] = []
        for shape in self.shapes[self.layers.start : self.layers.stop]:
            made.append(torch.zeros(shape.heads, shape.key_size, self.num_slots, dtype=self.model.dtype))
            made.append(torch.zeros(shape.heads, self.num_slots, shape.value_size, dtype=self.model.dtype))
        return tuple(made)

    def example(self, width: int) -> tuple[Tensor, ...]:
        numbers = [self.first_input(width, torch.int32), torch.arange(width, dtype=torch.int32)]
        rows = [torch.zeros(1, dtype=torch.int32)] if self.one_logit else []
        masks = [torch.zeros(width, self.num_slots + width, dtype=self.model.dtype) for _ in self.kinds]
        return (*numbers, *rows, *masks, *self.empty())

    def names(self) -> tuple[list[str], list[str]]:
        """Of inputs and of outputs, in order."""
        slots = self.slot_names
        rows = ["row"] if self.one_logit else []
        first, result = "states" if self.layers.start else "tokens", "logits" if self.ends else "next_states"
        inputs = [first, "positions", *rows, *(f"mask_{i}" for i in range(len(self.kinds))), *slots]
        return inputs, [result, *(["hidden"] if self.hidden else []), *(f"new_{name}" for name in slots)]


class _Table(nn.Module):
    """A rotary embedding of a model as rows to look up; one table for each kind of layer that the model asks for."""

    def __init__(self, rotary: nn.Module, num_positions: int):
        super().__init__()
        self.rotary, self.num_positions = rotary, num_positions
        self._names: dict[tuple[Any, ...], int] = {}

    def _tables(self, x: Tensor, kind: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if kind not in self._names:
            positions = torch.arange(self.num_positions, device=x.device)[None]
            index = self._names[kind] = len(self._names)
            for name, table in zip(("cos", "sin"), self.rotary(x, positions, *kind), strict=True):
                self.register_buffer(f"{name}_{index}", table[0].clone(), persistent=False)
        index = self._names[kind]
        return getattr(self, f"cos_{index}"), getattr(self, f"sin_{index}")

    def forward(self, x: Tensor, position_ids: Tensor, *kind: Any, **named: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self._tables(x, (*kind, *named.values()))
        return nn.functional.embedding(position_ids, cos), nn.functional.embedding(position_ids, sin)


def _tabulate_rotary(model: nn.Module, num_positions: int) -> None:
    """Put tables in place of a model's rotary embeddings; a first call fills them."""
    found = [name for name, module in model.named_modules() if hasattr(module, "inv_freq") or _by_kind(module)]
    for name in found:
        if any(name.startswith(f"{other}.") for other in found):
            continue
        model.set_submodule(name, _Table(model.get_submodule(name), num_positions))


def _by_kind(module: nn.Module) -> bool:
    """Rotary embeddings of models whose layers have different ones."""
    return any(name.endswith("_inv_freq") for name, _ in module.named_buffers(recurse=False))
