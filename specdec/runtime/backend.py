"""How a session's step runs. A backend owns the keys and values; the session owns tokens, trees and positions.

Shape suffixes: M rows of one step, C cached slots, V vocabulary, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data: a drafter that needs more is refused with the reason."""

    vocab_size: int
    context: int  # positions
    device: torch.device
    dtype: torch.dtype
    trees: bool = True
    hidden_states: bool = True
    widths: tuple[int, ...] | None = None  # None: any number of rows


@dataclass(frozen=True)
class Step:
    """One forward: rows `[M]` with their absolute positions, written to the M slots from `start` on.

    `mask_MC` (bool, C = start + M) tells which slots each row sees, itself included. A sliding layer also hides
    slots whose position lies `window` or more behind the row's: `key_positions_C` are the positions of the slots.
    Logits are wanted for the last `num_logits` rows.
    """

    tokens: Tensor
    positions: Tensor
    key_positions_C: Tensor
    mask_MC: Tensor
    start: int
    num_logits: int
    hidden: bool = False


@dataclass(frozen=True)
class StepResult:
    logits: Tensor  # [num_logits, V]
    hidden: tuple[Tensor, ...] | None = None  # per layer boundary, [num_logits, H]


class Backend(ABC):
    """Runs steps of one model for one sequence."""

    @classmethod
    @abstractmethod
    def open(cls, model: Any, **options: Any) -> Self:
        """Wrap a loaded model. Raises `UnsupportedModelError` when its state cannot be rewound."""

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @abstractmethod
    def forward(self, step: Step) -> StepResult: ...

    @abstractmethod
    def gather(self, slots: Sequence[int], start: int) -> None:
        """Make `slots` contiguous from `start`; what lies behind them is free."""

    @abstractmethod
    def fork(self, length: int) -> Self:
        """An independent backend on the same weights that holds a copy of the first `length` slots."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of keys and values held."""
