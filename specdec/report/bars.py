"""Where the time goes, and which kinds of prompts gain."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from specdec.report.charts import BOTTOM, WIDTH, Scale, figure, linear, mark, svg
from specdec.report.markup import Markup, el, number
from specdec.report.panels import grid
from specdec.report.view import Cell, View
from specdec.trace import STAGES

_SAYS = {
    "prefill": "reading the prompt",
    "draft": "drafting",
    "verify": "the target's forward and the rule",
    "commit": "keeping what was accepted",
    "other": "the rest of the loop",
}
_ROW = 22
# Categories, or prompts where there are none, that are drawn.
_MAX_ROWS = 24


def _bar(label: str, parts: Mapping[str, float], longest: float, **attributes: Any) -> Markup:
    total = sum(parts.values())
    pieces = []
    for stage in STAGES:
        share = 100 * parts[stage] / longest if longest else 0.0
        if share >= 0.05:
            shown = f"{parts[stage]:.2f}" if share >= 9 else None
            title = f"{stage}: {parts[stage]:.3f} ms per token, {parts[stage] / total:.0%}\n{_SAYS[stage]}"
            pieces.append(el("span", shown, cls=f"piece {stage}", style=f"width:{share:.2f}%", title=title))
    said = ", ".join(f"{stage} {parts[stage]:.2f}" for stage in STAGES)
    bar = el("div", pieces, cls="bar", role="img", aria_label=f"{label}: {said} milliseconds per token")
    return el(
        "li", el("span", label, cls="bar-label"), bar, el("span", f"{total:.2f} ms", cls="bar-total"), **attributes
    )


def stages(view: View) -> Markup | None:
    """Milliseconds per token by stage, of the best setting's plain loop and of the chosen cells."""
    found = {cell.index: parts for cell in view.done if (parts := cell.milliseconds())}
    if not found:
        return None
    plain = view.best.milliseconds(plain=True) if view.best else {}
    longest = max(sum(parts.values()) for parts in [*found.values(), plain or dict.fromkeys(STAGES, 0.0)])
    rows = [_bar("plain loop", plain, longest, cls="on")] if plain and sum(plain.values()) else []
    chosen = view.chosen
    ordered = [c for c in chosen if c.index in found] + [c for c in view.done if c.index in found and c not in chosen]
    for cell in ordered:
        on = "cell-bar on" if cell in chosen else "cell-bar"
        rows.append(_bar(cell.label, found[cell.index], longest, cls=on, data_cell=cell.index))
    keys = [el("li", el("i", cls=f"swatch {stage}"), f"{stage} ", el("small", _SAYS[stage])) for stage in STAGES]
    return el("div", el("ul", keys, cls="legend"), el("ul", rows, cls="bars"))


def _groups(view: View) -> tuple[str, list[str], dict[int, dict[str, list[Mapping[str, Any]]]]]:
    """Rows of each cell by category; by prompt where there is but one category."""
    names = dict.fromkeys(str(row.get("category") or "") for cell in view.done for row in cell.rows)
    by = "category" if len(names) > 1 else "id"
    order = dict.fromkeys(str(row.get(by) or "–") for cell in view.done for row in cell.rows)
    grouped: dict[int, dict[str, list[Mapping[str, Any]]]] = {}
    for cell in view.done:
        groups = grouped.setdefault(cell.index, {})
        for row in cell.rows:
            groups.setdefault(str(row.get(by) or "–"), []).append(row)
    return by, list(order), grouped


def _per_round(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of all rounds together; where a row has none, the mean of what the rows say."""
    rounds = [row.get("rounds") or {} for row in rows]
    if all(r.get("accepted") for r in rounds):
        accepted = [a for r in rounds for a in r["accepted"]]
        return 1 + float(sum(accepted)) / len(accepted)
    said = [row["mean_acceptance_length"] for row in rows if row.get("mean_acceptance_length") is not None]
    return float(statistics.fmean(said)) if said else None


def _speedup(rows: Sequence[Mapping[str, Any]]) -> float | None:
    said = [row["speedup"] for row in rows if isinstance(row.get("speedup"), (int, float))]
    return float(statistics.median(said)) if said else None


def by_category(view: View) -> tuple[Markup | None, str]:
    """Speed-up and tokens per round by category: a dot for each cell; and "category", or "id" for single prompts."""
    by, names, grouped = _groups(view)
    if not names or len(names) > _MAX_ROWS:
        return None, by
    kinds = [("Tokens per round", "tokens per round", _per_round, "")]
    if view.timed:
        kinds.insert(0, ("Speed-up", "times the plain loop", _speedup, "×"))
    figures = []
    for title, axis, value_of, unit in kinds:
        values = {
            (cell.index, name): value
            for cell in view.done
            for name, rows in grouped[cell.index].items()
            if (value := value_of(rows)) is not None and (cell.timed or unit == "")
        }
        if values:
            figures.append(figure(title, _dots(view, names, values, axis, unit)))
    return (grid(figures) if figures else None), by


def _dots(view: View, names: Sequence[str], values: Mapping[tuple[int, str], float], axis: str, unit: str) -> Markup:
    letters = min(max(len(name) for name in names), 18)
    left = 18 + 6.8 * letters
    height = _ROW * len(names) + BOTTOM + 14
    x = linear([1.0, *values.values()], left + 6, WIDTH - 18, count=4)
    bottom = height - BOTTOM
    parts = []
    for value, text in x.ticks:
        at = number(x(value))
        kind = "reference" if value == 1 and unit else "grid"
        parts.append(el("line", x1=at, x2=at, y1=6, y2=number(bottom), cls=kind))
        parts.append(el("text", text, x=at, y=number(bottom + 17), cls="tick middle"))
    parts.append(el("text", f"{axis} →", x=WIDTH - 12, y=number(height - 3), cls="axis-title end"))
    rows = Scale(0, len(names) - 1, 6 + _ROW / 2, bottom - _ROW / 2)
    for i, name in enumerate(names):
        shown = name if len(name) <= letters else "…" + name[1 - letters :]
        parts.append(
            el(
                "text",
                shown,
                el("title", name),
                x=number(left - 10),
                y=number(rows(i)),
                dy="0.32em",
                cls="row-name end",
            )
        )
        parts.append(el("line", x1=number(left), x2=WIDTH - 12, y1=number(rows(i)), y2=number(rows(i)), cls="grid"))
    for cell in sorted(view.done, key=lambda c: c in view.chosen):
        parts.append(_cell_dots(cell, cell in view.chosen, names, values, x, rows, unit))
    described = f"{axis} by {'kind of prompt' if unit else 'prompt'}, {len(names)} rows"
    return svg(parts, described, height)


def _cell_dots(
    cell: Cell,
    on: bool,
    names: Sequence[str],
    values: Mapping[tuple[int, str], float],
    x: Scale,
    rows: Scale,
    unit: str,
) -> Markup:
    dots = []
    for i, name in enumerate(names):
        value = values.get((cell.index, name))
        if value is not None:
            said = f"{cell.label}\n{name}: {value:.2f}{unit or ' tokens per round'}"
            hit = el("circle", el("title", said), cx=number(x(value)), cy=number(rows(i)), r=9, cls="hit")
            dots.append(el("g", mark(x(value), rows(i), cell.colour, cls="mark"), hit))
    return el("g", dots, cls=f"series c{cell.colour % 8}{' on' if on else ''}", data_cell=cell.index)
