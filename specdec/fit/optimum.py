"""The tree with the most expected tokens per second, for acceptance by rank and depth and a measured cost of a round.

Shape suffixes: D depths, R ranks, M nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.costs import cost_at
from specdec.tree import structure


@dataclass(frozen=True)
class RoundCost:
    """Seconds of a round: a verification by its rows; drafting, which is `start`, and `level` for each level, and
    `node` for each node expanded; `other`, the rest.

    `empty`: of a drafter that proposes nothing. `plain`: the rest of a plain round (None: as of the others).
    """

    verify: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    level: float = 0.0
    node: float = 0.0
    other: float = 0.0
    start: float = 0.0
    empty: float = 0.0
    plain: float | None = None

    def drafting(self, levels: int, expanded: int) -> float:
        return self.start + self.level * levels + self.node * expanded if levels else self.empty

    def round(self, nodes: int, levels: int, expanded: int) -> float:
        """Of a round with a drafter."""
        return cost_at(self.verify, nodes + 1) + self.drafting(levels, expanded) + self.other

    def plain_round(self) -> float:
        return cost_at(self.verify, 1) + (self.other if self.plain is None else self.plain)

    def seconds(self, parents: Sequence[int]) -> float:
        """Of a round with this tree; the empty one is a plain step."""
        if not parents:
            return self.plain_round()
        return self.round(len(parents), structure(tuple(parents)).max_depth, num_expanded(parents))


def num_expanded(parents: Sequence[int]) -> int:
    """Nodes that have children, the root included."""
    return len(set(parents))


def expected_tokens(parents: Sequence[int], accept_DR: np.ndarray) -> float:
    """Tokens per round: 1 + the sum over nodes of the probability that their path is accepted.

    Depths and ranks beyond the table are never accepted.
    """
    shape = structure(tuple(parents))
    probability: list[float] = []
    for node, parent in enumerate(parents):
        rank, depth = shape.children[parent + 1].index(node), shape.depths[node] - 1
        inside = depth < accept_DR.shape[0] and rank < accept_DR.shape[1]
        before = probability[parent] if parent >= 0 else 1.0
        probability.append(before * float(accept_DR[depth, rank]) if inside else 0.0)
    return 1.0 + sum(probability)


def best_tree(accept_DR: np.ndarray, cost: RoundCost, max_nodes: int = 64) -> tuple[tuple[int, ...], float]:
    """Parents of the best tree of at most `max_nodes` nodes, and its expected tokens per second; () is plain decoding.

    For every depth limit and number of nodes the tree with the most expected tokens is found by dynamic programming
    (Sequoia: Chen et al., arXiv 2402.12374, here with acceptance by depth), then the one with the best rate is taken.
    O(D^2 R M^2).
    """
    best: tuple[tuple[int, ...], float] = ((), 1.0 / cost.seconds(()))
    for depth in range(1, accept_DR.shape[0] + 1):
        tables = _solve(accept_DR[:depth], max_nodes)
        for nodes in range(1, max_nodes + 1):
            parents = _unroll(tables, nodes)
            rate = expected_tokens(parents, accept_DR) / cost.seconds(parents)
            if rate > best[1]:
                best = parents, rate
    return best


def _solve(accept_DR: np.ndarray, max_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """`value[d, j, m]`: the most accepted tokens below a node at depth d, from m nodes among its children of rank j and
    worse; `first[d, j, m]`: how many of them the child of rank j takes with what is below it, 0: it is not drafted."""
    depths, ranks = accept_DR.shape
    value = np.zeros((depths + 1, ranks + 1, max_nodes + 1))
    first = np.zeros((depths + 1, ranks + 1, max_nodes + 1), dtype=np.int64)
    for d in range(depths - 1, -1, -1):
        for j in range(ranks - 1, -1, -1):
            for m in range(1, max_nodes + 1):
                takes = np.arange(1, m + 1)
                totals = accept_DR[d, j] * (1 + value[d + 1, 0, takes - 1]) + value[d, j + 1, m - takes]
                at = int(totals.argmax())
                value[d, j, m], first[d, j, m] = totals[at], at + 1
    return value, first


def _unroll(tables: tuple[np.ndarray, np.ndarray], nodes: int) -> tuple[int, ...]:
    """The parents of the best tree of so many nodes, level by level. Nodes that no rank is left for are not drafted."""
    _, first = tables
    parents: list[int] = []
    level = [(-1, 0, nodes)]  # (node, its depth, nodes below it)
    while level:
        following = []
        for node, depth, below in level:
            rank = 0
            while below and depth < first.shape[0] - 1 and rank < first.shape[1] - 1 and first[depth, rank, below]:
                takes = int(first[depth, rank, below])
                following.append((len(parents), depth + 1, takes - 1))
                parents.append(node)
                below -= takes
                rank += 1
        level = following
    return tuple(parents)
