"""One self-contained page of a document: no network, no fonts of others, light and dark, the data inside."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.report import bars, panels, speed, summary, table, told
from specdec.report.markup import Markup, el, embedded, joined
from specdec.report.view import View

_STATIC = Path(__file__).with_name("static")
_NOWHERE = "base-uri 'none'; form-action 'none'"


@cache
def _static(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8").strip()


def _policy(script: str) -> str:
    """Nothing is loaded, and no script runs but ours: a text in the data cannot do harm, whatever it holds."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; {_NOWHERE}"


def _section(name: str, title: str, about: Any, content: Any, legend: Markup | None = None) -> Markup | None:
    if content is None:
        return None
    rail = el("div", el("h2", title, id=f"{name}-title"), el("p", about), legend, cls="rail")
    return el("section", rail, el("div", content, cls="content"), id=name, aria_labelledby=f"{name}-title")


def _sections(view: View) -> list[Markup | None]:
    legend, several, timed = panels.legend(view), len(view.done) > len(view.chosen), view.timed
    scatter, has_quality = panels.pareto(view)
    by_kind, by = bars.by_category(view)
    say = _Says(view)
    return [
        _section("settings", "Settings", say.settings(), table.table(view)),
        _section(
            "acceptance",
            "Acceptance by position",
            "How far into the draft the target agrees." + (" Chosen settings are in colour." if several else ""),
            panels.acceptance(view),
            legend,
        ),
        _section(
            "along",
            "Acceptance along the text",
            "Whether drafting gets easier or harder as the text grows, by stretches of 16 tokens.",
            panels.along_the_text(view),
            legend,
        ),
        _section(
            "speed",
            "Speed against k" if timed else "Length of rounds against k",
            "What more drafting brings." + (" Bars are 95 % intervals." if timed else " Nothing was timed."),
            speed.against_k(view),
            legend,
        ),
        _section("pareto", "Memory, quality, speed", say.pareto(has_quality), scatter, legend),
        _section("time", "Where the time goes", "Milliseconds per token by stage, all prompts.", bars.stages(view)),
        _section("prompts", "By kind of prompt" if by == "category" else "By prompt", say.prompts(), by_kind, legend),
        _section("text", "The text itself", "Who wrote which token. A bracket is a round.", told.stories(view)),
        _section("notes", "Notes", "What was timed, how sure it is, how to get it again.", summary.footnotes(view)),
    ]


class _Says:
    """Sentences that depend on what there is."""

    def __init__(self, view: View):
        self.view = view

    def settings(self) -> str:
        if len(self.view.cells) == 1:
            return "One setting, against plain decoding of the same prompts."
        choose = " Tick some to see them in colour below." if len(self.view.done) > len(self.view.chosen) else ""
        return f"{len(self.view.cells)} in the order in which they ran.{choose}"

    def pareto(self, has_quality: bool) -> str:
        quality = "" if has_quality else " Quality was not measured, so nothing is said about it."
        return "Pale: another setting is at least as good in both, and better in one." + quality

    def prompts(self) -> str:
        return "Each mark is a setting." + (" Point at one for its name." if len(self.view.done) > 1 else "")


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
