"""How a session's step runs. A backend owns the keys and values; the session owns tokens, trees and positions.

Shape suffixes: M rows of one step, B slots of its block, C cached slots, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError
from specdec.runtime.cache import bucket
from specdec.runtime.chain import Chain, Drafted, step_by_step


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do, as data: a drafter that needs more is refused with the reason."""

    vocab_size: int
    context: int  # positions
    device: torch.device
    dtype: torch.dtype
    trees: bool = True  # whether rows may see any earlier rows of a step, or only all of them
    nodes: int | None = None  # the largest tree that it has room for at the end of the context; None: any
    shares: bool = True  # whether a draft may work on the target's slots
    hidden: tuple[int, ...] | None = None  # the hidden states that steps may ask for; None: any, (): none
    widths: tuple[int, ...] | None = None  # rows of its graphs: wider steps run in several. None: any number of rows
    input_width: int = 0  # of what each row reads besides its token; 0: nothing
    chains: bool = False  # whether a chain that is asked for at once takes less than its steps

    def lacks(
        self, *, trees: bool = False, nodes: int = 0, hidden: Sequence[int] = (), shares: bool = False
    ) -> str | None:
        """What is wanted and not there, in a few words; None when all is."""
        if shares and not self.shares:
            return "keeps its slots to itself, and no draft can work on them"
        if trees and not self.trees:
            return "verifies chains only"
        if trees and self.nodes is not None and nodes > self.nodes:
            return f"has room for trees of {self.nodes} nodes, not {nodes}"
        missing = [] if self.hidden is None else [i for i in hidden if i not in self.hidden]
        if missing:
            given = f"gives {', '.join(map(str, self.hidden))} only" if self.hidden else "gives none"
            return f"does not give hidden state {missing[0]} of the target ({given})"
        return None


@dataclass(frozen=True, eq=False)
class Step:
    """One forward: rows `[M]`, written to the M slots from `start` on.

    Every row sees all slots before `prefix`, and slot s < `prefix` stands at position s; so nothing that grows with the
    text has to be made for a step. The slots from `prefix` to `start + M` are the block: `block_MB` (bool) tells which
    of them each row sees, itself included, and `block_positions_B` (int64) at which positions they stand. The rows are
    the block's last M slots. Small tensors may be shared between steps: read them, never write.

    A sliding layer also hides slots whose position lies `window` or more behind the row's. Logits are wanted for the
    last `num_logits` rows. Tensors lie on the host, but for `tokens` and `inputs_MW` that a draft left on its device.

    `hidden`: which hidden states of all rows are wanted, by their index in `transformers`' `hidden_states` (0: the
    embeddings, i: the input of layer i, the number of layers: the last, after the final norm). `inputs_MW`: what a
    model that says so (`input_width`) is given for each row besides its token, as `features=`.
    """

    tokens: Tensor
    prefix: int
    block_MB: Tensor
    block_positions_B: Tensor
    start: int
    num_logits: int
    hidden: tuple[int, ...] = ()
    inputs_MW: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def end(self) -> int:
        """Slots in use after the step."""
        return self.start + self.num_rows

    @cached_property
    def positions(self) -> Tensor:
        """Of the rows; int64 `[M]`."""
        return self.block_positions_B[self.start - self.prefix :]

    @cached_property
    def mask_MC(self) -> Tensor:
        """The dense mask over all C = `end` slots, for backends that need one. O(M C)."""
        return torch.cat((self.block_MB.new_ones(self.num_rows, self.prefix), self.block_MB), 1)

    @cached_property
    def key_positions_C(self) -> Tensor:
        """Positions of all slots, int64 `[C]`. O(C)."""
        return torch.cat((torch.arange(self.prefix), self.block_positions_B))


@dataclass(frozen=True)
class StepResult:
    logits: Tensor  # [num_logits, V]
    hidden_MW: Tensor | None = None  # of all rows, the states asked for side by side


def stored_as(kv_cache: str | None) -> str:
    """What a description ends with."""
    return f", keys and values in {kv_cache}" if kv_cache is not None else ""


