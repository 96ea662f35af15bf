"""What there is to plot in a document: lines with their intervals, in panels; for the terminal and for pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from specdec.errors import InputError
from specdec.report.facets import facets, places, shape
from specdec.report.panels import along, dominated
from specdec.report.shapes import Heat, Line, Panel, Plot, Spot
from specdec.report.view import Axis, Cell, View

# By what is asked for; the order is that of a report.
KINDS = ("speed", "tokens", "acceptance", "text", "pareto", "heatmap")
MAX_PANELS = 16
MAX_POSITIONS = 16


def axis_of(view: View, name: str) -> Axis | None:
    """The axis of that name, if cells differ in it."""
    return next((axis for axis in view.axes if axis.name == name), None)


def _said(axis: Axis, value: str) -> str:
    """Short: it stands over a panel."""
    if axis.name == "temperature":
        return f"T {value}"
    return value if axis.name in ("verifier", "drafter", "target", "prompt_set") else f"{axis.title} {value}"


def _grouped(cells: Sequence[Cell], axes: Sequence[Axis]) -> dict[tuple[str, ...], list[Cell]]:
    groups: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(axis.value(cell.setting) for axis in axes), []).append(cell)
    return groups


def _line_name(view: View, cell: Cell, rest: Sequence[Axis]) -> str:
    """The colour's value, and what no panel and no colour tells."""
    head = [view.colours[cell.colour]] if view.colour_axis else []
    return " · ".join(head + [_said(axis, axis.value(cell.setting)) for axis in rest])


def _telling(panels: Sequence[Panel], tells: Callable[[Panel], bool]) -> tuple[list[Panel], int]:
    """Panels that tell something, and how many others there are; all of them where none does."""
    kept = [panel for panel in panels if tells(panel)] or list(panels)
    return kept, len(panels) - len(kept)


def _compares(panel: Panel) -> bool:
    return len(panel.lines) > 1


Measure = Callable[[Cell], Spot | None]


def _speed(cell: Cell) -> Spot | None:
    return None if cell.speedup is None else Spot(0, cell.speedup.median, cell.speedup.low, cell.speedup.high)


def _tokens(cell: Cell) -> Spot | None:
    return None if cell.per_round is None else Spot(0, cell.per_round)


def _against_k(view: View, kind: str, title: str, y_title: str, measure: Measure) -> Plot | None:
    cells = [cell for cell in view.done if shape(cell) != "–" and measure(cell) is not None]
    where = places(cells)
    if len(where) < 2:
        return None
    panels, rest = facets(view, MAX_PANELS, _said)
    made = []
    for name, members in panels:
        lines: list[Line] = []
        for group in _grouped([c for c in members if c in cells], [a for a in view.axes if a.name != "shape"]).values():
            lines += _k_lines(view, group, where, rest, measure)
        if lines:
            made.append(Panel(name, lines))
    made, left_out = _telling(made, lambda panel: any(len(line.spots) > 1 for line in panel.lines))
    reference = (1.0, "plain loop") if kind == "speed" else None
    ticks = [(at, value) for value, at in where.items()]
    return Plot(kind, title, "drafted per round (k)", y_title, made, view.colours, ticks, reference, left_out=left_out)


def _k_lines(
    view: View, group: Sequence[Cell], where: Mapping[str, float], rest: Sequence[Axis], measure: Measure
) -> list[Line]:
    """A line through the chains of cells that differ in k alone; trees and policies beside it."""
    chain: list[Spot] = []
    beside: list[Spot] = []
    for cell in sorted(group, key=lambda c: where[shape(c)]):
        found = measure(cell)
        assert found is not None
        spot = Spot(where[shape(cell)], found.y, found.low, found.high)
        (chain if shape(cell).isdigit() else beside).append(spot)
    name, slot = _line_name(view, group[0], rest), group[0].colour
    return [Line(name, slot, spots, joined) for spots, joined in ((chain, True), (beside, False)) if spots]


def speed(view: View) -> Plot | None:
    return _against_k(view, "speed", "Speed-up over the plain loop", "times the plain loop", _speed)


def tokens(view: View) -> Plot | None:
    return _against_k(view, "tokens", "Tokens per round", "tokens per round", _tokens)


def _deepest(cells: Sequence[Cell], axes: Sequence[Axis]) -> list[Cell]:
    """Of cells that differ in the shape alone, the one that drafted furthest: the others say less of the same."""
    return [max(group, key=lambda cell: cell.depth) for group in _grouped(cells, axes).values()]


def acceptance(view: View) -> Plot | None:
    """Conditional acceptance by position, of the deepest draft of every group."""
    panels, rest = facets(view, MAX_PANELS, _said)
    others = [axis for axis in view.axes if axis.name != "shape"]
    made = []
    for title, cells in panels:
        lines = []
        for cell in _deepest([c for c in cells if c.depth], others):
            values = cell.stats["conditional_acceptance"][: min(cell.depth, MAX_POSITIONS)]
            spots = [Spot(i, float(value)) for i, value in enumerate(values, 1)]
            lines.append(Line(_line_name(view, cell, rest), cell.colour, spots))
        if lines:
            made.append(Panel(title, lines))
    if not made:
        return None
    kept, left_out = _telling(made, _compares)
    titles = ("Acceptance by position", "position in the draft", "accepted of those reached")
    return Plot("acceptance", *titles, kept, view.colours, is_share=True, left_out=left_out)


