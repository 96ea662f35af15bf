"""The plots of a report as pictures, SVG or PNG, with matplotlib (`pip install 'specdec[plots]'`).

An SVG follows the reader's light or dark theme; a PNG is of one. Lines have marks of their own besides colours, which
stay apart for colour-blind readers. The same document gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.report.look import LOOKS, MARKERS, THEMES, Look, follows_theme, halo, ramp, style
from specdec.report.series import BUILDERS, plots
from specdec.report.shapes import Heat, Line, Panel, Plot
from specdec.report.view import View

SUFFIXES = (".svg", ".png")
_WIDTH, _PANEL_HEIGHT, _COLUMNS = 10.6, 3.35, 3
_NAMED = 7


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise InputError(
            "pictures need matplotlib: pip install 'specdec[plots]' (or: pip install matplotlib)"
        ) from None
    return matplotlib


def check(path: str | Path) -> None:
    """Fail before the work: `InputError` for another kind of file, a folder that is not there, no matplotlib."""
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"--plot {file}: give a file that ends in .svg or .png")
    if file.is_dir() or not file.resolve().parent.is_dir():
        raise InputError(f"--plot {file}: give the name of a file in a folder that is there")
    _matplotlib()


def _beside(panel: Panel, plot: Plot, line: Line) -> float:
    """How far intervals at the same k are moved apart."""
    if not plot.ticks or not any(spot.low is not None for spot in line.spots):
        return 0.0
    return (panel.lines.index(line) - (len(panel.lines) - 1) / 2) * min(0.07, 0.4 / len(panel.lines))


def _draw_line(axes: Any, plot: Plot, panel: Panel, line: Line, look: Look) -> None:
    colour, shift = look.slot(line.slot), _beside(panel, plot, line)
    xs, ys = [spot.x + shift for spot in line.spots], [spot.y for spot in line.spots]
    for x, spot in zip(xs, line.spots, strict=True):
        if spot.low is not None and spot.high is not None:
            axes.plot([x, x], [spot.low, spot.high], color=colour, lw=1.6, alpha=0.45, solid_capstyle="round", zorder=2)
    axes.plot(
        xs, ys, color=colour, lw=1.8 if line.joined else 0, marker=MARKERS[line.slot % len(MARKERS)], ms=5.6,
        mec=look.paper, mew=0.8, zorder=3, clip_on=False,
    )  # fmt: skip


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The same places in their order, moved apart to at least `gap`, as little as a pass over them can."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    shift = (sum(moved) - sum(places)) / max(len(places), 1)
    return [place - shift for place in moved]


def _name_lines(axes: Any, panel: Panel, look: Look) -> None:
    """Names at the ends of lines, instead of a legend."""
    lines = [line for line in panel.lines if line.name and line.joined]
    if not lines:
        return
    low, high = axes.get_ylim()
    at = _spread([line.spots[-1].y for line in lines], 0.075 * (high - low))
    for line, y in zip(lines, at, strict=True):
        axes.annotate(
            line.name, (line.spots[-1].x, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9,
            color=look.slot(line.slot), fontweight="bold", annotation_clip=False, path_effects=halo(look),
        )  # fmt: skip


def _name_best(axes: Any, panel: Panel, look: Look) -> None:
    """Names of the points that nothing beats, on whichever side has room."""
    best = sorted((s for line in panel.lines for s in line.spots if s.name), key=lambda s: s.y)
    if not best:
        return
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    at = _spread([spot.y for spot in best[-_NAMED:]], 0.06 * (high - low))
    for spot, y in zip(best[-_NAMED:], at, strict=True):
        is_right = spot.x >= (left + right) / 2
        axes.annotate(
            spot.name, (spot.x, y), xytext=(-8 if is_right else 8, 0), textcoords="offset points", va="center",
            ha="right" if is_right else "left", fontsize=8, color=look.ink, annotation_clip=False,
            path_effects=halo(look),
        )  # fmt: skip


def _dress(axes: Any, plot: Plot, panel: Panel, look: Look) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.grid(axis="both" if plot.kind == "pareto" else "y", zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    low, high = plot.y_span
    room = 0.06 * (high - low)
    axes.set_ylim(max(low - room, 0.0) if low >= 0 else low - room, high + room)
    if plot.is_share:
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if plot.ticks:
        axes.set_xticks([x for x, _ in plot.ticks], [text for _, text in plot.ticks])
        axes.set_xlim(plot.x_span[0] - 0.3, plot.x_span[1] + 0.3)
    elif plot.kind == "acceptance":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(1, max(plot.x_span[1], 2))
    if plot.reference:
        level, name = plot.reference
        axes.axhline(level, color=look.quiet, lw=1, ls=(0, (3, 3)), zorder=1)
        axes.annotate(name, (0, level), xycoords=("axes fraction", "data"), xytext=(2, 3), textcoords="offset points",
                      fontsize=8.5, color=look.quiet, path_effects=halo(look))  # fmt: skip
    axes.set_xlabel(panel.title if plot.kind == "pareto" else plot.x_title)
    axes.set_ylabel(plot.y_title)


def _draw_panel(axes: Any, plot: Plot, panel: Panel, look: Look) -> None:
    for line in panel.lines:
        _draw_line(axes, plot, panel, line, look)
    _dress(axes, plot, panel, look)
    (_name_best if plot.kind == "pareto" else _name_lines)(axes, panel, look)


def _draw_heat(axes: Any, heat: Heat, values: Mapping[tuple[str, str], float], look: Look) -> None:
    low, high = heat.span
    for (row, column), value in values.items():
        x, y = heat.columns.index(column), heat.rows.index(row)
        fill, ink = ramp((value - low) / (high - low) if high > low else 1.0)
        axes.bar(x, 0.94, width=0.94, bottom=y - 0.47, color=fill, zorder=2)
        axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9.5, zorder=3)
    axes.set_xlim(-0.5, len(heat.columns) - 0.5)
    axes.set_ylim(len(heat.rows) - 0.5, -0.5)
    axes.set_xticks(range(len(heat.columns)), heat.columns)
    axes.set_yticks(range(len(heat.rows)), heat.rows)
    axes.tick_params(length=0, labelcolor=look.quiet)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("temperature")


@dataclass(frozen=True)
class _Part:
    """One panel of a plot, with its title and, in quieter letters, what tells it from the plot's other panels."""

    plot: Plot | Heat
    number: int
    title: str
    subtitle: str


