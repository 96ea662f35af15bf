"""Programs whose graphs are given keys and values: the host keeps each text's under an updater, and writes the rows.

Shape suffixes: T rows of a graph, S slots.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.export.options import Method
from specdec.export.step import HIDDEN
from specdec.runtime.artifacts import ArtifactBackend, Inputs, Program
from specdec.runtime.updaters import HOST_UPDATERS, Copied, HostSlots, SmartMask, Updater, rooms_of


def host_updater(name: str | None, backend: str) -> type[Updater]:
    """Raises `InputError` for a name that there is not; None is the first."""
    if name is not None and name not in HOST_UPDATERS:
        known = ", ".join(HOST_UPDATERS)
        raise InputError(f"graphs for {backend} leave keys and values to the host, whose KV updater is one of {known}")
    return HOST_UPDATERS[name or SmartMask.name]


class HostProgram(Program):
    """A text's `state` is its `HostSlots`, None until it has written any.

    `prepare` is called once the graphs are there. `hidden_score`: of a slot that a row does not see.
    """

    hidden_score = HIDDEN
    updater: type[Updater]

    def prepare(self, updater: type[Updater]) -> None:
        self.updater, self.copied = updater, Copied()
        slots, kinds = self.options.num_slots, len(self.kinds)
        self._rooms = rooms_of(self.model.manifest.model["slots"], slots)
        self._masks = {
            m.name: [torch.empty(m.width, slots + m.width, dtype=self.slot_dtype) for _ in range(kinds)]
            for m in self.methods
        }

    @abstractmethod
    def run_graph(self, method: Method, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """One call of a graph of `IoStep`, with its inputs and outputs in order."""

    @property
    def slot_bytes(self) -> int:
        return sum(self.updater.elements(room) for room in self._rooms) * self.slot_dtype.itemsize

    def duplicate(self, text: ArtifactBackend) -> HostSlots | None:
        return text.state.duplicate() if text.state is not None else None

    def gather(self, text: ArtifactBackend, slots: Sequence[int], start: int) -> bool:
        text.state.gather(slots, start)
        return True

    def execute(self, text: ArtifactBackend, method: Method, inputs: Inputs, count: int) -> tuple[Tensor, ...]:
        if text.state is None:
            text.state = HostSlots(self.updater(self._rooms, self.slot_dtype, self.copied))
        slots: HostSlots = text.state
        start = int(inputs.slots[0])  # the text's slots stand in order
        held, columns = slots.show(start), slots.updater.columns
        masks, own = self._masks[method.name], self.options.num_slots
        for mask, wanted_TS in zip(masks, inputs.masks, strict=True):
            mask.fill_(self.hidden_score)
            mask[:count, columns] = wanted_TS[:count, :start].clamp(min=self.hidden_score)
            mask[:count, own : own + count] = wanted_TS[:count, start : start + count].clamp(min=self.hidden_score)
        numbers = [tensor.to(torch.int32) for tensor in (inputs.tokens, inputs.positions, *inputs.row)]
        out = tuple(self.run_graph(method, (*numbers, *masks, *held)))
        slots.keep(start, count, out[-len(self._rooms) :])
        return out[: -len(self._rooms)]
