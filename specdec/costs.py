"""The cost of a forward by its number of rows, between and beyond the widths that were measured."""

from __future__ import annotations

from collections.abc import Mapping


def cost_at(known: Mapping[int, float], width: int) -> float:
    """Seconds of `width` rows: linear between measured widths; beyond the widest, along the line from the narrowest.

    Below the narrowest it is constant: one row is never dearer than several, and how much cheaper is not known.
    """
    widths = sorted(known)
    if width <= widths[0]:
        return known[widths[0]]
    upper = next((w for w in widths if w >= width), widths[-1])
    lower = max((w for w in widths if w < upper), default=upper)
    if width > upper:
        lower = widths[0]
    if lower == upper:
        return known[upper]
    slope = (known[upper] - known[lower]) / (upper - lower)
    if width > upper:
        return known[upper] + max(slope, 0.0) * (width - upper)
    return known[lower] + slope * (width - lower)
