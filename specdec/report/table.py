"""All cells in one table, which the page's script sorts and filters."""

from __future__ import annotations

import math
from typing import Any

from specdec.report.charts import legend_mark
from specdec.report.markup import Markup, el, number
from specdec.report.view import Cell, View

_MANY = 16  # rows, beyond which the table scrolls by itself
_WIDTH = 132  # of the drawn interval


def _head(title: str, kind: str = "", *, sorts: bool = True, said: str | None = None) -> Markup:
    shown = el("button", title, type="button", title=said) if sorts else title
    return el("th", shown, scope="col", cls=kind or None, aria_sort="none" if sorts else None)


def _td(text: Any, key: float | str | None = None, cls: str | None = None) -> Markup:
    """`key`: what the column is sorted by."""
    return el("td", text, cls=cls, data_key=("" if key is None else key))


class _Whiskers:
    """Intervals of speed-up on one scale for the whole column, with the line of the plain loop."""

    def __init__(self, view: View):
        found = [c.speedup for c in view.done if c.speedup]
        self.low = min([0.95, *(s.low for s in found)])
        self.high = max([1.05, *(s.high for s in found)])

    def x(self, value: float) -> float:
        span = math.log(self.high / self.low)
        return 6 + (_WIDTH - 12) * math.log(max(value, 1e-9) / self.low) / span

    def draw(self, cell: Cell) -> Markup | None:
        s = cell.speedup
        if s is None:
            return None
        plain, low, high, middle = (number(self.x(v)) for v in (1.0, s.low, s.high, s.median))
        return el(
            "svg",
            el("line", x1=plain, x2=plain, y1=0, y2=18, cls="reference"),
            el("line", x1=low, x2=high, y1=9, y2=9, cls="whisker"),
            el("circle", cx=middle, cy=9, r=3.6, cls="mark"),
            cls=f"interval series on c{cell.colour % 8}",
            viewbox=f"0 0 {_WIDTH} 18",
            width=_WIDTH,
            height=18,
            aria_hidden="true",
        )


def _same(cell: Cell) -> tuple[str, float]:
    same, total = cell.raw.get("identical"), cell.raw.get("prompts")
    if same is None or not total:
        return "–", -1.0
    mark = " ≠" if cell.raw.get("expects_identity") and same != total else ""
    return f"{same}/{total}{mark}", same / total


def _unbroken(label: str) -> str:
    """Lines break between the parts of a label only."""
    return " · ".join(part.replace(" ", "\N{NO-BREAK SPACE}") for part in label.split(" · "))


def _row(view: View, cell: Cell, whiskers: _Whiskers) -> Markup:
    name = "colour and highlight" if cell.done else "failed"
    alone = len(view.cells) == 1
    box = el(
        "input", type="checkbox", checked=cell in view.chosen, disabled=not cell.done, data_choose=cell.index,
        aria_label=f"{name}: {cell.label}",
    )  # fmt: skip
    key = el("span", legend_mark(cell.colour)) if view.colour_axis is not None else None
    cells = [] if alone else [el("td", el("label", box, key, cls="choose"), cls="pick")]
    lossy = el("small", " lossy", cls="warn") if cell.done and not cell.lossless else None
    cells.append(el("th", _unbroken(cell.label), lossy, scope="row", cls="label", data_key=cell.index))
    for axis in view.axes:
        value = axis.value(cell.setting)
        cells.append(_td(value, value, cls="axis"))
    filters = {f"data_f{i}": axis.value(cell.setting) for i, axis in enumerate(view.axes)}
    if not cell.done:
        said = el("span", "failed ", cls="warn"), cell.error or "no reason was recorded"
        cells.append(el("td", said, colspan=_num_figures(view), cls="error", data_key=""))
        return el("tr", cells, data_cell=cell.index, cls="failed", **filters)
    if view.timed:
        s = cell.speedup
        cells.append(_td(f"{s.median:.2f}×" if s else "–", s.median if s else None, cls="num strong"))
        interval = el("span", f"{s.low:.2f}–{s.high:.2f}", cls="range") if s else None
        cells.append(el("td", whiskers.draw(cell), interval, cls="drawn"))
    per_round, rate = cell.per_round, cell.acceptance
    cells.append(_td("–" if per_round is None else f"{per_round:.2f}", per_round, cls="num"))
    cells.append(_td("–" if rate is None else f"{rate:.0%}", rate, cls="num"))
    if view.timed:
        speed = cell.rate()
        cells.append(_td(f"{speed.median:.0f}" if speed else "–", speed.median if speed else None, cls="num wide"))
        efficiency = cell.raw.get("efficiency") if cell.timed and cell.acceptance is not None else None
        cells.append(_td(f"{efficiency:.0%}" if efficiency else "–", efficiency or None, cls="num wide"))
    same, share = _same(cell)
    tone = " warn" if same.endswith("≠") else "" if cell.raw.get("expects_identity") else " quiet"
    cells.append(_td(same, share, cls=f"num{tone}"))
    best = " best" if cell is view.best and len(view.done) > 1 else ""
    return el("tr", cells, data_cell=cell.index, cls=f"done{best}", **filters)


def _num_figures(view: View) -> int:
    return 7 if view.timed else 3


def _filters(view: View) -> Markup | None:
    if not view.axes or len(view.cells) < 4:
        return None
    choices = []
    for i, axis in enumerate(view.axes):
        options = [el("option", "all", value="")] + [el("option", v, value=v) for v in view.values(axis)]
        choices.append(el("label", el("span", axis.title), el("select", options, data_filter=f"f{i}")))
    count = el("output", f"{len(view.cells)} of {len(view.cells)}", id="shown", aria_live="polite")
    return el("div", choices, el("p", count, " settings"), cls="filters scripted")


def table(view: View) -> Markup:
    """A row for each cell, in the order of the document; failed ones say why."""
    whiskers = _Whiskers(view)
    heads = [] if len(view.cells) == 1 else [el("th", el("span", "in colour", cls="unseen"), scope="col", cls="pick")]
    heads.append(_head("setting", "label"))
    heads += [_head(axis.title, "axis") for axis in view.axes]
    if view.timed:
        heads += [_head("speed-up", "num"), _head("95 %", "drawn", sorts=False)]
    heads += [
        _head("per round", "num", said="tokens that a round emits, the target's own included"),
        _head("accepted", "num", said="of the drafted tokens"),
    ]
    if view.timed:
        heads += [
            _head("tokens/s", "num wide"),
            _head("of ideal", "num wide", said="efficiency: what bare forwards allow"),
        ]
    heads.append(_head("same text", "num", said="texts identical to plain decoding"))
    rows = [_row(view, cell, whiskers) for cell in view.cells]
    few = " few" if not view.axes else ""
    long = " long" if len(view.cells) > _MANY else ""
    caption = el("caption", "All settings", cls="unseen")
    made = el("table", caption, el("thead", el("tr", heads)), el("tbody", rows), cls=f"cells{few}", id="cells")
    return el(
        "div",
        _filters(view),
        el("div", made, cls=f"scroll{long}", tabindex=0, role="region", aria_label="all settings"),
    )
