"""HTML and SVG elements in which whatever is not markup already is escaped: by construction, not by care."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = frozenset({"br", "circle", "hr", "input", "line", "link", "meta", "path", "rect", "use"})
# What a page cannot hold: control characters but tabs and line feeds, which get their pictures; halves of characters.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: Any) -> Markup:
    """Any value as text of a page, in elements and in attributes alike."""
    if isinstance(text, Markup):
        return text
    shown = _CONTROL.sub(lambda found: chr(0x2400 + ord(found[0]) if found[0] != "\x7f" else 0x2421), str(text))
    return Markup(html.escape(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", shown), quote=True))


def joined(parts: Iterable[Any]) -> Markup:
    """One piece after the other; None is nothing, and lists are flattened."""
    found: list[str] = []
    for part in parts:
        if part is None:
            continue
        found.append(joined(part) if isinstance(part, (list, tuple)) else escape(part))
    return Markup("".join(found))


def el(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """`el("td", "text", cls="number", data_cell=3)`; None and False leave an attribute out, True gives it no value."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = "class" if key == "cls" else key.rstrip("_").replace("_", "-")
        key = "viewBox" if key == "viewbox" else key
        written.append(f" {key}" if value is True else f' {key}="{escape(value)}"')
    opened = f"<{name}{''.join(written)}"
    if name in _VOID and not children:
        return Markup(f"{opened}>" if name in ("br", "hr", "input", "link", "meta") else f"{opened}/>")
    return Markup(f"{opened}>{joined(children)}</{name}>")


def number(value: float) -> str:
    """A coordinate, as short as a tenth of a pixel needs."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def finite(content: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def embedded(content: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no text in it can end the element or begin a comment."""
    text = json.dumps(finite(content), separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
