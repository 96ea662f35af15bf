"""One self-contained page of a document: no network, no fonts of others, light and dark, the data inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.report import bars, panels, summary, table, told
from specdec.report.markup import Markup, el, embedded, joined
from specdec.report.view import View

_STATIC = Path(__file__).with_name("static")


@cache
def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8").strip()


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but ours: a text in the data cannot do harm, whatever it holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _section(name: str, title: str, about: Any, content: Any, legend: Markup | None = None) -> Markup | None:
    if content is None:
        return None
    rail = el("div", el("h2", title, id=f"{name}-title"), el("p", about), legend, cls="rail")
    return el("section", rail, el("div", content, cls="content"), id=name, aria_labelledby=f"{name}-title")


def _sections(view: View) -> list[Markup | None]:
    legend = panels.legend(view)
    several = len(view.done) > len(view.chosen)
    choose = " Tick settings in the table to see others in colour." if several else ""
    scatter, has_quality = panels.pareto(view)
    quality = "" if has_quality else " Quality was not measured here, so nothing is said about it."
    by_kind, by = bars.by_category(view)
    against = "times the plain loop" if view.timed else "tokens per round: nothing was timed"
    return [
        _section(
            "settings", "Settings", f"{len(view.cells)} in the order in which they ran." + choose
            if len(view.cells) > 1 else "One setting, against plain decoding of the same prompts.",
            table.table(view), None,
        ),
        _section(
            "acceptance", "Acceptance by position",
            "How far into the draft the target agrees." + (" Chosen settings are in colour, all others pale." if several else ""),
            panels.acceptance(view), legend,
        ),
        _section(
            "along", "Acceptance along the text",
            "Whether drafting gets easier or harder as the text grows; by stretches of 16 tokens, all prompts together.",
            panels.along_the_text(view), legend,
        ),
        _section(
            "speed", "Speed against k" if view.timed else "Length of rounds against k",
            f"What more drafting brings: {against}." + (" Bars are 95 % intervals." if view.timed else ""),
            panels.against_k(view), legend,
        ),
        _section(
            "pareto", "Memory, quality, speed",
            "Pale: another setting is at least as good in both, and better in one." + quality, scatter, legend,
        ),
        _section(
            "time", "Where the time goes", "Milliseconds per token by stage, all prompts together.", bars.stages(view)
        ),
        _section(
            "prompts", "By kind of prompt" if by == "category" else "By prompt",
            "Each mark is a setting." + (" Point at one for its name." if len(view.done) > 1 else ""), by_kind, legend,
        ),
        _section(
            "text", "The text itself", "Who wrote which token. A bracket is a round: what one forward of the target gave.",
            told.stories(view),
        ),
        _section("notes", "Notes", "What was timed, how sure it is, and how to get it again.", summary.footnotes(view)),
    ]  # fmt: skip


def _bar(title: str) -> Markup:
    buttons = [
        el("button", "data", type="button", id="save", title="save all numbers as JSON"),
        el("button", "light / dark", type="button", id="theme", title="change between light and dark"),
    ]
    return el("header", el("p", title), el("div", buttons, cls="buttons scripted"), cls="bar-top")


def render(document: Mapping[str, Any], title: str | None = None) -> str:
    """The page as text; see `write`."""
    view = View(document)
    title = title or str(document.get("title") or "specdec report")
    script = _static("page.js")
    head = el(
        "head",
        Markup('<meta charset="utf-8">'),
        el("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{title} · {summary.headline(view)}"),
        el("style", Markup(_static("page.css") + told.colours(view))),
    )
    data = el("script", embedded(document), type="application/json", id="data")
    body = el(
        "body",
        el("a", "to the settings", href="#settings", cls="skip"),
        _bar(title),
        el("main", summary.summary(view), _sections(view)),
        el("div", id="tip", role="tooltip", hidden=True),
        data,
        el("script", Markup(script)),
    )
    return joined([Markup("<!doctype html>\n"), el("html", head, body, lang="en"), "\n"])


def write(document: Mapping[str, Any], path: str | Path, title: str | None = None) -> Path:
    """Write one HTML file that shows `document` (`environment` and `cells`, as `load_document` gives them).

    It works from the file system, without network and, but for sorting, choosing and hovering, without scripts.
    Returns the path. Raises `InputError` for a document without cells, and for a place that cannot be written to.
    """
    page, path = render(document, title), Path(path)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write the report to {path}: {error.strerror}") from error
    return path
