"""Charts of cells: acceptance by position and along the text; memory, quality and speed, two at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from specdec.cli.screen import size
from specdec.report import charts
from specdec.report.charts import Point, Scale, Series, figure, legend_mark, linear, lines, mark, percent
from specdec.report.markup import Markup, el, number
from specdec.report.view import Cell, View

# Positions drawn; further ones are in the data.
_MAX_POSITIONS = 16
# Tokens of text per point along it, and rounds that a point needs.
_BIN, _MIN_ROUNDS = 16, 4
HORIZONTAL = (charts.LEFT + 8, charts.WIDTH - charts.RIGHT - 8)
VERTICAL = (charts.HEIGHT - charts.BOTTOM, charts.TOP)


def grid(figures: Sequence[Markup]) -> Markup:
    return el("div", list(figures), cls="figures")


def legend(view: View) -> Markup | None:
    """Who has which colour and mark."""
    if view.colour_axis is None:
        return None
    entries = [el("li", legend_mark(i), value) for i, value in enumerate(view.colours)]
    return el("ul", entries, cls="legend", aria_label=f"colours by {view.colour_axis.title}")


def _dashes(cells: Sequence[Cell]) -> dict[int, int]:
    """The n-th cell of a colour gets the n-th kind of line."""
    seen: dict[int, int] = {}
    found = {}
    for cell in cells:
        found[cell.index] = seen.setdefault(cell.colour, 0)
        seen[cell.colour] += 1
    return found


def _positions(cell: Cell, name: str) -> list[float]:
    values = cell.stats.get(name)
    deepest = min(_MAX_POSITIONS, cell.depth)
    return [float(v) for v in values[:deepest]] if isinstance(values, list) else []


def acceptance(view: View) -> Markup | None:
    """Conditional and joint acceptance by position."""
    kinds = (
        ("conditional_acceptance", "Given that all before it were accepted", "accepted, %, of those reached"),
        ("joint_acceptance", "Accepted together with all before it", "accepted, %, of all rounds"),
    )
    chosen, dashes = set(view.chosen), _dashes(view.chosen)
    deepest = max((len(_positions(c, name)) for c in view.done for name, *_ in kinds), default=0)
    if not deepest:
        return None
    x = Scale(1, max(deepest, 2), *HORIZONTAL, [(i, str(i)) for i in range(1, deepest + 1)])
    y = Scale(0, 1, *VERTICAL, [(i / 4, str(25 * i)) for i in range(5)])
    figures = []
    for name, title, y_title in kinds:
        series = []
        for cell in view.done:
            points = [
                Point(i, v, f"{cell.label}\nposition {i}: {v:.1%}") for i, v in enumerate(_positions(cell, name), 1)
            ]
            if points:
                series.append(Series(points, cell.colour, dashes.get(cell.index, 0), cell.index, cell in chosen))
        chart = lines(series, x, y, x_title="position in the draft", y_title=y_title, described=_says(view, title))
        figures.append(figure(title, chart))
    return grid(figures)


def _says(view: View, title: str) -> str:
    return f"{title}; {len(view.done)} settings, {len(view.chosen)} of them in colour. The numbers are in the data."


def along(cell: Cell) -> list[tuple[float, int, int, int]]:
    """(middle of a stretch of text in tokens, rounds that began there, accepted, drafted), over all rows."""
    bins: dict[int, list[int]] = {}
    for row in cell.rows:
        rounds, at = row.get("rounds") or {}, 0
        triples = zip(rounds.get("nodes", ()), rounds.get("accepted", ()), rounds.get("emitted", ()), strict=False)
        for nodes, accepted, emitted in triples:
            found = bins.setdefault(at // _BIN, [0, 0, 0])
            found[0] += 1
            found[1] += accepted
            found[2] += nodes
            at += emitted
    return [((b + 0.5) * _BIN, *bins[b]) for b in sorted(bins) if bins[b][0] >= _MIN_ROUNDS]  # type: ignore[misc]


def _text_scale(end: int) -> Scale:
    """From 0 to `end`, with a tick at every so many stretches of text."""
    step = _BIN
    while end / step > 6:
        step *= 2
    return Scale(0, end, *HORIZONTAL, [(at, str(at)) for at in range(0, end + 1, step)])


def along_the_text(view: View) -> Markup | None:
    """Tokens per round, and the share of drafted tokens that was accepted, by place in the text."""
    found = {cell.index: along(cell) for cell in view.done}
    if max((len(points) for points in found.values()), default=0) < 2:
        return None
    chosen, dashes = set(view.chosen), _dashes(view.chosen)
    whole = [_BIN * round(p[0] / _BIN + 0.5) for points in found.values() for p in points]
    x = _text_scale(max(whole))
    figures = []
    for title, y_title, is_share in (
        ("Tokens per round", "tokens per round", False), ("Drafted tokens that were accepted", "accepted, %", True),
    ):  # fmt: skip
        series = []
        for cell in view.done:
            points = []
            for at, rounds, accepted, nodes in found[cell.index]:
                if is_share and not nodes:
                    continue
                value = accepted / nodes if is_share else 1 + accepted / rounds
                shown = f"{value:.0%} accepted" if is_share else f"{value:.2f} tokens per round"
                where = f"tokens {at - _BIN / 2 + 1:.0f}–{at + _BIN / 2:.0f}"
                points.append(Point(at, value, f"{cell.label}\n{where}: {shown}, {rounds} rounds"))
            if points:
                on = cell in chosen
                series.append(Series(points, cell.colour, dashes.get(cell.index, 0), cell.index, on, marks=on))
        if not series:
            continue
        values = [p.y for s in series for p in s.points]
        if is_share:
            y = Scale(0, 1, *VERTICAL, [(i / 4, percent(i / 4, 1)) for i in range(5)])
        else:
            y = linear([1, *values], *VERTICAL)
        chart = lines(series, x, y, x_title="tokens of text", y_title=y_title, described=_says(view, title))
        figures.append(figure(title, chart))
    return grid(figures)


def dominated(cells: Sequence[Cell], goods: Mapping[int, Sequence[float]]) -> set[int]:
    """Cells than which another is at least as good in everything, and better in something. Larger is better."""
    found = set()
    for a in cells:
        for b in cells:
            mine, other = goods[a.index], goods[b.index]
            if all(o >= m for m, o in zip(mine, other, strict=True)) and any(
                o > m for m, o in zip(mine, other, strict=True)
            ):
                found.add(a.index)
                break
    return found


def pareto(view: View) -> tuple[Markup | None, bool]:
    """Memory, quality and speed, two at a time; and whether quality was measured at all."""
    speed_title = "tokens per second" if view.timed else "tokens per round"

    def speed(cell: Cell) -> float | None:
        if not view.timed:
            return cell.per_round
        rate = cell.rate()
        return rate.median if rate else None

    has_quality = any(cell.loss is not None for cell in view.done)
    memory = ("memory, MiB", lambda c: None if c.num_bytes is None else c.num_bytes / (1 << 20), -1)
    loss = ("loss, nats per token", lambda c: c.loss, -1)
    fast = (speed_title, speed, 1)
    pairs = [(memory, fast)] + ([(loss, fast), (memory, loss)] if has_quality else [])
    figures = []
    for (x_title, x_of, x_sign), (y_title, y_of, y_sign) in pairs:
        goods = {}
        for cell in view.done:
            x_value, y_value = x_of(cell), y_of(cell)
            if x_value is not None and y_value is not None:
                goods[cell.index] = (x_sign * x_value, y_sign * y_value)
        cells = [cell for cell in view.done if cell.index in goods]
        if min(len({goods[c.index][i] for c in cells}) for i in (0, 1)) < 2 if cells else True:
            continue  # nothing to weigh: one setting, or all of them alike
        values = {i: (abs(a), abs(b)) for i, (a, b) in goods.items()}
        chart = _scatter(cells, values, dominated(cells, goods), x_title, y_title)
        figures.append(figure(f"{y_title.split(',')[0].capitalize()} and {x_title.split(',')[0]}", chart))
    return (grid(figures) if figures else None), has_quality


def _scatter(
    cells: Sequence[Cell], values: Mapping[int, tuple[float, float]], dominated: set[int], x_title: str, y_title: str
) -> Markup:
    x = linear([values[c.index][0] for c in cells], *HORIZONTAL, count=4)
    y = linear([values[c.index][1] for c in cells], *VERTICAL)
    parts = charts.frame(x, y, x_title, y_title)
    for cell in sorted(cells, key=lambda c: c.index not in dominated):
        across, up = values[cell.index]
        memory = f", {size(cell.num_bytes)}" if cell.num_bytes else ""
        tip = f"{cell.label}\n{up:.4g} {y_title}{memory}" + (f", loss {cell.loss:.3f}" if cell.loss is not None else "")
        at, over = x(across), y(up)
        hit = el("circle", el("title", tip), cx=number(at), cy=number(over), r=9, cls="hit")
        shown = mark(at, over, cell.colour, cls="mark")
        pale = "" if cell.index not in dominated else " pale"
        parts.append(el("g", shown, hit, cls=f"series c{cell.colour % 8} on{pale}", data_cell=cell.index))
    front = sorted((c for c in cells if c.index not in dominated), key=lambda c: values[c.index])
    labels = charts.placed_labels([(x(values[c.index][0]), y(values[c.index][1]), c.label) for c in front])
    parts += [el("text", text, x=number(a), y=number(b), cls=f"name {anchor}") for a, b, anchor, text in labels]
    names = ", ".join(c.label for c in front)
    return charts.svg(parts, f"{y_title} against {x_title}; not dominated: {names}")
