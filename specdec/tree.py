"""Token trees. A chain is a tree of width 1, and an empty tree is plain decoding: one code path for all three.

Shape suffix: N nodes. The root, the last committed token, is not a node; a parent of -1 means the root.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.errors import InputError


class Structure(NamedTuple):
    """What follows from the parents alone; made once per shape."""

    depths: tuple[int, ...]  # 1 for children of the root
    ancestors_NN: Tensor  # bool: [i, j] = j is i or an ancestor of i
    children: tuple[tuple[int, ...], ...]  # of the root first, then of each node
    is_chain: bool

    @property
    def max_depth(self) -> int:
        return max(self.depths, default=0)


@lru_cache(maxsize=4096)
def structure(parents: tuple[int, ...]) -> Structure:
    depths: list[int] = []
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    ancestors = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise InputError(f"node {node} has parent {parent}: parents come before their children, and -1 is the root")
        children[parent + 1].append(node)
        depths.append(1 if parent < 0 else depths[parent] + 1)
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    is_chain = parents == tuple(range(-1, len(parents) - 1))
    return Structure(tuple(depths), ancestors, tuple(map(tuple, children)), is_chain)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """Drafted tokens in topological order: `tokens` int64 `[N]`, `parents` of length N."""

    tokens: Tensor
    parents: tuple[int, ...]

    @staticmethod
    def of(tokens: Iterable[int], parents: Sequence[int]) -> TokenTree:
        return TokenTree(torch.tensor(list(tokens), dtype=torch.int64), tuple(parents))

    @staticmethod
    def chain(tokens: Tensor | Sequence[int]) -> TokenTree:
        tokens = torch.as_tensor(tokens, dtype=torch.int64)
        return TokenTree(tokens, tuple(range(-1, tokens.shape[0] - 1)))

    @staticmethod
    def empty() -> TokenTree:
        """The tree without nodes; always the same object."""
        return _EMPTY

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        return structure(self.parents).depths

    @property
    def max_depth(self) -> int:
        return structure(self.parents).max_depth

    @property
    def ancestors_NN(self) -> Tensor:
        return structure(self.parents).ancestors_NN

    @property
    def is_chain(self) -> bool:
        return structure(self.parents).is_chain

    def children(self, node: int) -> tuple[int, ...]:
        """Of the root for -1; in drawing order."""
        return structure(self.parents).children[node + 1]

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for -1."""
        path: list[int] = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return tuple(reversed(path))

    def extend(self, tokens: Tensor, parents: Sequence[int]) -> TokenTree:
        return TokenTree(torch.cat((self.tokens.to(tokens.device), tokens)), self.parents + tuple(parents))

    def check(self, vocab_size: int) -> None:
        """Raise `InputError` when the tree cannot be verified: wrong shapes, dtypes, parents, tokens or siblings."""
        if self.tokens.dtype != torch.int64 or self.tokens.shape != (len(self.parents),):
            raise InputError(
                f"tokens must be int64 of shape [{len(self.parents)}], "
                f"not {self.tokens.dtype} {list(self.tokens.shape)}"
            )
        tokens = self.tokens.tolist()
        if any(not 0 <= token < vocab_size for token in tokens):
            raise InputError(f"a drafted token lies outside the target's vocabulary of {vocab_size}: {tokens}")
        if len(set(zip(self.parents, tokens, strict=True))) < len(tokens):
            raise InputError("two siblings carry the same token; merge them before proposing")
        structure(self.parents)


def branching_shape(branching: Iterable[int]) -> tuple[int, ...]:
    """The parents of the tree whose nodes at depth d all have `branching[d]` children, level by level."""
    parents: list[int] = []
    level = [-1]
    for count in branching:
        following = []
        for node in level:
            for _ in range(count):
                following.append(len(parents))
                parents.append(node)
        level = following
    return tuple(parents)


_EMPTY = TokenTree.chain([])
