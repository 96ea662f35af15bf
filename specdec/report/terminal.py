"""Plots in a terminal: lines in braille dots, values as marks, intervals as bars, panels side by side.

Every line has a mark of its own as well as a colour, so that nothing is lost with NO_COLOR, on paper, or to
colour-blind readers; where the encoding has no braille, plain characters do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from specdec.report.charts import nice_ticks
from specdec.report.shapes import Heat, Line, Panel, Plot

if TYPE_CHECKING:
    from rich.console import Console

MARKS, ASCII_MARKS = "●■◆▲▼✚⬢▬", "o#x^v+*="
# Readable on black and on white, told apart by colour-blind people (after Okabe and Ito).
COLOURS = ("#0a7fc4", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56a4e9", "#a03030", "#808080")
HEIGHT = 9
_MIN_PANEL, _MAX_PANEL, _MAX_COLUMNS = 36, 64, 4
_TICK = 5
# Dots of a braille character by (column, row) within it.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800


def _written(text: str, ascii_only: bool) -> str:
    return text.replace(" · ", ", ").encode("ascii", "replace").decode() if ascii_only else text


def _mark(slot: int, ascii_only: bool) -> str:
    marks = ASCII_MARKS if ascii_only else MARKS
    return marks[slot % len(marks)]


def _colour(slot: int) -> str:
    return COLOURS[slot % len(COLOURS)]


@dataclass
class Canvas:
    """Characters of `width` x `height`; dots have twice and four times as many places. (0, 0) is the upper left."""

    width: int
    height: int
    ascii_only: bool = False
    dots: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    signs: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)

    def dot(self, x: float, y: float, style: str) -> None:
        """At shares of the width and height, y upwards."""
        column, row = round(x * (2 * self.width - 1)), round((1 - y) * (4 * self.height - 1))
        at = (column // 2, row // 4)
        bits, _ = self.dots.get(at, (0, ""))
        self.dots[at] = (bits | _DOTS[column % 2][row % 4], style)

    def line(self, start: tuple[float, float], end: tuple[float, float], style: str) -> None:
        steps = max(round(abs(end[0] - start[0]) * 2 * self.width), round(abs(end[1] - start[1]) * 4 * self.height), 1)
        for i in range(steps + 1):
            share = i / steps
            self.dot(start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1]), style)

    def sign(self, x: float, y: float, what: str, style: str, over: bool = True) -> None:
        at = (round(x * (self.width - 1)), round((1 - y) * (self.height - 1)))
        if over or (at not in self.signs and at not in self.dots):
            self.signs[at] = (what, style)

    def rows(self) -> Iterator[Text]:
        for row in range(self.height):
            text = Text(no_wrap=True)
            for column in range(self.width):
                at = (column, row)
                if at in self.signs:
                    text.append(*self.signs[at])
                elif at in self.dots:
                    bits, style = self.dots[at]
                    text.append("." if self.ascii_only else chr(_BRAILLE + bits), style)
                else:
                    text.append(" ")
            yield text


@dataclass(frozen=True)
class _Span:
    low: float
    high: float

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5


def _value(value: float, is_share: bool) -> str:
    return f"{value:.0%}" if is_share else f"{value:.4g}"


def _y_axis(plot: Plot) -> tuple[_Span, list[float]]:
    ticks = nice_ticks(*plot.y_span, count=4)
    return _Span(ticks[0], ticks[-1]), ticks


def _x_axis(plot: Plot, panel: Panel) -> tuple[_Span, list[tuple[float, str]]]:
    if plot.ticks:
        low, high = plot.x_span
        margin = 0.04 * (high - low) + (0.25 if len(plot.ticks) > 1 else 0.5)
        return _Span(low - margin, high + margin), plot.ticks
    own = plot.kind == "pareto"  # panels of different quantities
    xs = [s.x for line in panel.lines for s in line.spots] if own else list(plot.x_span)
    low, high = min(xs), max(xs)
    if plot.kind == "acceptance":
        low, high = min(low, 1), max(high, 2)
        return _Span(low, high), [(float(i), str(i)) for i in range(int(low), int(high) + 1)]
    ticks = nice_ticks(low, high, count=3)
    return _Span(ticks[0], ticks[-1]), [(tick, f"{tick:.4g}") for tick in ticks]


def _draw(canvas: Canvas, line: Line, x: _Span, y: _Span, shift: float) -> None:
    style, mark = _colour(line.slot), _mark(line.slot, canvas.ascii_only)
    places = [(min(max(x.share(s.x) + shift, 0.0), 1.0), y.share(s.y)) for s in line.spots]
    if line.joined:
        for start, end in pairwise(places):
            canvas.line(start, end, style)
    for (across, _), spot in zip(places, line.spots, strict=True):
        if spot.low is not None and spot.high is not None:
            rows = [round((1 - y.share(end)) * (canvas.height - 1)) for end in (spot.high, spot.low)]
            for row in range(rows[0], rows[1] + 1):
                up = 1 - row / max(canvas.height - 1, 1)
                canvas.sign(across, up, "|" if canvas.ascii_only else "│", style)
    for across, up in places:
        canvas.sign(across, up, mark, style)


def _ruler(x: _Span, ticks: Sequence[tuple[float, str]], width: int) -> str:
    """Tick texts at their places; those that would touch the last one are left out."""
    line, end = [" "] * width, -1
    for value, text in ticks:
        start = min(max(round(x.share(value) * (width - 1)) - len(text) // 2, 0), max(width - len(text), 0))
        if start > end and start + len(text) <= width:
            line[start : start + len(text)] = text
            end = start + len(text)
    return "".join(line)


def panel_rows(plot: Plot, panel: Panel, width: int, ascii_only: bool = False) -> list[Text]:
    """One panel as lines of text, none wider than `width`."""
    inner = max(width - _TICK - 2, 8)
    canvas = Canvas(inner, HEIGHT, ascii_only)
    (y, y_ticks), (x, x_ticks) = _y_axis(plot), _x_axis(plot, panel)
    # Intervals at the same k stand side by side.
    lines = panel.lines
    for i, line in enumerate(lines):
        beside = (i - (len(lines) - 1) / 2) / inner if plot.ticks and len(lines) <= 8 else 0.0
        _draw(canvas, line, x, y, beside)
    if plot.reference:
        for column in range(0, inner, 2):
            canvas.sign(
                column / max(inner - 1, 1), y.share(plot.reference[0]), "-" if ascii_only else "╌", "dim", over=False
            )
    labels = {round((1 - y.share(tick)) * (HEIGHT - 1)): _value(tick, plot.is_share) for tick in y_ticks}
    bar, corner, floor = ("|", "+", "-") if ascii_only else ("│", "└", "─")
    title = _written(panel.title, ascii_only)
    rows = [Text(title[:width], "bold", no_wrap=True)] if title else []
    for i, row in enumerate(canvas.rows()):
        rows.append(Text(f"{labels.get(i, ''):>{_TICK}} {bar}", "dim", no_wrap=True, end="") + row)
    rows.append(Text(f"{'':>{_TICK}} {corner}{floor * inner}", "dim", no_wrap=True))
    rows.append(Text(f"{'':>{_TICK + 2}}{_ruler(x, x_ticks, inner)}", "dim", no_wrap=True))
    return rows


def _legend(plot: Plot, ascii_only: bool) -> Text:
    used = sorted({line.slot for panel in plot.panels for line in panel.lines})
    text = Text()
    for slot in used:
        if plot.names[slot]:
            text.append(f"{_mark(slot, ascii_only)} ", _colour(slot))
            text.append(f"{_written(plot.names[slot], ascii_only)}   ")
    return text


def _grid(panels: Sequence[list[Text]], columns: int) -> Table:
    grid = Table.grid(padding=(0, 2, 1, 0))
    for _ in range(columns):
        grid.add_column(no_wrap=True)
    for i in range(0, len(panels), columns):
        grid.add_row(*(Text("\n").join(rows) for rows in panels[i : i + columns]))
    return grid


def _show_plot(console: Console, plot: Plot) -> None:
    ascii_only = console.options.ascii_only
    room = console.width - 2
    columns = max(1, min(_MAX_COLUMNS, len(plot.panels), room // _MIN_PANEL))
    width = min(room // columns - 2, _MAX_PANEL)
    console.print(f"\n[bold]{escape(plot.title)}[/]")
    over = f" over {plot.x_title}" if plot.x_title else ""
    what = f"{plot.y_title}{over}"
    if any(spot.low is not None for spot in plot.spots):
        what += ", with 95 % intervals"
    console.print(f"[dim]{escape(what)}[/]")
    if plot.left_out:
        console.print(f"[dim]{plot.left_out} panels with a single setting are left out[/]")
    legend = _legend(plot, ascii_only)
    if legend.plain.strip():
        console.print(legend)
    console.print(_grid([panel_rows(plot, panel, width, ascii_only) for panel in plot.panels], columns))
    for panel in plot.panels if plot.kind == "pareto" else ():
        best = sorted((s for line in panel.lines for s in line.spots if s.name), key=lambda s: s.x)
        console.print(f"[dim]not beaten in {escape(panel.title)} and {escape(plot.y_title)} at once:[/]")
        for spot in best:
            console.print(f"  {spot.x:>9.4g}  {spot.y:>6.3g}  {escape(_written(spot.name, ascii_only))}")


def _shade(value: float, low: float, high: float, ascii_only: bool) -> str:
    """A block whose height tells the value, for those who see no colours."""
    share = (value - low) / (high - low) if high > low else 1.0
    return "" if ascii_only else "▁▂▃▄▅▆▇█"[min(int(share * 8), 7)]


def _heat_table(name: str, values: dict[tuple[str, str], float], heat: Heat, ascii_only: bool) -> Table:
    low, high = heat.span
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.title = _written(name, ascii_only) or None
    table.title_justify, table.title_style = "left", "bold"
    table.add_column("verifier", no_wrap=True)
    for column in heat.columns:
        table.add_column(f"T {column}", justify="right", no_wrap=True)
    best = max(values.values())
    for row in heat.rows:
        cells: list[Text | str] = []
        for column in heat.columns:
            value = values.get((row, column))
            if value is None:
                cells.append("")
                continue
            block = _shade(value, low, high, ascii_only)
            cells.append(Text.assemble((f"{block} ", COLOURS[0]), (f"{value:.2f}", "bold" if value == best else "")))
        if any(cells):
            table.add_row(row, *cells)
    return table


def _show_heat(console: Console, heat: Heat) -> None:
    console.print(f"\n[bold]{escape(heat.title)}[/]\n[dim]by temperature and verifier[/]")
    tables = [_heat_table(name, values, heat, console.options.ascii_only) for name, values in heat.maps]
    wide = max(cell_len(heat.rows[0]), 10, *(cell_len(r) for r in heat.rows)) + 9 * len(heat.columns) + 4
    columns = max(1, min(len(tables), (console.width - 2) // wide))
    grid = Table.grid(padding=(0, 3, 1, 0))
    for i in range(0, len(tables), columns):
        grid.add_row(*tables[i : i + columns])
    console.print(grid)


def show(console: Console, plots: Sequence[Plot | Heat]) -> None:
    """Print plots, as wide as the console allows; colours and encoding are the console's."""
    for plot in plots:
        if isinstance(plot, Heat):
            _show_heat(console, plot)
        else:
            _show_plot(console, plot)
