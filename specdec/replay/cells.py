"""Replayed settings as a document of cells, the shape that sweeps and reports read.

What a trace cannot know, times above all, is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from specdec.errors import InputError
from specdec.replay.engine import Replayed
from specdec.replay.recording import Recording
from specdec.sweep.cell import failed_cell, now
from specdec.sweep.setting import FIELDS, Setting, digest
from specdec.trace import Round, summarize

SCHEMA = 1
_UNKNOWN = ("plain", "speculative", "speedup", "ideal_speedup", "efficiency", "seconds", "bare_seconds", "quality")


def base_setting(recording: Recording) -> dict[str, Any]:
    """The fields of a setting that the recording fixes. Raises `InputError` for a header with other ones."""
    known = {name: value for name, value in recording.meta["setting"].items() if name in FIELDS}
    sampling = recording.meta["sampling"]
    texts = {name: sampling[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed") if name in sampling}
    found = {"drafter": recording.meta["drafter"], **known, **texts}
    Setting.of(found)
    return found


def identity(recording: Recording) -> str:
    """What tells recordings apart: models, and every token of the texts."""
    meta, arrays = recording.meta, recording.arrays
    return digest([meta["target"], meta.get("draft"), arrays["tokens_P"].tolist(), arrays["prompts_Q"].tolist()])


def cell(recording: Recording, setting: Setting, replayed: Replayed | InputError, trace: str) -> dict[str, Any]:
    """Of one setting: what was replayed, or why it could not be. `trace`: the recording's identity."""
    key = setting.keyed(["replay", trace])
    if isinstance(replayed, InputError):
        return failed_cell(setting, key, replayed)
    stats = replayed.stats.as_dict()
    stats.pop("seconds")
    rows = _rows(recording, replayed)
    return {
        "key": key,
        "setting": setting.as_dict(),
        "label": setting.label(),
        "status": "done",
        "error": None,
        "prompts": len(rows),
        "repetitions": replayed.repetitions,
        "identical": None,
        "expects_identity": None,
        "divergences": [],
        **dict.fromkeys(_UNKNOWN),
        "stats": stats,
        "peak_memory_bytes": {},
        "memory": {},
        "timing": {"measured": False},
        "slices": 0,
        "clean_slices": 0,
        "clean_means": "nothing was timed",
        "baselines": {},
        "rows": rows,
        "replayed": {
            "exact": replayed.exact,
            "bound": replayed.bound,
            "reasons": list(replayed.reasons),
            "predicted_speedup": replayed.speedup,
        },
        "story": None,
        "when": now(),
        "cell_seconds": 0.0,
    }


def first_walk(rounds: Sequence[Round], num_tokens: int) -> list[Round]:
    """Of walks over one text, one after the other, the first."""
    found: list[Round] = []
    while rounds and sum(r.num_emitted for r in found) < num_tokens:
        found.append(rounds[len(found)])
    return found


def _rows(recording: Recording, replayed: Replayed) -> list[dict[str, Any]]:
    rows = []
    names = recording.meta["prompts"]
    for name, text, rounds in zip(names, recording.texts, replayed.texts, strict=True):
        num_tokens = min(text.num_tokens, replayed.max_new_tokens)
        one = first_walk(rounds, num_tokens)
        rows.append(
            {
                "id": str(name),
                "category": "",
                "num_prompt_tokens": text.num_prompt_tokens,
                "num_tokens": num_tokens,
                "identical": None,
                "speedup": None,
                "tokens_per_second": None,
                "seconds": None,
                "mean_acceptance_length": summarize(rounds, 0).mean_acceptance_length,
                "rounds": {
                    "nodes": [r.num_nodes for r in one],
                    "accepted": [r.num_accepted for r in one],
                    "evaluated": [r.num_evaluated for r in one],
                    "emitted": [r.num_emitted for r in one],
                },
            }
        )
    return rows


def document(recording: Recording, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All cells, and where the texts were recorded."""
    meta = recording.meta
    names = ("versions", "device", "dtype", "backend", "numerics")
    return {"schema": SCHEMA, "environment": {name: meta.get(name) for name in names}, "cells": list(cells)}
