"""The text itself, its tokens coloured by who wrote them, its rounds in brackets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from specdec.report.markup import Markup, el
from specdec.report.view import NUM_COLOURS, Cell, View

TARGET = "target"
_PROMPT_LINES = 8
# What colours may stand for: the origin, or how doubtful a token was by one of its figures.
_TONES = (
    ("", "who wrote it"),
    ("p", "how unlikely to the target"),
    ("q", "how unlikely to the draft"),
    ("margin", "how near to a tie"),
)


def _origins(view: View) -> list[str]:
    """Drafters that wrote something, in the order of their appearance: each has a colour."""
    found: dict[str, None] = {}
    for cell in view.cells:
        for story in cell.story:
            found.update(dict.fromkeys(str(t.get("origin", TARGET)) for t in story.get("tokens") or ()))
    found.pop(TARGET, None)
    return list(found)


def _kind(token: Mapping[str, Any], origins: Sequence[str]) -> str:
    origin = str(token.get("origin", TARGET))
    if origin != TARGET:
        return f"drafted o{origins.index(origin) % NUM_COLOURS}"
    return "corrected" if token.get("refused") else "own"


def _token(number: int, token: Mapping[str, Any], origins: Sequence[str]) -> Markup:
    text = str(token.get("text", ""))
    classes = f"t {_kind(token, origins)}" + (" nl" if text.startswith("\n") else "") + ("" if text else " empty")
    return el("b", text, cls=classes, data_n=number)


def _ending(prompt: str) -> str:
    """The last lines of a long prompt: what follows them is what the page is about."""
    found = prompt.splitlines(keepends=True)
    left_out = len(found) - _PROMPT_LINES
    return prompt if left_out < 2 else f"… {left_out} more lines of prompt\n" + "".join(found[-_PROMPT_LINES:])


def _text(cell: Cell, which: int, story: Mapping[str, Any], origins: Sequence[str], shown: bool) -> Markup:
    tokens = [t for t in story.get("tokens") or () if isinstance(t, Mapping)]
    numbered = list(enumerate(tokens))
    rounds = []
    for _, members in groupby(numbered, key=lambda pair: pair[1].get("round")):
        rounds.append(el("span", [_token(n, t, origins) for n, t in members], cls="round"))
    prompt = el("span", _ending(str(story.get("prompt", ""))), cls="prompt")
    body = el(
        "div", prompt, rounds, cls="told", tabindex=0, role="application", data_story=f"{cell.index}-{which}",
        aria_label="text by token; arrow keys go from token to token", aria_describedby="reading",
    )  # fmt: skip
    return el("div", _counts(tokens, origins), body, cls="story", data_of=f"{cell.index}-{which}", hidden=not shown)


def _counts(tokens: Sequence[Mapping[str, Any]], origins: Sequence[str]) -> Markup:
    """The legend, with what each colour's share is."""
    total = max(len(tokens), 1)
    by_kind = Counter(_kind(token, origins) for token in tokens)
    entries = []
    for i, origin in enumerate(origins):
        count = by_kind.get(f"drafted o{i % NUM_COLOURS}", 0)
        if count:
            entries.append(el("li", el("b", "ab", cls=f"t drafted o{i % NUM_COLOURS}"), f" drafted by {origin} ",
                              el("small", f"{count / total:.0%}")))  # fmt: skip
    for kind, said in (("corrected", "target, where the draft was refused"), ("own", "target, nothing refused")):
        if by_kind.get(kind):
            entries.append(
                el("li", el("b", "ab", cls=f"t {kind}"), f" {said} ", el("small", f"{by_kind[kind] / total:.0%}"))
            )
    rounds = len({token.get("round") for token in tokens})
    entries.append(el("li", el("span", "ab", cls="round sample"), " a round ",
                      el("small", f"{rounds} of {len(tokens) / max(rounds, 1):.2f} tokens")))  # fmt: skip
    return el("ul", entries, cls="legend")


def stories(view: View) -> Markup | None:
    """Every recorded text; one is shown, a menu chooses among them."""
    having = sorted((c for c in view.cells if c.story), key=lambda c: (c is not view.best, c not in view.chosen))
    if not having:
        return None
    origins = _origins(view)
    options: list[Markup] = []
    blocks: list[Markup] = []
    for cell in having:
        for which, story in enumerate(cell.story):
            first_line = next((line for line in str(story.get("prompt", "")).splitlines() if line.strip()), "no prompt")
            name = f"{cell.label}: {first_line.strip()[:48]}"
            options.append(el("option", name, value=f"{cell.index}-{which}"))
            blocks.append(_text(cell, which, story, origins, shown=not blocks))
    chosen = el("label", el("span", "text"), el("select", options, id="which-story"))
    tones = [el("option", said, value=value) for value, said in _TONES]
    tone = el("label", el("span", "colours"), el("select", tones, id="tone"))
    chooser = el("div", chosen if len(options) > 1 else None, tone, cls="filters scripted")
    reading = el(
        "div",
        el("p", "Point at a token, tap it, or use the arrow keys.", cls="hint"),
        id="reading",
        cls="reading scripted",
        aria_live="polite",
    )
    return el("div", chooser, blocks, reading, cls="stories")


def colours(view: View) -> Markup:
    """The style of each drafter's tokens: the colour that its cells have elsewhere, where they have one."""
    rules = []
    for i, origin in enumerate(_origins(view)[:NUM_COLOURS]):
        colour = view.colours.index(origin) if origin in view.colours else i
        rules.append(f".o{i}{{--tone:var(--c{colour % NUM_COLOURS})}}")
    return Markup("".join(rules))
