"""Speed, and tokens per round, against what is drafted each round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specdec.bench.timing import Interval
from specdec.report.charts import Point, Scale, Series, figure, linear, lines
from specdec.report.facets import facets, places
from specdec.report.markup import Markup
from specdec.report.panels import HORIZONTAL, VERTICAL, grid
from specdec.report.view import Axis, Cell, View

_MAX_PANELS = 12
# Units between the marks of two colours at the same k, so that their intervals stand side by side.
_APART, _WIDEST = 5.0, 24.0


@dataclass(frozen=True)
class _Measure:
    """What is drawn: speed-ups, or lengths of rounds."""

    title: str
    y_title: str
    of_speed: bool

    def of(self, cell: Cell) -> Interval | None:
        if self.of_speed:
            return cell.speedup
        return None if cell.per_round is None else Interval(cell.per_round, cell.per_round, cell.per_round)

    @property
    def reference(self) -> tuple[float, str] | None:
        return (1.0, "plain loop") if self.of_speed else None


_SPEED = _Measure("Speed-up", "times the plain loop", True)
_LENGTH = _Measure("Tokens per round", "tokens per round", False)


def against_k(view: View) -> Markup | None:
    """Speed-up against k in a panel for each temperature and rule; tokens per round where nothing was timed, and beside
    the speed-up where there is one panel only. None where all settings draft alike."""
    shape = next((axis for axis in view.axes if axis.name == "shape"), None)
    panels, _ = facets(view, _MAX_PANELS, lambda axis, value: f"{axis.title} {value}")
    if shape is None or not panels:
        return None
    where = places(view.done)
    measures = [_SPEED, _LENGTH] if view.timed and len(panels) == 1 else [_SPEED if view.timed else _LENGTH]
    figures = []
    for measure in measures:
        known = [(cell, found) for cell in view.done if (found := measure.of(cell)) is not None]
        if not known:
            continue
        y = linear([1.0, *(v for _, found in known for v in (found.low, found.high))], *VERTICAL)
        for title, members in panels:
            series = _series([c for c in members if measure.of(c)], view, shape, where, measure)
            if series:
                figures.append(_figure(series, where, y, measure, title or measure.title))
    return grid(figures) if figures else None


def _figure(series: list[Series], places: Mapping[str, float], y: Scale, measure: _Measure, title: str) -> Markup:
    x = Scale(0, max(max(places.values()), 1), *HORIZONTAL, [(at, value) for value, at in places.items()])
    chart = lines(
        series,
        x,
        y,
        x_title="drafted per round",
        y_title=measure.y_title,
        described=f"{measure.y_title} against k, {title}: {sum(len(s.points) for s in series)} settings",
        reference=measure.reference,
    )
    return figure(title, chart)


def _shift(colour: int, view: View, places: Mapping[str, float]) -> float:
    """How far a colour's marks stand beside their k, in steps of the axis."""
    count = len(view.colours)
    apart = min(_APART, _WIDEST / max(count, 1))
    per_step = (HORIZONTAL[1] - HORIZONTAL[0]) / max(max(places.values()), 1)
    return (colour - (count - 1) / 2) * apart / per_step


def _series(
    cells: Sequence[Cell], view: View, shape: Axis, places: Mapping[str, float], measure: _Measure
) -> list[Series]:
    """A line for each group of cells that differ in k alone; trees and policies are points beside it."""
    others = [axis for axis in view.axes if axis is not shape]
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(axis.value(cell.setting) for axis in others), []).append(cell)
    series: list[Series] = []
    seen = dict.fromkeys(range(len(view.colours)), 0)
    for members in groups.values():
        colour = members[0].colour
        shift = _shift(colour, view, places) if measure.of_speed else 0.0
        chain: list[Point] = []
        for cell in sorted(members, key=lambda c: places[shape.value(c.setting)]):
            value = shape.value(cell.setting)
            point = _point(cell, places[value] + shift, measure)
            if value.isdigit():
                chain.append(point)
            else:
                series.append(Series([point], colour))
        if chain:
            series.append(Series(chain, colour, seen[colour]))
        seen[colour] += 1
    return series


def _point(cell: Cell, x: float, measure: _Measure) -> Point:
    found = measure.of(cell)
    assert found is not None
    said = [f"{s.median:.2f}× ({s.low:.2f}–{s.high:.2f})" for s in [cell.speedup] if s is not None]
    said += [f"{cell.per_round:.2f} tokens per round"] if cell.per_round is not None else []
    spread = (found.low, found.high) if measure.of_speed else (None, None)
    return Point(x, found.median, f"{cell.label}\n{', '.join(said)}", cell.index, *spread)
