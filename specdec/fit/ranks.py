"""How often the target's token is the n-th child, at each depth.

Shape suffixes: D depths, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from specdec.drafter import Drafter, Outcome, WrappedDrafter
from specdec.errors import InputError
from specdec.trace import Round
from specdec.tree_policy import StaticTree


def comb(depth: int, ranks: int) -> tuple[int, ...]:
    """The tree that asks about every rank at every depth: a chain of best children, with `ranks` children each."""
    return tuple(-1 if level == 0 else (level - 1) * ranks for level in range(depth) for _ in range(ranks))


def falling(values: np.ndarray) -> np.ndarray:
    """The nearest sequence, in least squares, that never rises: neighbours that do are replaced by their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] < mean:
            other, number = pools.pop()
            mean, count = (mean * count + other * number) / (count + number), count + number
        pools.append((mean, count))
    return np.repeat([mean for mean, _ in pools], [count for _, count in pools])


@dataclass(frozen=True)
class RankTable:
    """`accepted[d][r]` of `reached[d]` times the target's token was child r of the best node of depth d (0: the root).

    A node other than the best child of its parent is taken to have children like the best one's.
    """

    reached: tuple[int, ...]
    accepted: tuple[tuple[int, ...], ...]

    def __add__(self, other: RankTable) -> RankTable:
        """Both texts' counts."""
        pairs = zip(self.accepted, other.accepted, strict=True)
        return RankTable(
            tuple(a + b for a, b in zip(self.reached, other.reached, strict=True)),
            tuple(tuple(a + b for a, b in zip(mine, theirs, strict=True)) for mine, theirs in pairs),
        )

    def probabilities(self) -> np.ndarray:
        """`[D, R]` float64, pulled to the depth before by two observations' worth.

        A worse rank is never accepted more often: where counts say so, neighbours share what they have.
        """
        rows = []
        before = np.array([0.5 / 2**r for r in range(len(self.accepted[0]))])
        for reached, accepted in zip(self.reached, self.accepted, strict=True):
            row = (np.array(accepted, dtype=np.float64) + 2 * before) / (reached + 2)
            before = falling(row)
            rows.append(before)
        return np.array(rows)


class _Watching(WrappedDrafter):
    """A drafter whose outcomes are looked at."""

    def __init__(self, inner: Drafter, see: Callable[[Outcome], None]):
        super().__init__(inner)
        self.see = see

    def observe(self, state: Any, outcome: Outcome) -> Any:
        self.see(outcome)
        return super().observe(state, outcome)


class _Counter:
    def __init__(self, depth: int, ranks: int):
        self.reached = np.zeros(depth, dtype=np.int64)
        self.accepted = np.zeros((depth, ranks), dtype=np.int64)

    def __call__(self, outcome: Outcome) -> None:
        tree, node = outcome.proposal.tree, -1
        for depth, accepted in enumerate((*outcome.path, None)):
            children = tree.children(node)
            if not children or depth >= len(self.reached):
                return
            self.reached[depth] += 1
            if accepted is None:
                return
            rank = children.index(accepted)
            self.accepted[depth, min(rank, self.accepted.shape[1] - 1)] += 1
            if rank:
                return
            node = accepted


def rank_tables(
    decoder: Any,
    prompts: Sequence[Any],
    depth: int = 6,
    ranks: int = 8,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[list[RankTable], list[Round]]:
    """Decode each prompt with a comb of `depth` levels and `ranks` children; a table for each, and the rounds' records.

    `options` go to `decoder.generate`. Raises `InputError` for a drafter that proposes chains only.
    """
    if not decoder.drafter.trees:
        raise InputError(f"the {decoder.drafter.name} drafter proposes chains: there is no tree to fit")
    policy = StaticTree(comb(depth, ranks))
    tables: list[RankTable] = []
    rounds: list[Round] = []
    for prompt in prompts:
        count = _Counter(depth, ranks)
        watching = _Watching(decoder.drafter, count)
        rounds += decoder.generate(prompt, drafter=watching, policy=policy, **options).trace.rounds
        tables.append(RankTable(tuple(map(int, count.reached)), tuple(tuple(map(int, row)) for row in count.accepted)))
        tick()
    return tables, rounds


def measure_ranks(
    decoder: Any,
    prompts: Sequence[Any],
    depth: int = 6,
    ranks: int = 8,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[RankTable, list[Round]]:
    """As `rank_tables`, one table of all prompts. Raises `InputError` also where nothing was proposed on any."""
    tables, rounds = rank_tables(decoder, prompts, depth, ranks, tick, **options)
    table = reduce(add, tables)
    if not any(table.reached):
        raise InputError(f"the {decoder.drafter.name} drafter proposed nothing on these prompts")
    return table, rounds
