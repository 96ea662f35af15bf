"""The tokens of a sequence, with what samplers ask of them kept up to date as they grow.

Shape suffixes: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from specdec.transfer import to_device


class History(list[int]):
    """Token ids. Grow it by `append` and `extend`, shorten it by `truncate`, change it in no other way.

    `followed_by` and `seen` read what is new since they were last asked, and nothing else: O(new tokens) for each.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        super().__init__(tokens)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._num_ids = 0
        self._counts: dict[
            tuple[int, Any], tuple[int, Tensor]
        ] = {}  # read so far, and how often each token stood there

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""
        self._num_ids = min(self._num_ids, length)
        for key, (read, counts_V) in self._counts.items():
            if read > length:
                self._count(counts_V, self[length:read], -1)
                self._counts[key] = length, counts_V
        del self[length:]

    def followed_by(self, tail: Tensor) -> Tensor:
        """All tokens, then `tail`; int64 `[N + len(tail)]` on its device: a view that the next call may change."""
        num, end = len(self), len(self) + len(tail)
        if self._ids.shape[0] < end or self._ids.device != tail.device:
            self._ids = torch.empty(max(64, 2 * end), dtype=torch.int64, device=tail.device)
            self._num_ids = 0
        if self._num_ids < num:
            self._ids[self._num_ids : num] = to_device(self[self._num_ids :], tail.device)
            self._num_ids = num
        self._ids[num:end] = tail
        return self._ids[:end]

    def seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """Which tokens stand here; bool `[V]`."""
        key = vocab_size, device
        read, counts_V = self._counts.get(key) or (0, torch.zeros(vocab_size, dtype=torch.int64, device=device))
        if read < len(self):
            self._count(counts_V, self[read:], 1)
            self._counts[key] = len(self), counts_V
        return counts_V > 0

    @staticmethod
    def _count(counts_V: Tensor, tokens: list[int], by: int) -> None:
        index = to_device(tokens, counts_V.device)
        counts_V.index_add_(0, index, torch.full_like(index, by))
