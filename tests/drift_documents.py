"""Small documents of cells whose acceptance is drawn: for tests of what differs by more than noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import sweep_documents

from specdec.sweep.setting import Setting

ENVIRONMENT = {"versions": {"specdec": "0.1.0", "torch": "2.13.0"}, "device": "cpu", "threads": 1}


def rates(num_prompts: int, mean: float = 0.7, spread: float = 0.1, seed: int = 0) -> np.ndarray:
    """[P] chances that a drafted token is accepted; prompts differ."""
    return np.clip(np.random.default_rng(seed).normal(mean, spread, num_prompts), 0.02, 0.98)


def rounds(rate: float, num_tokens: int, k: int, draw: np.random.Generator) -> dict[str, list[int]]:
    accepted = np.minimum(draw.geometric(1 - rate, size=num_tokens) - 1, k)
    used = accepted[: int(np.searchsorted(np.cumsum(accepted + 1), num_tokens)) + 1].tolist()
    return {
        "nodes": [k] * len(used),
        "accepted": used,
        "evaluated": [min(n + 1, k) for n in used],
        "emitted": [n + 1 for n in used],
    }


def cell(
    chances: Sequence[float], *, seed: int, num_tokens: int = 128, key: str = "same", speed: float = 1.5, **fields: Any
) -> dict[str, Any]:
    """A finished cell, one row for each of `chances`, its rounds drawn by `seed`."""
    setting = Setting(**{"k": 4, "seed": 0, "max_new_tokens": num_tokens, **fields})
    draw = np.random.default_rng(seed)
    rows = [
        {
            "id": f"p{i}",
            "category": "code",
            "num_prompt_tokens": 10 + i,
            "num_tokens": num_tokens,
            "identical": True,
            "speedup": speed * float(np.exp(draw.normal(0, 0.04))),
            "rounds": rounds(float(chance), num_tokens, setting.k or 4, draw),
        }
        for i, chance in enumerate(chances)
    ]
    return {
        "key": key,
        "setting": setting.as_dict(),
        "status": "done",
        "error": None,
        "prompts": len(rows),
        "repetitions": 3,
        "expects_identity": True,
        "divergences": [],
        "stats": {"lossless": True, "drafter_error": None},
        "rows": rows,
    }


@cache
def grid(num_prompts: int = 2) -> dict[str, Any]:
    """24 cells of a made-up machine: drafters, k = 1 and 4, temperatures 0 and 1, two verifiers. Not to be changed."""
    settings = [
        Setting(drafter=drafter, k=k, temperature=temperature, verifier=verifier)
        for temperature in (0.0, 1.0)
        for verifier in ("coupled", "ratio")
        for drafter in sweep_documents.DRAFTERS
        for k in (1, 4)
    ]
    cells = [sweep_documents.cell(setting, num_prompts=num_prompts) for setting in settings]
    return dict(json.loads(json.dumps(document(*cells))))


def document(*cells: Mapping[str, Any], **environment: Any) -> dict[str, Any]:
    return {"schema": 1, "environment": {**ENVIRONMENT, **environment}, "cells": list(cells)}


def failed(setting: Mapping[str, Any]) -> dict[str, Any]:
    error = {"type": "MemoryBudgetError", "message": "the caches do not fit"}
    return {"key": "same", "setting": dict(setting), "status": "failed", "error": error}
