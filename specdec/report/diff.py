"""Two documents of cells, paired by setting: what differs, and whether by more than noise.

A document is what `specdec sweep` stores and exports: `{"environment": {…}, "cells": [{"setting", "rows", …}, …]}`.
Shapes: P prompts, C cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specdec.report.changes import (
    LEVEL,
    Acceptance,
    Identity,
    Speed,
    alarms_of,
    failure,
    identity,
    judge_acceptance,
    judge_speed,
)
from specdec.report.evidence import check_level
from specdec.report.pairs import Cell, Document, Match, check_ignored, label, matched, pair


@dataclass(frozen=True)
class Pair:
    """One setting in both documents. `notes`: what else is not the same. None where nothing could be compared."""

    label: str
    setting: dict[str, Any]
    num_prompts: int
    notes: tuple[str, ...]
    acceptance: Acceptance | None = None
    speed: Speed | None = None
    identity: Identity | None = None
    alarms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """`environment[name]` = (before, after), where they differ; `missing` and `new` are labels of unpaired cells.

    `notes`: which cells were passed over.
    """

    level: float
    ignored: tuple[str, ...]
    environment: dict[str, tuple[Any, Any]]
    pairs: list[Pair] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def alarms(self) -> list[tuple[Pair, str]]:
        """Identity lost, texts that a bug changed, cells that used to work."""
        return [(pair, alarm) for pair in self.pairs for alarm in pair.alarms]

    def count(self, part: str, *verdicts: str) -> int:
        found = [getattr(pair, part) for pair in self.pairs]
        return sum(one is not None and one.verdict in verdicts for one in found)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def diff(before: Document, after: Document, *, level: float = LEVEL, ignored: Sequence[str] = ()) -> Difference:
    """Compare two documents, setting by setting.

    `level`: the chance that anything at all is called although nothing but noise differs, for acceptance and speed
    each. `ignored`: fields of settings that may differ within a pair; everything else has to be equal, or the cells
    are `missing` and `new`. Raises `InputError` for documents that do not say enough.
    """
    check_level(level)
    found = pair(before, after, check_ignored(ignored))
    done = [both for both in found.cells if all(cell["status"] == "done" for cell in both)]
    matches = matched(before, after, done, ignored)
    usable = [match for match in matches if match.names]
    judged = zip(usable, judge_acceptance(usable, level), judge_speed(usable, level), strict=True)
    results = {id(match.after): _pair(*one) for one in judged for match in one[:1]}
    for match in matches:
        results.setdefault(id(match.after), _pair(match))
    pairs = [results.get(id(b)) or _unfinished(a, b) for a, b in found.cells]
    missing = [label(cell["setting"]) for cell in found.alone]
    return Difference(level, tuple(ignored), found.environment, pairs, missing, found.new, found.notes)


def _pair(match: Match, acceptance: Acceptance | None = None, speed: Speed | None = None) -> Pair:
    same = identity(match) if match.names else None
    return Pair(
        label=label(match.after["setting"]),
        setting=dict(match.after["setting"]),
        num_prompts=len(match.names),
        notes=tuple(match.notes),
        acceptance=acceptance,
        speed=speed,
        identity=same,
        alarms=tuple(alarms_of(match, same)) if same else (),
    )


def _unfinished(before: Cell, after: Cell) -> Pair:
    notes, alarms = [], []
    if before["status"] == "done":
        alarms.append(f"used to work, now fails: {failure(after)}")
    elif after["status"] == "done":
        notes.append(f"used to fail ({failure(before)}), now works")
    else:
        notes.append(f"fails in both: {failure(after)}")
    return Pair(label(after["setting"]), dict(after["setting"]), 0, tuple(notes), alarms=tuple(alarms))