def _parts(found: Sequence[Plot | Heat], overview: bool) -> Iterator[_Part]:
    """All panels; of an overview, of each plot the one that says most."""
    for plot in found:
        if isinstance(plot, Heat):
            panels = [(name, (len(values), max(values.values()))) for name, values in plot.maps]
        else:
            panels = [(p.title, (sum(len(line.spots) for line in p.lines), 0.0)) for p in plot.panels]
        best = max(range(len(panels)), key=lambda i: panels[i][1])
        for i in (best,) if overview else range(len(panels)):
            is_named = not (isinstance(plot, Plot) and plot.kind == "pareto")
            yield _Part(plot, i, plot.title if overview or i == 0 else "", panels[i][0] if is_named else "")


def _head(axes: Any, part: _Part, look: Look) -> None:
    axes.set_title(part.title or " ", pad=22 if part.subtitle else 9)
    if part.subtitle:
        axes.annotate(
            part.subtitle, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", fontsize=9.5,
            color=look.quiet, annotation_clip=False,
        )  # fmt: skip


def draw(found: Sequence[Plot | Heat], look: Look, *, overview: bool = False) -> Any:
    """A matplotlib figure of all panels, in rows of three; `overview`: one panel of each plot."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    parts = list(_parts(found, overview))
    columns = min(len(parts), _COLUMNS)
    rows = math.ceil(len(parts) / columns)
    with matplotlib.rc_context(style(look)):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.05)
        figure = Figure(figsize=(_WIDTH * max(columns, 2) / _COLUMNS, _PANEL_HEIGHT * rows), layout=layout)
        for number, part in enumerate(parts, 1):
            axes = figure.add_subplot(rows, columns, number)
            if isinstance(part.plot, Heat):
                _draw_heat(axes, part.plot, part.plot.maps[part.number][1], look)
            else:
                _draw_panel(axes, part.plot, part.plot.panels[part.number], look)
            _head(axes, part, look)
    return figure


def most_telling(found: Sequence[Plot | Heat]) -> list[Plot | Heat]:
    """Three for an overview: what it gains, where it is accepted, and what the rule makes of temperature."""
    by_kind = {plot.kind if isinstance(plot, Plot) else "heatmap": plot for plot in found}
    order = ("speed", "tokens", "acceptance", "heatmap", "text", "pareto")
    chosen = [kind for kind in order if kind in by_kind and not (kind == "tokens" and "speed" in by_kind)]
    return [by_kind[kind] for kind in chosen[:_COLUMNS]]


def allows(document: Mapping[str, Any], kind: str) -> bool:
    """Whether the cells have what a plot of that kind needs."""
    return BUILDERS[kind](View(document)) is not None


def save(document: Mapping[str, Any], path: str | Path, kinds: Sequence[str] = (), theme: str = "auto") -> Path:
    """Write the plots of `kinds` (none: an overview) to `path`, an SVG or PNG. `auto`: an SVG follows the reader.

    Raises `InputError` for kinds that the document does not allow, and without matplotlib.
    """
    check(path)
    if theme not in THEMES:
        raise InputError(f"--theme is one of {', '.join(THEMES)}, not {theme!r}")
    found = plots(View(document), kinds)
    if not found:
        raise InputError("there is nothing to plot: no cell was finished, or none of them drafts")
    overview = not kinds
    if overview:
        found = most_telling(found)
    look = LOOKS["dark" if theme == "dark" else "light"]
    file = Path(path)
    figure = draw(found, look, overview=overview)
    matplotlib = _matplotlib()
    with matplotlib.rc_context(style(look)):
        if file.suffix.lower() == ".png":
            figure.savefig(file, dpi=180, metadata={"Software": None})
        else:
            figure.savefig(file, metadata={"Date": None, "Creator": None})
    if file.suffix.lower() == ".svg" and theme == "auto":
        file.write_text(follows_theme(file.read_text(encoding="utf-8")), encoding="utf-8")
    return file
