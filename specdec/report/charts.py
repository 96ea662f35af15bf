"""Small charts as inline SVG: drawn once, readable without scripts, coloured by the page's style sheet.

A chart is 400 units wide, about its size on a page, so that its letters keep their size on a phone. Whatever belongs to
a cell carries `data-cell`, by which the page lights it up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from specdec.report.markup import Markup, el, number

WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 26, 36
# A letter's width at the size of labels; a generous guess, for fonts differ.
_LETTER = 6.6
#: One shape per colour, so that colour is never the only difference.
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-5l5 5l-5 5l-5-5z",
    "M0-4.8l4.8 8.4h-9.6z",
    "M0 4.8l4.8-8.4h-9.6z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M-2.4-4.4h4.8l2.4 4.4l-2.4 4.4h-4.8l-2.4-4.4z",
    "M-4.5-1.8h9v3.6h-9z",
)


@dataclass(frozen=True)
class Point:
    """One value; `cell` is what it belongs to, `tip` what is said when it is pointed at."""

    x: float
    y: float
    tip: str
    cell: int | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line through points. `cell`: of all of it, else points have their own. `on`: drawn in colour from the start."""

    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    cell: int | None = None
    on: bool = True
    marks: bool = True
    name: str = ""  # written at the end of the line


@dataclass
class Scale:
    """From values to units; `ticks` in values, with their texts."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.end - self.start) * ((value - self.low) / span if span else 0.5)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = max(high - low, 1e-12)
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick_text(value: float, step: float) -> str:
    places = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    places += abs(round(step, places) - step) > step * 1e-6  # steps of 2.5
    return f"{value:.{places}f}"


def linear(
    values: Sequence[float], start: float, end: float, *, zero: bool = False, count: int = 5,
    show: Callable[[float, float], str] = _tick_text,
) -> Scale:  # fmt: skip
    """A scale whose ends are ticks. `zero`: begins at 0."""
    low, high = (0.0 if zero else min(values)), max(values)
    if high <= low:
        high = low + (abs(low) or 1.0) * 0.1
    ticks = nice_ticks(low, high, count)
    step = ticks[1] - ticks[0]
    return Scale(ticks[0], ticks[-1], start, end, [(tick, show(tick, step)) for tick in ticks])


def percent(value: float, step: float) -> str:
    return f"{100 * value:.0f}"


def spread_ticks(scale: Scale) -> list[tuple[float, str]]:
    """The ticks that have room beside each other, the first and the last before others."""
    kept: list[tuple[float, float, str]] = []
    for value, text in [*scale.ticks[:1], *scale.ticks[:0:-1]]:
        at, half = scale(value), len(text) * _LETTER / 2 + 4
        if all(abs(at - other) >= half + len(t) * _LETTER / 2 for other, _, t in kept):
            kept.append((at, value, text))
    return [(value, text) for _, value, text in sorted(kept)]


def mark(x: float, y: float, colour: int, **attributes: object) -> Markup:
    shape = MARKS[colour % len(MARKS)]
    return el("path", d=shape, transform=f"translate({number(x)} {number(y)})", **attributes)


def legend_mark(colour: int) -> Markup:
    """The mark alone, beside a name."""
    shown = mark(0, 0, colour, cls="mark")
    return el("svg", shown, cls=f"key c{colour % len(MARKS)}", viewbox="-7 -7 14 14", aria_hidden="true")


def frame(x: Scale, y: Scale, x_title: str, y_title: str, height: float = HEIGHT) -> list[Markup]:
    """Hairlines, ticks and titles."""
    bottom = height - BOTTOM
    parts = [el("text", f"↑ {y_title}", x=0, y=11, cls="axis-title")]
    for value, text in y.ticks:
        at = number(y(value))
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, cls="grid"))
        parts.append(el("text", text, x=LEFT - 8, y=at, dy="0.32em", cls="tick end"))
    for value, text in spread_ticks(x):
        parts.append(el("text", text, x=number(x(value)), y=number(bottom + 17), cls="tick middle"))
    parts.append(el("text", f"{x_title} →", x=WIDTH - RIGHT, y=number(height - 3), cls="axis-title end"))
    return parts


def _line(series: Series, x: Scale, y: Scale) -> Markup:
    """Whiskers, line, marks. Marks have a larger invisible twin, which is easier to point at."""
    placed = [(p, x(p.x), y(p.y)) for p in series.points]
    parts: list[Markup] = []
    for p, at, _ in placed:
        if p.low is not None and p.high is not None and p.high > p.low:
            ends = {"y1": number(y(p.low)), "y2": number(y(p.high))}
            parts.append(el("line", x1=number(at), x2=number(at), **ends, cls="whisker"))
    if len(placed) > 1:
        path = "M" + "L".join(f"{number(at)} {number(up)}" for _, at, up in placed)
        parts.append(el("path", d=path, cls="line"))
    for p, at, up in placed:
        shown = [mark(at, up, series.colour, cls="mark")] if series.marks else []
        title = el("title", p.tip)
        parts.append(
            el("g", shown, el("circle", title, cx=number(at), cy=number(up), r=10, cls="hit"), data_cell=p.cell)
        )
    if series.name and placed:
        _, at, up = placed[-1]
        parts.append(el("text", series.name, x=number(at - 2), y=number(up - 9), cls="name end"))
    classes = f"series c{series.colour % len(MARKS)} d{series.dash % 4}{' on' if series.on else ''}"
    return el("g", parts, cls=classes, data_cell=series.cell)


def lines(
    series: Sequence[Series], x: Scale, y: Scale, *, x_title: str, y_title: str, described: str,
    reference: tuple[float, str] | None = None,
) -> Markup:  # fmt: skip
    """Lines over a common frame, chosen ones on top of pale ones. `reference`: a level, and its name."""
    parts = frame(x, y, x_title, y_title)
    if reference is not None:
        at = y(reference[0])
        parts.append(el("line", x1=LEFT, x2=WIDTH - RIGHT, y1=number(at), y2=number(at), cls="reference"))
        points = [(x(p.x), y(p.y)) for one in series for p in one.points]
        parts.append(_beside(reference[1], at, points))
    parts += [_line(one, x, y) for one in sorted(series, key=lambda s: s.on)]
    return svg(parts, described)


def _beside(text: str, level: float, points: Sequence[tuple[float, float]]) -> Markup:
    """The name of a level, at the end and on the side of it that has the fewest points."""
    wide = len(text) * _LETTER + 16
    places = []
    for anchor, low, high in (("end", WIDTH - RIGHT - wide, WIDTH), ("start", 0.0, LEFT + wide)):
        for up, dy in ((-18.0, -5.0), (18.0, 13.0)):
            top, bottom = min(level, level + up), max(level, level + up)
            near = sum(low <= px <= high and top - 4 <= py <= bottom + 4 for px, py in points)
            places.append((near, anchor, level + dy))
    _, anchor, at = min(places, key=lambda place: place[0])
    edge = WIDTH - RIGHT if anchor == "end" else LEFT + 2
    return el("text", text, x=edge, y=number(at), cls=f"reference-name {anchor}")


def svg(parts: Sequence[Markup], described: str, height: float = HEIGHT) -> Markup:
    return el("svg", parts, cls="chart", viewbox=f"0 0 {WIDTH} {number(height)}", role="img", aria_label=described)


def figure(title: str | Markup, chart: Markup, note: str | Markup | None = None) -> Markup:
    return el("figure", el("figcaption", title), chart, el("p", note, cls="note") if note else None)


def placed_labels(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    """Places for the labels of points that meet neither each other nor a point; those without room are left out.

    Of (x, y, text); gives (x, y, anchor, text).
    """
    taken = [(px - 6, py - 6, px + 6, py + 6) for px, py, _ in points]
    found = []
    for px, py, text in points:
        wide = len(text) * _LETTER
        for x0, y0, anchor in (
            (px + 9, py - 6, "start"), (px - 9 - wide, py - 6, "end"),
            (px - wide / 2, py - 20, "middle"), (px - wide / 2, py + 8, "middle"),
        ):  # fmt: skip
            box = (x0, y0, x0 + wide, y0 + 12)
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 12 and box[3] <= HEIGHT - BOTTOM + 4
            if inside and not any(_meet(box, other) for other in taken):
                taken.append(box)
                at = {"start": x0, "end": x0 + wide, "middle": px}[anchor]
                found.append((at, y0 + 10, anchor, text))
                break
    return found


def _meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
