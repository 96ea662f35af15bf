"""Hidden states of a session's tokens, kept beside its keys and values for drafters that read them.

Shape suffixes: M rows of one step, S slots, W width: the hidden sizes of all kept states together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from specdec.errors import InputError
from specdec.runtime.cache import bucket
from specdec.transfer import to_device

if TYPE_CHECKING:
    from specdec.runtime.session import Session


# Rows follow the buckets of caches: what limits these limits them too.
_NO_LIMIT = 1 << 40


def capacity(length: int) -> int:
    """Rows that a store of `length` of them has room for."""
    return bucket(length, _NO_LIMIT)


class FeatureStore:
    """Rows `[W]` by slot, like one more cache: written by steps, gathered by commits, forgotten by an index."""

    def __init__(self) -> None:
        self._rows_SW: Tensor | None = None

    def write(self, start: int, rows_MW: Tensor) -> None:
        """Keep what a step computed in the slots from `start` on."""
        end = start + len(rows_MW)
        old = self._rows_SW
        if old is None or end > len(old):
            self._rows_SW = rows_MW.new_empty(capacity(end), rows_MW.shape[1])
            if old is not None:
                self._rows_SW[: len(old)] = old
        assert self._rows_SW is not None
        self._rows_SW[start:end] = rows_MW

    def gather(self, slots: Sequence[int], start: int) -> None:
        if self._rows_SW is not None and list(slots) != list(range(start, start + len(slots))):
            self._rows_SW[start : start + len(slots)] = self._rows_SW[to_device(slots, self._rows_SW.device)]

    def read(self, start: int, end: int) -> Tensor:
        if self._rows_SW is None:
            raise InputError("no step has been computed yet: there are no hidden states to read")
        return self._rows_SW[start:end]

    def fork(self, length: int) -> FeatureStore:
        twin = FeatureStore()
        if self._rows_SW is not None and length:
            twin.write(0, self._rows_SW[:length])
        return twin

    @property
    def num_bytes(self) -> int:
        return 0 if self._rows_SW is None else self._rows_SW.nbytes


class Features:
    """The target's hidden states at its committed tokens, for a drafter to read.

    Row i belongs to token i. There are as many as committed tokens were computed: all but the last one, which the
    next verification computes.
    """

    def __init__(self, session: Session):
        self._session = session

    def __len__(self) -> int:
        return min(self._session.num_cached, len(self._session.tokens))

    def read(self, start: int, end: int | None = None) -> Tensor:
        """Rows `start` to `end` (all there are), `[n, W]`: the states that `Drafter.hidden` names, side by side.

        A view: read it, never write. A later round may overwrite what lies behind the committed tokens only.
        """
        end = len(self) if end is None else end
        if not 0 <= start <= end <= len(self):
            raise InputError(f"hidden states {start} to {end} are wanted, and there are {len(self)}")
        assert self._session.features is not None
        return self._session.features.read(start, end)
