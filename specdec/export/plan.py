"""Which graphs a step of any number of rows goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from specdec.export.options import Method


@dataclass(frozen=True)
class Run:
    """Rows `start` to `end` of a step in one graph; of its logits the last `num_logits` are wanted."""

    method: Method
    start: int
    end: int
    num_logits: int


def plan(methods: Sequence[Method], rows: int, wanted: int) -> Iterator[Run]:
    """Cut a step of that many rows, the last `wanted` with logits, into runs of graphs.

    Rows without logits go through the widest graphs; then the narrowest graph that holds all that is left.
    """
    full = [m for m in methods if not m.one_logit]
    widest, widest_full = max(methods, key=lambda m: m.width), max(full, key=lambda m: m.width)
    start = 0
    while start < rows:
        left, silent = rows - start, max(0, rows - wanted - start)
        fitting = [m for m in methods if m.width >= left and (not m.one_logit or wanted == 1)]
        if fitting:
            method, take = min(fitting, key=lambda m: (m.width, m.one_logit)), left
        elif silent > widest_full.width:
            method, take = widest, min(silent, widest.width)
        else:
            method, take = widest_full, min(left, widest_full.width)
        end = start + take
        yield Run(method, start, end, max(0, end - max(start, rows - wanted)))
        start = end