class Backend(ABC):
    """Runs steps of one model for one sequence."""

    _family: object | None = None
    _slot_bytes: int | None = None

    @classmethod
    @abstractmethod
    def open(cls, model: Any, **options: Any) -> Self:
        """Wrap a loaded model. Raises `UnsupportedModelError` when its state cannot be rewound."""

    @classmethod
    def open_draft(cls, model: Any) -> Self:
        """`open` for a model that only drafts: its bits do not matter, so that nothing is done for their sake."""
        return cls.open(model)

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities: ...

    @property
    def family(self) -> object:
        """The same object for a backend and its forks, and for nothing else: what one of them computed, all can use.

        A backend whose `fork` does not pass it on (`twin.join_family(self)`) is a family of its own.
        """
        if self._family is None:
            self._family = object()
        return self._family

    def join_family(self, relative: Backend) -> Self:
        """For `fork`: the twin belongs to the family of the backend that it was forked from."""
        self._family = relative.family
        return self

    @property
    def kv_cache(self) -> str | None:
        """How keys and values are stored, a name of `specdec.quant.kv`; None: as they are computed."""
        return None

    @property
    def numerics(self) -> str:
        """ "invariant" when a row's bits do not depend on the rows beside it, else "fast"."""
        return "fast"

    @property
    def describes(self) -> str:
        """How the step runs, in a few words, for reports."""
        return "the stock model"

    def warmup(self) -> None:
        """Do now what would otherwise be done once it pays, such as compiling."""
        return None

    def expose(self, hidden: Sequence[int]) -> None:
        """Steps of this family will ask for these hidden states: a backend that prepares its steps makes them ready."""
        return None

    @abstractmethod
    def forward(self, step: Step) -> StepResult: ...

    @classmethod
    def forward_many(cls, backends: Sequence[Self], steps: Sequence[Step]) -> list[StepResult]:
        """One step each of several sequences of one family, in order; no sequence occurs twice.

        Here one after another. A backend that can runs all rows as one model call; then a row's result must be what
        it is alone, as far as the backend's numerics promise that of any two row counts.
        """
        return [backend.forward(step) for backend, step in zip(backends, steps, strict=True)]

    @classmethod
    def draft_many(cls, backends: Sequence[Self], steps: Sequence[Step], chains: Sequence[Chain]) -> list[Drafted]:
        """A step and the chain that follows it, of each of several sequences of one family; no sequence occurs twice.

        A step's tokens are the last of the text, its last row the one that the chain begins from. Here step by step;
        a backend that can (`Capabilities.chains`) does it in one piece of work, without the host between steps.
        """
        return step_by_step(cls.forward_many, backends, steps, chains)

    @abstractmethod
    def gather(self, slots: Sequence[int], start: int) -> None:
        """Make `slots`, all different, contiguous from `start`.

        What lies behind them is free afterwards, and so is each of `slots` that lies before `start`.
        """

    @abstractmethod
    def fork(self, length: int) -> Self:
        """An independent backend on the same weights that holds a copy of the first `length` slots."""

    def on_slots_of(self, other: Backend) -> Self:
        """This backend's model on the slots of another sequence: both write the same keys and values from now on.

        `other` is of the same kind, and its model has as many layers. The family stays this backend's. `InputError`
        where a backend does not know how.
        """
        raise InputError(
            f"{type(self).__name__} cannot work on the slots of another model, which a target that drafts for itself "
            "needs; use backend='eager', or another drafter"
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values that one token takes in all layers, with what stands beside them, such as scales.

        Measured on one token, once.
        """
        if self._slot_bytes is None:
            twin = self.fork(0)
            row, width = torch.zeros(1, dtype=torch.int64), self.capabilities.input_width
            inputs = torch.zeros(1, width, dtype=self.capabilities.dtype) if width else None
            twin.forward(Step(row, 0, torch.ones(1, 1, dtype=torch.bool), row, 0, 1, inputs_MW=inputs))
            self._slot_bytes = -(-twin.num_bytes // bucket(1, self.capabilities.context))
        return self._slot_bytes

    def bytes_for(self, length: int) -> int:
        """Bytes of keys and values that `length` tokens will take, in the cache's buckets."""
        return self.bytes_per_token * bucket(length, self.capabilities.context)

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of keys and values held."""
