"""What a drafter hands to a verifier: a tree, and how each of its nodes was drawn.

Shape suffixes: N tree nodes, R distribution rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.transfer import to_device
from specdec.tree import TokenTree

# Rows of q in half precision sum to 1 only so well.
_SUM_TOLERANCE = 1e-2


class Draw(Enum):
    """How a node's token came about."""

    POINT = "point"  # deterministic given its parent: a point mass
    SAMPLED = "sampled"  # drawn from a distribution row, without replacement among its siblings, in node order
    SHARED = "shared"  # drawn by the race on the noise of its position, which the verifier knows too
    #: Of siblings, never of a node: the first is sampled from what the others, which are the top tokens, leave.
    MIXED = "mixed"


@dataclass(frozen=True, eq=False)
class Proposal:
    """A tree and the law it was drawn by.

    `q` `[R, V]` holds the distributions that sampled nodes were really drawn from, and `q_rows` names each node's
    row (-1 where there is none): siblings share the row of their parent. A drafter cannot report another
    distribution than the one it drew from, because the row is what it drew from.
    """

    tree: TokenTree
    draws: tuple[Draw, ...]
    q: Tensor | None = None
    q_rows: tuple[int, ...] = ()
    origin: str = ""  # which part of a drafter of several parts drew it
    expected: float | None = None  # tokens of it that the drafter expects to be accepted

    @staticmethod
    def empty() -> Proposal:
        return Proposal(TokenTree.empty(), ())

    @staticmethod
    def point(tree: TokenTree, expected: float | None = None) -> Proposal:
        return Proposal(tree, (Draw.POINT,) * len(tree), expected=expected)

    @staticmethod
    def shared(tree: TokenTree) -> Proposal:
        return Proposal(tree, (Draw.SHARED,) * len(tree))

    @staticmethod
    def sampled(tree: TokenTree, q: Tensor, q_rows: Sequence[int] | None = None) -> Proposal:
        """For a chain, row i of `q` `[N, V]` is what node i was drawn from; trees pass `q_rows`."""
        rows = tuple(q_rows) if q_rows is not None else tuple(range(len(tree)))
        return Proposal(tree, (Draw.SAMPLED,) * len(tree), q, rows)

    def distribution(self, node: int, vocab_size: int) -> Tensor:
        """The row `[V]` that the node was drawn from; one-hot for a point mass."""
        if self.draws[node] is Draw.SAMPLED:
            assert self.q is not None
            return self.q[self.q_rows[node]]
        row = torch.zeros(vocab_size, dtype=torch.float32, device=self.tree.tokens.device)
        return row.index_fill_(0, self.tree.tokens[node : node + 1], 1.0)

    def chain_distributions(self, p: Tensor) -> Tensor:
        """All rows of a chain, `[N, V]`, in the dtype of `p`."""
        if self.q is not None and self.q_rows == tuple(range(len(self.tree))) == tuple(range(len(self.q))):
            return self.q.to(p.dtype)
        if self.q is None:  # point masses, made where they are needed
            return torch.zeros_like(p[:-1]).scatter_(1, to_device(self.tree.tokens, p.device)[:, None], 1.0)
        rows = [self.distribution(node, p.shape[-1]).to(p) for node in range(len(self.tree))]
        return torch.stack(rows) if rows else p[:0]

    def check(self, vocab_size: int) -> None:
        """Raise `InputError` when the proposal is malformed."""
        self.tree.check(vocab_size)
        if len(self.draws) != len(self.tree):
            raise InputError(f"{len(self.tree)} nodes but {len(self.draws)} draws")
        sampled = [node for node, draw in enumerate(self.draws) if draw is Draw.SAMPLED]
        if not sampled:
            return
        if self.q is None or self.q.ndim != 2 or self.q.shape[1] != vocab_size or len(self.q_rows) != len(self.tree):
            shape = None if self.q is None else list(self.q.shape)
            raise InputError(
                f"sampled nodes need q of shape [rows, {vocab_size}] and one row number each; q is {shape}"
            )
        if any(not 0 <= self.q_rows[node] < len(self.q) for node in sampled):
            raise InputError("a sampled node names a row of q that does not exist")
        drawn = self.q[[self.q_rows[node] for node in sampled]].gather(
            1, self.tree.tokens[sampled, None].to(self.q.device)
        )
        sums = self.q.sum(-1)
        if not bool((self.q >= 0).all() & ((sums - 1).abs() < _SUM_TOLERANCE).all() & (drawn > 0).all()):
            raise InputError(
                "a row of q is no distribution (finite, >= 0, sum 1), or gives a drafted token probability 0"
            )
