"""Policies that draft trees of a fixed shape, or trees that follow the drafter's own probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.errors import InputError
from specdec.policy import Constant, Plan, Policy, PolicyRun, check_k
from specdec.tree import structure


def shape_of_choices(choices: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The parents of a tree that is given as Medusa's `choices`: a list of paths, each a list of ranks.

    `[[0], [1], [0, 0]]` is the most probable token, the second, and the first's most probable continuation. (Cai et
    al., arXiv 2401.10774.) Errors: `InputError` where a path lacks its beginning or a better-ranked sibling.
    """
    paths = sorted({tuple(path) for path in choices}, key=lambda path: (len(path), path))
    if any(not path or any(not isinstance(rank, int) or rank < 0 for rank in path) for path in paths):
        raise InputError("a path of a tree is a list of ranks, each a whole number >= 0")
    number = {(): -1, **{path: i for i, path in enumerate(paths)}}
    for path in paths:
        for needed in (path[:-1], (*path[:-1], path[-1] - 1) if path[-1] else path):
            if needed not in number:
                raise InputError(f"the tree has the path {list(path)}, and needs {list(needed)} for it")
    return tuple(number[path[:-1]] for path in paths)


@dataclass(frozen=True)
class StaticTree(Policy):
    """Always the same tree: `shape` holds the parents of its nodes, -1 for the root, parents first."""

    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape:
            raise InputError("a static tree has at least one node")
        structure(tuple(self.shape))  # raises when a parent does not come before its children

    @classmethod
    def of_choices(cls, choices: Sequence[Sequence[int]]) -> StaticTree:
        return cls(shape_of_choices(choices))

    @property
    def branches(self) -> bool:
        return not structure(self.shape).is_chain

    @property
    def name(self) -> str:
        return f"static tree({len(self.shape)} nodes)"

    def start(self) -> PolicyRun:
        return Constant(Plan(max(structure(self.shape).depths), shape=self.shape))


@dataclass(frozen=True)
class DynamicTree(Policy):
    """The `budget` most probable nodes by the drafter's own estimate, `k` deep, from `width` expanded nodes a level.

    (EAGLE-2: Li et al., arXiv 2406.16858.)
    """

    budget: int = 24
    k: int = 6
    width: int = 8

    def __post_init__(self) -> None:
        for value in (self.budget, self.k, self.width):
            check_k(value)

    @property
    def branches(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"dynamic tree(budget={self.budget}, k={self.k}, width={self.width})"

    def start(self) -> PolicyRun:
        return Constant(Plan(self.k, budget=self.budget, width=self.width))
