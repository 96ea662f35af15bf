"""Plugins by name, through entry points. The built-in ones are registered exactly as a third party's would be."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from specdec.errors import InputError, UnknownPluginError

GROUPS = {
    "drafter": "specdec.drafters",
    "verifier": "specdec.verifiers",
    "policy": "specdec.policies",
    "backend": "specdec.backends",
    "trainer": "specdec.trainers",
}


def available(kind: str) -> dict[str, EntryPoint]:
    """Name to entry point, sorted; two different packages that claim one name are an error."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUPS[kind]), key=lambda p: p.name):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise InputError(f"two packages register the {kind} {point.name!r}: {other.value} and {point.value}")
    return found


def find(kind: str, name: str) -> Any:
    """Load the class that is registered under `name`."""
    points = available(kind)
    if name not in points:
        near = difflib.get_close_matches(name, points, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(points)}"
        raise UnknownPluginError(f"no {kind} is called {name!r}; {hint}")
    return points[name].load()


def create(kind: str, value: Any, **options: Any) -> Any:
    """An object of the plugin called `value`, made with `options`; a value that is no name passes through."""
    return find(kind, value)(**options) if isinstance(value, str) else value