def text(view: View) -> Plot | None:
    """Tokens per round by place in the text, of the deepest draft of every group."""
    panels, rest = facets(view, MAX_PANELS, _said)
    others = [axis for axis in view.axes if axis.name != "shape"]
    made = []
    for title, cells in panels:
        lines = []
        for cell in _deepest([c for c in cells if c.depth], others):
            spots = [Spot(at, 1 + accepted / rounds) for at, rounds, accepted, _ in along(cell)]
            if len(spots) > 1:
                lines.append(Line(_line_name(view, cell, rest), cell.colour, spots))
        if lines:
            made.append(Panel(title, lines))
    if not made:
        return None
    kept, left_out = _telling(made, _compares)
    titles = ("Tokens per round along the text", "tokens of text", "tokens per round")
    return Plot("text", *titles, kept, view.colours, left_out=left_out)


def _worth(view: View, cell: Cell) -> float | None:
    return (cell.speedup.median if cell.speedup else None) if view.timed else cell.per_round


def frontier(cells: Sequence[Cell], goods: Mapping[int, Sequence[float]]) -> list[Cell]:
    """Cells that no other beats in something without losing in something else; larger is better."""
    beaten = dominated(cells, goods)
    return [cell for cell in cells if cell.index not in beaten]


def pareto(view: View) -> Plot | None:
    """Memory against speed; and, where somebody measured the loss, loss against speed. The best are named."""
    y_title = "times the plain loop" if view.timed else "tokens per round"
    mib: Measure = lambda c: None if c.num_bytes is None else Spot(c.num_bytes / (1 << 20), 0)  # noqa: E731
    nats: Measure = lambda c: None if c.loss is None else Spot(c.loss, 0)  # noqa: E731
    panels = []
    for x_title, x_of in (("memory, MiB", mib), ("loss, nats per token", nats)):
        found = {c.index: (x.x, y) for c in view.done if (x := x_of(c)) and (y := _worth(view, c)) is not None}
        cells = [cell for cell in view.done if cell.index in found]
        if len({found[c.index][0] for c in cells}) < 2:
            continue
        best = frontier(cells, {i: (-x, y) for i, (x, y) in found.items()})
        lines = []
        for slot, members in _grouped_by_colour(cells).items():
            spots = [Spot(*found[c.index], name=c.label if c in best else "") for c in members]
            lines.append(Line(view.colours[slot], slot, sorted(spots, key=lambda s: s.x), joined=False))
        panels.append(Panel(x_title, lines))
    if not panels:
        return None
    return Plot("pareto", "What memory and quality buy", "", y_title, panels, view.colours)


def _grouped_by_colour(cells: Sequence[Cell]) -> dict[int, list[Cell]]:
    groups: dict[int, list[Cell]] = {}
    for cell in sorted(cells, key=lambda c: c.colour):
        groups.setdefault(cell.colour, []).append(cell)
    return groups


def heatmap(view: View) -> Heat | None:
    """Tokens per round by temperature and verifier, of the shape that most cells share."""
    temperature, verifier = axis_of(view, "temperature"), axis_of(view, "verifier")
    if temperature is None or verifier is None:
        return None
    others = [axis for axis in view.axes if axis not in (temperature, verifier)]
    maps = []
    for group in _grouped([c for c in view.done if c.per_round and c.depth], others).values():
        values = {(verifier.value(c.setting), temperature.value(c.setting)): float(c.per_round or 0) for c in group}
        name = " · ".join(_said(a, a.value(group[0].setting)) for a in others)
        maps.append((name, values, group[0]))
    maps = [one for one in maps if len(one[1]) > 1]
    if not maps:
        return None
    if len(maps) > MAX_PANELS:
        kept = _usual_shape([cell for _, _, cell in maps])
        maps = [one for one in maps if shape(one[2]) == kept][:MAX_PANELS]
    return Heat(
        "Tokens per round by rule", [(n, v) for n, v, _ in maps], view.values(verifier), view.values(temperature)
    )


def _usual_shape(cells: Sequence[Cell]) -> str:
    """The shape of most cells; of several, the largest."""
    counts: dict[str, int] = {}
    for cell in cells:
        counts[shape(cell)] = counts.get(shape(cell), 0) + 1
    return [one for one in places(cells) if counts[one] == max(counts.values())][-1]


BUILDERS: dict[str, Callable[[View], Plot | Heat | None]] = {
    "speed": speed,
    "tokens": tokens,
    "acceptance": acceptance,
    "text": text,
    "pareto": pareto,
    "heatmap": heatmap,
}
_LACKS = {
    "speed": "cells of two or more k (or trees, policies) that were timed",
    "tokens": "cells of two or more k (or trees, policies)",
    "acceptance": "a cell that drafts",
    "text": "texts of two or more stretches of 16 tokens, with four rounds each",
    "pareto": "cells that differ in memory, or whose loss was measured",
    "heatmap": "cells that differ in temperature and in verifier",
}


def plots(view: View, kinds: Sequence[str] = ()) -> list[Plot | Heat]:
    """Of every kind (None given: of all that the cells allow). `InputError` for a kind that they do not allow."""
    found = []
    for kind in kinds or KINDS:
        if kind not in BUILDERS:
            raise InputError(f"{kind!r} is no kind of plot; these are: {', '.join(KINDS)}")
        made = BUILDERS[kind](view)
        if made is None and kinds:
            raise InputError(f"--kind {kind} needs {_LACKS[kind]}; this document has none")
        if made is not None:
            found.append(made)
    return found
