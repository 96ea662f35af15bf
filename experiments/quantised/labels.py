"""Places for names beside the markers of a picture, so that nothing covers anything; used by `picture.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

Spot = tuple[float, float]
Box = tuple[float, ...]  # left, bottom, right, top in pixels


def boxes_overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def places(spot: Spot, width: float, height: float) -> Iterable[tuple[float, Box, str]]:
    """(cost, box, alignment) of where a label may be, around a marker at `spot` or further off with a line to it."""
    x, y = spot
    for distance in (8, 13, 20, 28, 38, 50):
        for degrees in range(0, 360, 15):
            dx, dy = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            align = "left" if dx > 0.3 else "right" if dx < -0.3 else "center"
            left = x + distance * dx - {"left": 0.0, "right": width, "center": width / 2}[align]
            bottom = y + distance * dy - height * (1 - dy) / 2
            cost = distance + (0 if dy >= 0 else 4) + (0 if degrees % 90 == 0 else 2)
            yield cost, (left, bottom, left + width, bottom + height), align


def leader(spot: Spot, box: Box) -> list[Spot]:
    """The ends of a line from a marker to its label; nothing where the label is beside it."""
    near = (min(max(spot[0], box[0]), box[2]), min(max(spot[1], box[1] + 2), box[3] - 2))
    return [near, spot] if math.dist(near, spot) > 11 else []


def along(ends: list[Spot]) -> list[Box]:
    """Small boxes on a line, without those at the marker."""
    if not ends:
        return []
    (x, y), (x_2, y_2) = ends
    count = int(math.dist(*ends) / 3)
    spots = [(x + (x_2 - x) * i / count, y + (y_2 - y) * i / count) for i in range(count - 2)]
    return [(a - 1.5, b - 1.5, a + 1.5, b + 1.5) for a, b in spots]


def label(axes: Any, columns: dict[str, tuple[str, list[Spot]]], taken: list[Box]) -> None:
    """Names columns of markers where the names cover no marker, line or other name, as near as that allows.

    `columns`: by name the colour and the markers in data units, above each other and joined by a line. `taken`: what
    else must not be covered, in pixels. The figure has been drawn, and its limits stay.
    """
    renderer = axes.figure.canvas.get_renderer()
    bounds = axes.get_window_extent(renderer)
    spots = {name: [tuple(axes.transData.transform(one)) for one in some] for name, (_, some) in columns.items()}
    solid = list(taken)
    for some in spots.values():
        heights = [y for _, y in some]
        solid += [(x - 5, y - 5, x + 5, y + 5) for x, y in some]
        solid.append((some[0][0] - 1, min(heights), some[0][0] + 1, max(heights)))
    style = {"fontsize": 8.8, "transform": None, "va": "center"}
    texts = {name: axes.text(0, 0, name, color=colour, **style) for name, (colour, _) in columns.items()}
    sizes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    chosen: dict[str, tuple[Box, str, Spot]] = {}
    for _ in range(4):  # each in turn to its best place given the others'
        for name in texts:
            there = [(box, along(leader(spot, box))) for other, (box, _, spot) in chosen.items() if other != name]
            boxes, lines = [box for box, _ in there], [one for _, line in there for one in line]
            best = math.inf
            for spot in sorted(spots[name], key=lambda spot: -spot[1]):
                for cost, box, align in places(spot, sizes[name].width + 2, sizes[name].height):
                    if box[0] < bounds.x0 or box[2] > bounds.x1 + 20 or box[1] < bounds.y0 or box[3] > bounds.y1:
                        continue
                    if cost < best:
                        cost += 20 * sum(boxes_overlap(box, one) for one in solid + boxes + lines)
                        line = along(leader(spot, box)) if cost < best else []
                        cost += 20 * sum(boxes_overlap(piece, one) for piece in line for one in solid + boxes + lines)
                    if cost < best:
                        best, chosen[name] = cost, (box, align, spot)
    for name, (box, align, spot) in chosen.items():
        x = {"left": box[0] + 1, "right": box[2] - 1, "center": (box[0] + box[2]) / 2}[align]
        texts[name].set(x=x, y=(box[1] + box[3]) / 2, ha=align)
        if ends := leader(spot, box):
            line = axes.transData.inverted().transform(ends).T
            axes.plot(*line, color=columns[name][0], lw=0.6, alpha=0.6, zorder=1, clip_on=False)
