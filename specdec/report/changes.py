"""What differs between two cells of the same setting: acceptance, speed-up, identity.

Shapes: P prompts, C pairs of cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specdec.report.evidence import (
    Array,
    judge,
    mean_interval,
    pseudo_values,
    relative_interval,
    smallest_visible,
)
from specdec.report.pairs import Cell, Match, counts

SAME, REAL, BEYOND, WITHIN, TOO_FEW = "same", "real", "beyond noise", "within noise", "too few prompts"
LEVEL = 0.05
# Two runs of the same thing, hours apart, differ by more than their prompts do: the machine is not the same.
MIN_SPEED = 0.05


@dataclass(frozen=True)
class Acceptance:
    """Accepted tokens per round (mean acceptance length - 1) on the common prompts.

    `change` is relative, [low, high] its 95 % bootstrap interval over prompts; `adjusted` is the p-value for all
    cells together; `visible` the relative change that would have been called with 80 % chance (None: none would).
    """

    before: float
    after: float
    change: float | None
    low: float | None
    high: float | None
    p: float
    adjusted: float
    visible: float | None
    verdict: str


@dataclass(frozen=True)
class Speed:
    """Speed-up over the plain loop: the geometric mean over common prompts of after / before."""

    before: float
    after: float
    ratio: float
    low: float
    high: float
    p: float
    adjusted: float
    verdict: str


@dataclass(frozen=True)
class Identity:
    """Texts that were those of plain decoding. `lost`, `won`: prompts; `bugs`: of `after`, no tie explains them."""

    expected: bool
    before: int
    after: int
    lost: tuple[str, ...]
    won: tuple[str, ...]
    bugs: tuple[str, ...]

    @property
    def alarm(self) -> bool:
        return bool(self.lost or self.bugs)


def by_prompt(matches: Sequence[Match], values: Sequence[Array]) -> Array:
    """[P, C]: `values` of each pair of cells, [its prompts], in common rows; 0 where a pair lacks the prompt."""
    named = [
        {(match.after["setting"].get("prompt_set"), name): v for name, v in zip(match.names, column, strict=True)}
        for match, column in zip(matches, values, strict=True)
    ]
    names = list(dict.fromkeys(name for column in named for name in column))
    table = [[column.get(name, 0.0) for column in named] for name in names]
    return np.array(table, dtype=np.float64).reshape(len(names), len(named))


def judge_acceptance(matches: Sequence[Match], level: float) -> list[Acceptance]:
    sides = [(counts(before), counts(after)) for before, after in (match.sides for match in matches)]
    values = [pseudo_values(before, after) for before, after in sides]
    family = judge(by_prompt(matches, values), "both", level)
    found = []
    for i, (match, (before, after)) in enumerate(zip(matches, sides, strict=True)):
        same = all(a["rounds"] == b["rounds"] for a, b in zip(*match.sides, strict=True))
        visible = smallest_visible(values[i], family.critical, before.rate)
        adjusted = float(family.adjusted[i])
        if same:
            verdict = SAME
        elif match.certain:
            verdict = REAL
        elif adjusted <= level:
            verdict = BEYOND
        else:
            verdict = TOO_FEW if math.isinf(visible) else WITHIN
        low, high = relative_interval(before, after) if before.rate else (math.nan, math.nan)
        found.append(
            Acceptance(
                before=before.rate,
                after=after.rate,
                change=after.rate / before.rate - 1 if before.rate else None,
                low=None if math.isnan(low) else low,
                high=None if math.isnan(high) else high,
                p=float(family.p[i]),
                adjusted=adjusted,
                visible=None if same or math.isinf(visible) else visible,
                verdict=verdict,
            )
        )
    return found


def judge_speed(matches: Sequence[Match], level: float, least: float = MIN_SPEED) -> list[Speed | None]:
    """None where one of the two was not timed."""
    timed = [m for m in matches if all(row.get("speedup") for side in m.sides for row in side)]
    logs = [
        np.array([math.log(b["speedup"] / a["speedup"]) for a, b in zip(*match.sides, strict=True)]) for match in timed
    ]
    family = judge(by_prompt(timed, logs), "both", level)
    found: dict[int, Speed] = {}
    for i, (match, values) in enumerate(zip(timed, logs, strict=True)):
        before, after = (math.exp(np.mean([math.log(row["speedup"]) for row in side])) for side in match.sides)
        low, high = (math.exp(edge) for edge in mean_interval(values))
        ratio, adjusted = math.exp(float(values.mean())), float(family.adjusted[i])
        if adjusted <= level and abs(math.log(ratio)) >= math.log1p(least):
            verdict = BEYOND
        else:
            blind = bool(values.any()) and math.isinf(smallest_visible(values, family.critical, 1.0))
            verdict = TOO_FEW if blind else WITHIN
        found[id(match)] = Speed(before, after, ratio, low, high, float(family.p[i]), adjusted, verdict)
    return [found.get(id(match)) for match in matches]


def identity(match: Match) -> Identity:
    """Which texts are no longer, or newly, those of plain decoding."""
    a, b = match.sides
    lost = tuple(new["id"] for old, new in zip(a, b, strict=True) if old["identical"] and not new["identical"])
    won = tuple(new["id"] for old, new in zip(a, b, strict=True) if new["identical"] and not old["identical"])
    expected = bool(match.after["expects_identity"])
    known = {found["id"] for found in match.before.get("divergences", []) if found["verdict"] == "BUG"}
    bugs = [found["id"] for found in match.after.get("divergences", []) if found["verdict"] == "BUG"]
    return Identity(
        expected=expected,
        before=sum(row["identical"] for row in a),
        after=sum(row["identical"] for row in b),
        lost=lost if expected else (),
        won=won if expected else (),
        bugs=tuple(name for name in bugs if name not in known),
    )


def alarms_of(match: Match, found: Identity) -> list[str]:
    alarms = []
    if found.lost:
        alarms.append(
            f"identity lost on {listed(found.lost)}: {found.before} → {found.after} texts are plain decoding's"
        )
    if found.bugs:
        alarms.append(f"a difference that no tie explains (BUG) on {listed(found.bugs)}")
    if match.before["expects_identity"] and not match.after["expects_identity"]:
        alarms.append("texts used to be those of plain decoding, and no longer have to be")
    was, now = match.before["stats"], match.after["stats"]
    if was.get("lossless", True) and not now.get("lossless", True):
        alarms.append("used to be lossless")
    if now.get("drafter_error") and not was.get("drafter_error"):
        alarms.append(f"the drafter failed: {now['drafter_error']}")
    return alarms


def listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def failure(cell: Cell) -> str:
    error = cell.get("error") or {}
    return f"{error.get('type', 'error')}: {error.get('message', '')}".strip()
