"""Cells: what one setting gave, as plain dictionaries that JSON can say."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from specdec.bench.comparison import SPECULATIVE
from specdec.sweep.setting import Setting

if TYPE_CHECKING:
    from specdec.bench.comparison import Comparison, Row

# How `timing["prefill"]` says what timed calls did for their prompts.
FORKED, COMPUTED = "forked", "computed"


def done_cell(
    setting: Setting,
    key: str,
    comparison: Comparison,
    *,
    memory: Mapping[str, int] | None = None,
    timing: Mapping[str, Any] | None = None,
    quality: dict[str, Any] | None = None,
    story: list[dict[str, Any]] | None = None,
    seconds: float = 0.0,
) -> dict[str, Any]:
    """The cell of a finished comparison: its `as_dict`, and every row's rounds (of the first repetition).

    `memory`: bytes by `target_weights`, `draft_weights`, `kv`. `timing`: what timed calls include. `quality`: what
    the target makes of the prompts (`specdec.sweep.quality`).
    """
    measured = comparison.as_dict()
    measured["rows"] = [
        {**written, "rounds": _rounds(row)} for written, row in zip(measured["rows"], comparison.rows, strict=True)
    ]
    return {
        **_head(setting, key, "done"),
        **measured,
        "memory": dict(memory or {}),
        "timing": dict(timing or {"prefill": COMPUTED}),
        "quality": quality,
        "story": story,
        "when": now(),
        "cell_seconds": seconds,
    }


def failed_cell(setting: Setting, key: str, error: BaseException, seconds: float = 0.0) -> dict[str, Any]:
    """The cell of a setting that could not run."""
    message = " ".join(str(error).split()) or type(error).__name__
    head = _head(setting, key, "failed")
    return {**head, "error": {"type": type(error).__name__, "message": message}, "when": now(), "cell_seconds": seconds}


def _head(setting: Setting, key: str, status: str) -> dict[str, Any]:
    return {"key": key, "setting": setting.as_dict(), "label": setting.label(), "status": status, "error": None}


def _rounds(row: Row) -> dict[str, list[int]]:
    generation = row.runs[SPECULATIVE][0].generation
    rounds = generation.trace.rounds if generation is not None else []
    return {
        "nodes": [r.num_nodes for r in rounds],
        "accepted": [r.num_accepted for r in rounds],
        "evaluated": [r.num_evaluated for r in rounds],
        "emitted": [r.num_emitted for r in rounds],
    }


def now() -> str:
    """ISO 8601, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
