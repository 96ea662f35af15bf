"""Has acceptance or identity fallen below a stored reference? For other people's continuous integration.

A cell has three outcomes, for a test that cannot fail says nothing. With the tolerance t, the share of the reference's
accepted tokens per round that may be lost:

* `fail`: identity is lost; or a loss of more than t is shown, at the level for all cells together. If nothing has
  fallen by more than t, the chance that any cell fails is at most the level.
* `pass`: the rounds are the same; or a loss of t or more is excluded at the level. If some cell has fallen by t or
  more, the chance that all pass is at most the level.
* `not enough data`: neither is shown, or prompts of the reference were not run. What loss would have been seen, and
  how many prompts decide, is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from specdec.errors import InputError
from specdec.report.changes import LEVEL, SAME, alarms_of, by_prompt, failure, identity
from specdec.report.evidence import POWER, Array, check_level, judge, pseudo_values, smallest_visible
from specdec.report.pairs import Document, Match, check_ignored, counts, label, matched, pair

PASS, FAIL, UNDECIDED = "pass", "fail", "not enough data"
TOLERANCE = 0.05
# Shells know these: the worst outcome of all cells.
EXIT_CODES = {PASS: 0, FAIL: 1, UNDECIDED: 2}


@dataclass(frozen=True)
class Judged:
    """One cell of the reference.

    `before`, `after`: accepted tokens per round; `p_fall`: of a loss beyond the tolerance (adjusted for all cells);
    `p_kept`: of a loss that is smaller; `visible`: the smallest relative loss that would have failed with 80 %
    chance (None: none would); `prompts_needed`: for 80 % chance of a pass where nothing has changed.
    """

    label: str
    outcome: str
    reason: str
    setting: dict[str, Any]
    num_prompts: int = 0
    num_rounds: int = 0
    notes: tuple[str, ...] = ()
    before: float | None = None
    after: float | None = None
    p_fall: float | None = None
    p_kept: float | None = None
    visible: float | None = None
    prompts_needed: int | None = None

    @property
    def change(self) -> float | None:
        return self.after / self.before - 1 if self.before and self.after is not None else None


@dataclass(frozen=True)
class Gate:
    """All cells of the reference; `extra` are cells that it does not know and that were not looked at.

    `made`: when and by which versions the cells of the reference, and those that were judged, were made; `notes`:
    which cells were passed over.
    """

    tolerance: float
    level: float
    environment: dict[str, tuple[Any, Any]]
    cells: list[Judged]
    extra: list[str]
    made: tuple[str, str] = ("", "")
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        found = {cell.outcome for cell in self.cells}
        return next(outcome for outcome in (FAIL, UNDECIDED, PASS) if outcome in found)

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.outcome]

    def as_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "exit_code": self.exit_code, **asdict(self)}


def gate(
    reference: Document,
    now: Document,
    *,
    tolerance: float = TOLERANCE,
    level: float = LEVEL,
    ignored: Sequence[str] = (),
) -> Gate:
    """Judge every cell of `reference` by its partner in `now`, paired by setting (less `ignored`) and by prompt.

    Raises `InputError` when the reference has no finished cell, or its rows no rounds.
    """
    check_level(level)
    if not 0 <= tolerance < 1:
        raise InputError(f"--tolerance is a share of the reference's accepted tokens, 0 <= it < 1, not {tolerance:g}")
    known = [cell for cell in reference["cells"] if cell["status"] == "done"]
    if not known:
        raise InputError("the reference has no finished cell: there is nothing to fall below")
    found = pair({**reference, "cells": known}, now, check_ignored(ignored))
    failed = [b for _, b in found.cells if b["status"] != "done"]
    matches = matched(reference, now, [both for both in found.cells if both[1]["status"] == "done"], ignored)
    judged = _judge(matches, tolerance, level)
    judged += [_alone(b["setting"], FAIL, f"used to work, now fails: {failure(b)}") for b in failed]
    judged += [_alone(a["setting"], UNDECIDED, "was not run") for a in found.alone]
    return Gate(tolerance, level, found.environment, judged, found.new, found.made, tuple(found.notes))


def _alone(setting: Any, outcome: str, reason: str) -> Judged:
    return Judged(label(setting), outcome, reason, dict(setting))


def _judge(matches: Sequence[Match], tolerance: float, level: float) -> list[Judged]:
    usable = [match for match in matches if match.names]
    sides = [(counts(before), counts(after)) for before, after in (match.sides for match in usable)]
    values = [pseudo_values(before, after, keep=1 - tolerance) for before, after in sides]
    table = by_prompt(usable, values)
    fall, kept = judge(table, "lower", level), judge(table, "upper", level)
    judged = [
        _alone(m.after["setting"], UNDECIDED, f"no prompt in common ({'; '.join(m.notes)})")
        for m in matches
        if not m.names
    ]
    for i, (match, (before, after)) in enumerate(zip(usable, sides, strict=True)):
        p_fall, p_kept = float(fall.adjusted[i]), float(kept.p[i])
        seen = tolerance + smallest_visible(values[i], fall.critical, before.rate)
        outcome, reason = _outcome(match, before.rate, after.rate, p_fall, p_kept, level)
        judged.append(
            Judged(
                label=label(match.after["setting"]),
                outcome=outcome,
                reason=reason,
                setting=dict(match.after["setting"]),
                num_prompts=len(match.names),
                num_rounds=int(after.rounds.sum()),
                notes=tuple(match.notes),
                before=before.rate,
                after=after.rate,
                p_fall=p_fall,
                p_kept=p_kept,
                visible=None if seen >= 1 or reason == SAME else seen,
                prompts_needed=None
                if outcome != UNDECIDED or match.num_lacking
                else _needed(values[i], tolerance * before.rate, level),
            )
        )
    return judged


def _outcome(match: Match, before: float, after: float, p_fall: float, p_kept: float, level: float) -> tuple[str, str]:
    alarms = alarms_of(match, identity(match))
    if alarms:
        return FAIL, "; ".join(alarms)
    if match.num_lacking and not (before and p_fall <= level):
        return UNDECIDED, f"{match.num_lacking} of the reference's {len(match.before['rows'])} prompts were not run"
    same = all(a["rounds"] == b["rounds"] for a, b in zip(*match.sides, strict=True))
    if same and (before or match.after["setting"].get("drafter") == "none"):
        return PASS, SAME
    if not before:
        return UNDECIDED, "the reference accepts nothing, so nothing can be lost: choose another setting"
    if p_fall <= level:
        return FAIL, f"acceptance fell by {1 - after / before:.1%}"
    if p_kept <= level:
        return PASS, "a loss beyond the tolerance is excluded"
    return UNDECIDED, "neither a loss beyond the tolerance nor its absence is shown"


def _needed(values: Array, margin: float, level: float) -> int | None:
    """Prompts like these for 80 % chance to exclude a loss of `margin` when nothing is lost."""
    if len(values) < 2 or margin <= 0:
        return None
    z = NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(POWER)
    return max(len(values), math.ceil((z * float(values.std(ddof=1)) / margin) ** 2))
