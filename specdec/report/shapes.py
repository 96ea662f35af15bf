"""What a plot is made of, whoever draws it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spot:
    """A value, and where it lies with 95 % confidence, if that is known; `name` is written beside it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    name: str = ""


@dataclass(frozen=True)
class Line:
    """Spots of one colour, from left to right; `joined` by a line, or each for itself."""

    name: str
    slot: int
    spots: list[Spot]
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    title: str
    lines: list[Line]


@dataclass(frozen=True)
class Plot:
    """Panels that share their axes. `ticks`: of x, where those are no numbers of its scale; `reference`: a level;
    `left_out`: panels that would have compared nothing, where others do."""

    kind: str
    title: str
    x_title: str
    y_title: str
    panels: list[Panel]
    names: list[str]  # by slot
    ticks: list[tuple[float, str]] = field(default_factory=list)
    reference: tuple[float, str] | None = None
    is_share: bool = False
    left_out: int = 0

    @property
    def spots(self) -> list[Spot]:
        return [spot for panel in self.panels for line in panel.lines for spot in line.spots]

    @property
    def x_span(self) -> tuple[float, float]:
        xs = [x for x, _ in self.ticks] + [spot.x for spot in self.spots]
        return min(xs), max(xs)

    @property
    def y_span(self) -> tuple[float, float]:
        """With all intervals and the reference."""
        if self.is_share:
            return 0.0, 1.0
        ends = [end for s in self.spots for end in (s.y, s.low, s.high) if end is not None]
        ends += [self.reference[0]] if self.reference else []
        low, high = min(ends), max(ends)
        return (low, high) if high > low else (low - 0.5, high + 0.5)


@dataclass(frozen=True)
class Heat:
    """Tokens per round by temperature (columns) and verifier (rows), one map for whatever else varies."""

    title: str
    maps: list[tuple[str, dict[tuple[str, str], float]]]
    rows: list[str]
    columns: list[str]

    @property
    def span(self) -> tuple[float, float]:
        values = [value for _, one in self.maps for value in one.values()]
        return min(values), max(values)
