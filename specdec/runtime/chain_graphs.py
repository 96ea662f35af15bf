"""Whole drafts as captured graphs: every step of a chain and the choice between two steps, in one replay.

All that a draft's steps are told is known before the first one, but for the tokens. So the plans of all steps, see
`specdec/kernels/plan.py`, go to the device in one copy, and each step's tokens are written there into the next plan.

Shape suffixes: K tokens of a chain, S sequences, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from specdec.errors import BackendWarning
from specdec.kernels.plan import FIELDS, num_parts, size, views
from specdec.runtime.backend import Step
from specdec.runtime.captured import Captured
from specdec.runtime.chain import Chain, Drafted, Rule
from specdec.runtime.device import DeviceSlots, sight, write_plan

if TYPE_CHECKING:
    from specdec.runtime.backends.cuda import Shared

# A draft is captured when its like was asked for so often: a length that a policy only tries is not worth it.
AFTER = 3
# Graphs that are kept, those used last; lengths are few, but every temperature has its own.
MOST = 48
# Numbers of noise that a graph may hold: drafts of many texts that sample from a large vocabulary go step by step.
MOST_NOISE = 1 << 21
# Drafts that were asked for too seldom to be captured, before they are forgotten.
_MOST_ASKED = 1024


@dataclass(frozen=True)
class Key:
    """What a captured draft is for."""

    width: int  # rows of the first step, at most
    num_rows: int  # sequences, at most: rows of the other steps
    count: int
    parts: int
    rule: Rule


class ChainProgram(Captured):
    """The first step's plan, those of the others, and which rows the chains begin from, in one buffer; the noise."""

    def __init__(self, shared: Shared, key: Key):
        super().__init__()
        self.shared, self.key = shared, key
        device = shared.device
        self.plan = torch.zeros(sum(_sizes(key)), dtype=torch.int64, device=device)
        for part, width in _plans(self.plan, key):
            views(part, width).rows[:, -1] = -1  # nothing is written while capturing
        noise = (key.count, key.num_rows, key.rule.vocab_size)
        self.noise_KSV = torch.ones(noise, dtype=torch.float64, device=device) if key.rule.is_noisy else None
        self.capture(device, shared.pool)

    def call(self) -> tuple[Tensor, ...]:
        """Tokens `[K, S]`, and what they were drawn from `[K, S, V]` where the rule says so."""
        shared, rule = self.shared, self.key.rule
        shared.kernels.num_parts = self.key.parts
        plans = _plans(self.plan, self.key)
        begins = self.plan[-self.key.num_rows :]
        tokens: list[Tensor] = []
        rows: list[Tensor] = []
        for at, (plan, width) in enumerate(plans):
            if at:
                views(plan, width).tokens.copy_(tokens[-1])
            logits = shared.call(plan, width, None, begins if not at else None)[0]
            token, q = rule(logits, None if self.noise_KSV is None else self.noise_KSV[at])
            tokens.append(token)
            if q is not None:
                rows.append(q)
        return (torch.stack(tokens), torch.stack(rows)) if rows else (torch.stack(tokens),)


def _sizes(key: Key) -> list[int]:
    """Of the parts of a program's buffer."""
    return [size(key.width, 0), *[size(key.num_rows, 0)] * (key.count - 1), key.num_rows]


def _plans(flat: Tensor, key: Key) -> list[tuple[Tensor, int]]:
    """Views of a program's plans, with the rows of each."""
    parts = flat.split(_sizes(key))[:-1]
    return [(part, key.num_rows if at else key.width) for at, part in enumerate(parts)]


def write_chains(pairs: Sequence[tuple[DeviceSlots, Step]], chains: Sequence[Chain], key: Key, pinned: bool) -> Tensor:
    """What a program is told, on the host. A chain that is shorter than the longest leaves its row idle at the end."""
    flat = torch.zeros(sum(_sizes(key)), dtype=torch.int64, pin_memory=pinned)
    first, rest, begins = flat.split([size(key.width, 0), (key.count - 1) * size(key.num_rows, 0), key.num_rows])
    first.copy_(write_plan(pairs, key.width, 0, False, [sight(step) for _, step in pairs]))
    # All later plans at once: of each level tokens, positions and rows, as `views` finds them. In numpy, since this is
    # done in every round and torch takes longer for a few numbers.
    levels = rest.view(key.count - 1, size(key.num_rows, 0))
    positions = levels[:, key.num_rows : 2 * key.num_rows].numpy()
    rows = levels[:, 2 * key.num_rows :].unflatten(1, (key.num_rows, FIELDS)).numpy()
    rows[:, :, -1] = -1
    ends = 0
    for row, ((slots, step), chain) in enumerate(zip(pairs, chains, strict=True)):
        ends += step.num_rows
        begins[row] = ends - 1
        # A slot's number is its position: a draft begins from the end of a text.
        slot_K = np.arange(step.end, step.end + chain.count - 1)
        live = rows[: chain.count - 1, row]
        live[:, 0], live[:, 1] = slots.address, slots.capacity
        live[:, 2] = live[:, 3] = slot_K + 1
        live[:, 4] = positions[: chain.count - 1, row] = slot_K
    return flat


class ChainGraphs:
    """The captured drafts of one model."""

    def __init__(self, shared: Shared):
        self._shared = shared
        self._asked: Counter[Key] = Counter()
        self._is_refused = False
        self.programs: OrderedDict[Key, ChainProgram] = OrderedDict()

    def clear(self) -> None:
        self.programs.clear()

    def run(
        self, pairs: Sequence[tuple[DeviceSlots, Step]], chains: Sequence[Chain], widths: Sequence[int]
    ) -> list[Drafted] | None:
        """What was drafted by chains of one rule; None where no graph is for them, or none yet."""
        count = sum(step.num_rows for _, step in pairs)
        if count > widths[-1] or self._is_refused:
            return None
        fit = [next(width for width in widths if width >= rows) for rows in (count, len(pairs))]
        parts = num_parts(max(slots.capacity for slots, _ in pairs))
        key = Key(fit[0], fit[1], max(chain.count for chain in chains), parts, chains[0].rule)
        if key.rule.is_noisy and key.count * key.num_rows * key.rule.vocab_size > MOST_NOISE:
            return None
        program = self._find(key)
        if program is None:
            return None
        pinned = self._shared.device.type == "cuda"
        program.plan.copy_(write_chains(pairs, chains, key, pinned), non_blocking=True)
        if program.noise_KSV is not None:
            for row, chain in enumerate(chains):
                assert chain.noise_KV is not None
                program.noise_KSV[: chain.count, row].copy_(chain.noise_KV)
        tokens_KS, *rows = program.run()
        return [
            Drafted(tokens_KS[: chain.count, row].clone(), rows[0][: chain.count, row].clone() if rows else None)
            for row, chain in enumerate(chains)
        ]

    def _find(self, key: Key) -> ChainProgram | None:
        if key not in self.programs:
            self._asked[key] += 1
            if self._asked[key] < AFTER:
                if len(self._asked) > _MOST_ASKED:
                    self._asked.clear()
                return None
            del self._asked[key]
            try:
                self.programs[key] = ChainProgram(self._shared, key)
            except RuntimeError as error:  # of CUDA, whatever it could not record: steps are captured one by one
                self._is_refused = True
                cause = str(error).partition("\n")[0]
                message = f"drafts are not captured whole, and run step by step: {cause}"
                warnings.warn(message, BackendWarning, stacklevel=2)
                return None
            if len(self.programs) > MOST:
                self.programs.popitem(last=False)
        self.programs.move_to_end(key)
        return self.programs[key]
