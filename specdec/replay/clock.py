"""Whether a policy's plans follow from what a trace holds, or from something else, such as a clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

from specdec.policy import Confidence, Fixed, Heuristic, Policy, Throughput
from specdec.replay.view import Doubts
from specdec.tree_policy import StaticTree

# Every way to learn a value from a dict. Copies count: `dict(s)` and `{**s}` come by `keys` where `__iter__` is not
# dict's own.
_READING = (
    "__getitem__", "__iter__", "__reversed__", "__or__", "__ror__", "__eq__", "__ne__", "__repr__", "get", "copy",
    "keys", "values", "items", "pop", "popitem", "setdefault",
)  # fmt: skip


class Watched(dict[str, float]):
    """A round's seconds that note in `doubts` when they are read.

    Copies that `dataclasses.asdict` makes of it have been read before, and need no doubts of their own.
    """

    def __init__(self, seconds: Mapping[str, float] | Iterable[tuple[str, float]] = (), doubts: Doubts | None = None):
        super().__init__(seconds)
        self.doubts = doubts or Doubts()


def _noted(name: str) -> Callable[..., Any]:
    own = getattr(dict, name)

    @wraps(own)
    def read(self: Watched, *arguments: Any) -> Any:
        self.doubts.clock = True
        return own(self, *arguments)

    return read


for _name in _READING:
    setattr(Watched, _name, _noted(_name))


def is_known(policy: Policy) -> bool:
    """Whether plans follow from accepted counts, the draft's probabilities and a round's seconds alone.

    Of a class that is not ours nobody can tell: it may look at a clock of its own, or draw lots. That goes for classes
    derived from ours too.
    """
    from specdec.fit.plan import FittedTree  # its package fits trees, and brings in what that takes

    return type(policy) in (Confidence, Fixed, FittedTree, Heuristic, StaticTree, Throughput)
