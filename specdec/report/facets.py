"""How cells are spread over panels, and shapes over an axis: the same for pages, pictures and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from specdec.report.view import AXES, Axis, Cell, View

SHAPE = next(axis for axis in AXES if axis.name == "shape")


def facets(
    view: View, most: int, said: Callable[[Axis, str], str], without: Sequence[str] = ("shape",)
) -> tuple[list[tuple[str, list[Cell]]], list[Axis]]:
    """Cells by panel, `most` at most: temperature and verifier first, then whatever else varies and fits; and the axes
    that did not. `said`: what a panel's title says of an axis and its value."""
    order = {"temperature": 0, "verifier": 1}
    axes = [axis for axis in view.axes if axis is not view.colour_axis and axis.name not in without]
    taken: list[Axis] = []
    count = 1
    for axis in sorted(axes, key=lambda a: order.get(a.name, 2)):
        if count * len(view.values(axis)) <= most:
            taken.append(axis)
            count *= len(view.values(axis))
    panels = []
    for values in product(*(view.values(axis) for axis in taken)):
        cells = [c for c in view.done if all(a.value(c.setting) == v for a, v in zip(taken, values, strict=True))]
        if cells:
            panels.append((" · ".join(said(a, v) for a, v in zip(taken, values, strict=True)), cells))
    return panels, [axis for axis in axes if axis not in taken]


def shape(cell: Cell) -> str:
    """What is drafted each round: `4`, `4x2x1`, or a policy's name."""
    return SHAPE.value(cell.setting)


def places(cells: Sequence[Cell]) -> dict[str, float]:
    """Where shapes stand on an axis: chains by k at equal steps, then trees and policies behind a gap."""
    values = dict.fromkeys(shape(cell) for cell in cells)
    chains = sorted((v for v in values if v.isdigit()), key=int)
    others = [v for v in values if not v.isdigit()]
    gap = 0.5 if chains and others else 0.0
    return {value: i + (gap if value in others else 0.0) for i, value in enumerate(chains + others)}
