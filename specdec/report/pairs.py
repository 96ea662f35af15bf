"""Cells of two documents, paired by setting, and the prompts that both of a pair have.

A document is what `specdec sweep` stores and exports: `{"environment": {…}, "cells": [{"setting", "rows", …}, …]}`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.errors import InputError
from specdec.report.evidence import Counts

Cell = Mapping[str, Any]
Document = Mapping[str, Any]

# Policies whose rounds depend on nothing but tokens. Others read the clock, or are somebody else's.
_UNTIMED = frozenset({"fixed", "heuristic", "confidence", "fitted-tree", "dynamic-tree", "static-tree"})
_TIMED_DRAFTERS = ("hybrid",)


def label(setting: Mapping[str, Any]) -> str:
    """Short text for tables; of settings that this version does not know, their JSON."""
    from specdec.sweep.setting import Setting

    try:
        return Setting.of(setting).label()
    except InputError:
        return json.dumps(setting, sort_keys=True)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"versions": {"torch": …}}` as `{"versions.torch": …}`."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two trees of values, by dotted name; None where one lacks it."""
    a, b = flatten(before), flatten(after)
    names = [*a, *(name for name in b if name not in a)]
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}


def _newest(document: Document, which: str) -> tuple[list[Cell], list[str]]:
    """The newest cell of each setting, and a note for each that hid others.

    A store keeps cells of one setting apart by weights, prompts and the way of measuring; pairs know the setting alone.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in document.get("cells", []):
        groups.setdefault(json.dumps(cell["setting"], sort_keys=True), []).append(cell)
    kept, notes = [], []
    for group in groups.values():
        newest = max(reversed(group), key=lambda cell: str(cell.get("when") or ""))
        kept.append(newest)
        if len(group) > 1:
            notes.append(
                f"{which} has {len(group)} cells of {label(newest['setting'])} (other weights, prompts or repetitions, "
                f"timed or not): the newest counts, of {day(newest)}"
            )
    return kept, notes


def day(cell: Cell) -> str:
    """When a cell was made, to the minute."""
    return str(cell.get("when") or "an unknown date")[:16].replace("T", " ")


def made(document: Document, cells: Sequence[Cell]) -> str:
    """When the cells were made, and by which versions."""
    when = sorted({day(cell) for cell in cells if cell.get("when")})
    parts = [when[0] if len(when) == 1 else f"{when[0]} to {when[-1]}"] if when else []
    versions = [environment_of(document, cell).get("versions") or {} for cell in cells]
    for name in ("specdec", "torch"):
        known = sorted({str(one[name]) for one in versions if one.get(name)})
        parts += [f"{name} {' and '.join(known)}"] if known else []
    return ", ".join(parts)


def _indexed(cells: Sequence[Cell], ignored: Sequence[str], which: str) -> dict[str, Cell]:
    """Cells by setting, less what is ignored."""
    found: dict[str, Cell] = {}
    for cell in cells:
        setting = {name: value for name, value in cell["setting"].items() if name not in ignored}
        key = json.dumps(setting, sort_keys=True)
        if key in found:
            raise InputError(
                f"{which} has two cells that are alike without {', '.join(ignored)}: {label(cell['setting'])}; choose "
                "cells with --only, or ignore less"
            )
        found[key] = cell
    return found


def rows_by_prompt(cell: Cell) -> dict[str, Mapping[str, Any]]:
    """Rows by prompt. The same id with another length is another prompt; ids that repeat are counted."""
    found: dict[str, Mapping[str, Any]] = {}
    seen: Counter[str] = Counter()
    for row in cell["rows"]:
        name = f"{row['id']}/{row.get('num_prompt_tokens')}"
        seen[name] += 1
        found[name if seen[name] == 1 else f"{name}#{seen[name]}"] = row
    return found


def num_rounds(row: Mapping[str, Any]) -> int:
    """`InputError` for a row that does not list its rounds."""
    if "rounds" not in row:
        raise InputError(f"prompt {row.get('id')!r} does not list its rounds: make the document with specdec sweep")
    return len(row["rounds"]["accepted"])


def counts(rows: Iterable[Mapping[str, Any]]) -> Counts:
    """Accepted tokens and rounds of each row."""
    pairs = [(float(sum(row["rounds"]["accepted"])), float(num_rounds(row))) for row in rows]
    accepted, rounds = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return Counts(accepted, rounds)


def is_deterministic(setting: Mapping[str, Any]) -> bool:
    """Whether the rounds depend on nothing but models, setting and machine: no clock is read."""
    drafter = str(setting.get("drafter", ""))
    return setting.get("policy") in _UNTIMED and not drafter.startswith(_TIMED_DRAFTERS)


@dataclass
class Match:
    """A pair while it is being judged."""

    before: Cell
    after: Cell
    names: list[str]  # prompts of both, that made at least a round
    num_lacking: int  # prompts of the first that the second lacks, or that made rounds in the first alone
    certain: bool  # nothing that is recorded differs, and nothing is left to chance
    notes: list[str]

    def rows(self, cell: Cell) -> list[Mapping[str, Any]]:
        rows = rows_by_prompt(cell)
        return [rows[name] for name in self.names]

    @property
    def sides(self) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
        return self.rows(self.before), self.rows(self.after)


def match(before: Cell, after: Cell, same_environment: bool, ignored: Sequence[str]) -> Match:
    a, b = rows_by_prompt(before), rows_by_prompt(after)
    names = [name for name in a if name in b and num_rounds(a[name]) and num_rounds(b[name])]
    lacking = [name for name in a if name not in names and (name not in b or num_rounds(a[name]))]
    notes = []
    if len(names) < max(len(a), len(b)):
        notes.append(f"prompts {len(a)} and {len(b)}, {len(names)} in common")
    other_models = before.get("key") != after.get("key") and not ignored
    if other_models:
        notes.append("the same setting on other models or prompts (weights or files changed)")
    if before.get("repetitions") != after.get("repetitions"):
        notes.append(f"repetitions {before.get('repetitions')} and {after.get('repetitions')}")
    if ignored:
        moved = changed(*({n: c["setting"].get(n) for n in ignored} for c in (before, after)))
        notes += [f"{name}: {a} → {b}" for name, (a, b) in moved.items()]
    # What a setting left to the program: dtype, backend, numerics.
    chosen = changed(before.get("details") or {}, after.get("details") or {})
    notes += [f"{name}: {a} → {b}" for name, (a, b) in chosen.items()]
    timed = not is_deterministic(after["setting"])
    certain = same_environment and not ignored and not other_models and not chosen and not timed
    return Match(before, after, names, len(lacking), certain, notes)


def check_ignored(ignored: Sequence[str]) -> tuple[str, ...]:
    from specdec.sweep.setting import FIELDS

    unknown = [name for name in ignored if name not in FIELDS]
    if unknown:
        raise InputError(f"--ignore {unknown[0]}: settings have {', '.join(FIELDS)}")
    return tuple(ignored)


def environment_of(document: Document, cell: Cell) -> Mapping[str, Any]:
    """Where a cell was run: stores keep every place, exports of old may have one for all."""
    places: Mapping[Any, Mapping[str, Any]] = document.get("environments") or {}
    return places.get(cell.get("environment")) or document.get("environment") or {}


@dataclass(frozen=True)
class Paired:
    """`cells`: of both documents; `alone`: the first's that have no partner; `new`: labels of the second's.

    `environment[name]` = (before, after) of the documents, where they differ; `notes`: which cells were passed over;
    `made`: when and by which versions the first's and the second's cells were made.
    """

    cells: list[tuple[Cell, Cell]]
    alone: list[Cell]
    new: list[str]
    environment: dict[str, tuple[Any, Any]]
    notes: list[str]
    made: tuple[str, str]


def pair(before: Document, after: Document, ignored: Sequence[str] = ()) -> Paired:
    """Pair cells by their settings, less the fields `ignored`. `InputError` where that makes two settings alike.

    Of cells with one setting, the newest counts.
    """
    (olds, old_notes), (news, new_notes) = _newest(before, "the first document"), _newest(after, "the second document")
    a, b = _indexed(olds, ignored, "the first document"), _indexed(news, ignored, "the second document")
    return Paired(
        cells=[(a[key], b[key]) for key in a if key in b],
        alone=[a[key] for key in a if key not in b],
        new=[label(b[key]["setting"]) for key in b if key not in a],
        environment=changed(before.get("environment") or {}, after.get("environment") or {}),
        notes=old_notes + new_notes,
        made=(made(before, olds), made(after, [b[key] for key in a if key in b])),
    )


def matched(
    before: Document, after: Document, cells: Sequence[tuple[Cell, Cell]], ignored: Sequence[str]
) -> list[Match]:
    """A `Match` for each pair of finished cells."""
    return [match(a, b, not changed(environment_of(before, a), environment_of(after, b)), ignored) for a, b in cells]
