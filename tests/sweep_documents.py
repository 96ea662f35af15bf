"""Documents of sweeps without a sweep: what a made-up machine would have measured, in the shape of real cells.

Cells are made by the code that makes real ones, out of rounds that are drawn at random: chains of k tokens, each
accepted with a probability of the drafter's, at costs that grow with the rows of a step. The same call gives the same
document.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any
from unittest import mock

from specdec.bench import comparison as measured
from specdec.bench.bare import BareCosts
from specdec.bench.comparison import PLAIN, SPECULATIVE, Comparison, Row, Timed
from specdec.bench.prompts import Prompt
from specdec.bench.timing import bootstrap
from specdec.errors import MemoryBudgetError
from specdec.generation import Generation
from specdec.sweep.cell import FORKED, done_cell, failed_cell
from specdec.sweep.setting import Setting
from specdec.trace import Round, Trace

# P(a drafted token is accepted) at temperature 0 and 1, and seconds of a drafted level.
DRAFTERS = {"model": (0.62, 0.5, 5e-4), "ngram": (0.72, 0.12, 4e-6), "eagle": (0.74, 0.55, 6e-4)}
STEP, ROW, OTHER = 3e-3, 2.5e-4, 1e-4
CATEGORIES = ("code", "prose", "edit")
ENVIRONMENT = {
    "versions": {"specdec": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    "device": "cpu",
    "processor": "a made-up processor",
    "threads": 1,
    "parameters": {"target": 13_400_000},
}
SPREAD = {
    "drafter": tuple(DRAFTERS),
    "k": (1, 2, 4, 8),
    "temperature": (0.0, 1.0),
    "verifier": ("coupled", "ratio"),
    "batch": (1, 4),
}


def settings(num_cells: int) -> list[Setting]:
    """The first `num_cells` settings of a grid: drafters and k vary fastest."""
    names = list(SPREAD)
    order = ["batch", "verifier", "temperature", "drafter", "k"]
    found = [
        Setting(**{name: values[order.index(name)] for name in names}, limit=3)
        for values in product(*(SPREAD[name] for name in order))
    ]
    if num_cells > len(found):
        found = [setting.changed(seed=seed) for seed in range(-(-num_cells // len(found))) for setting in found]
    return found[:num_cells]


def _rounds(setting: Setting, num_tokens: int, draw: random.Random) -> list[Round]:
    at_zero, at_one, level = DRAFTERS[setting.drafter]
    accept = at_zero + (at_one - at_zero) * min(setting.temperature, 1.0)
    rounds: list[Round] = []
    left = num_tokens
    while left > 0:
        k = min(setting.k or 4, left - 1)
        accepted = next((i for i in range(k) if draw.random() > accept), k)
        seconds = {"prefill": 0.0, "draft": k * level, "verify": STEP + k * ROW, "commit": 2e-5, "other": OTHER}
        rounds.append(Round(k, k, accepted, min(accepted + 1, k), accepted + 1, setting.drafter, None, seconds))
        left -= accepted + 1
    return rounds


def _generation(prompt: Sequence[int], tokens: Sequence[int], rounds: list[Round]) -> Generation:
    trace = Trace()
    trace.rounds, trace.num_tokens = rounds, len(tokens)
    return Generation(list(prompt), list(tokens), "", "length", ["target"] * len(tokens), None, trace)


def _timed(generation: Generation, draw: random.Random) -> Timed:
    seconds = sum(sum(r.seconds.values()) for r in generation.trace.rounds) * draw.uniform(0.98, 1.04)
    return Timed(tuple(generation.tokens), seconds, True, generation)


def _plain_rounds(num_tokens: int) -> list[Round]:
    seconds = {"prefill": 0.0, "draft": 0.0, "verify": STEP, "commit": 2e-5, "other": 5e-5}
    return [Round(num_emitted=1, drafter="none", seconds=dict(seconds)) for _ in range(num_tokens)]


def comparison(setting: Setting, num_prompts: int = 3, repetitions: int = 3, timed: bool = True) -> Comparison:
    """What such a setting would have measured, or without times: as `--acceptance-only` does."""
    draw = random.Random(f"{setting.key} {num_prompts}")
    rows = []
    for number in range(num_prompts):
        prompt = Prompt(f"prompt-{number}", "a text", CATEGORIES[number % len(CATEGORIES)])
        ids = list(range(10 + 7 * number))
        tokens = [draw.randrange(1000) for _ in range(setting.max_new_tokens)]
        rounds = _rounds(setting, len(tokens), draw)
        row = Row(prompt, len(ids))
        for _ in range(repetitions):
            row.runs.setdefault(PLAIN, []).append(_timed(_generation(ids, tokens, _plain_rounds(len(tokens))), draw))
            row.runs.setdefault(SPECULATIVE, []).append(_timed(_generation(ids, tokens, rounds), draw))
        rows.append(row)
    widths = {1: STEP, (setting.k or 4) + 1: STEP + (setting.k or 4) * ROW}
    return Comparison(
        rows=rows,
        baselines=[],
        costs=BareCosts(widths, DRAFTERS[setting.drafter][2] if setting.drafter != "ngram" else 0.0, 40),
        repetitions=repetitions,
        expects_identity=setting.temperature == 0 or setting.verifier == "coupled",
        num_slices=2 * num_prompts * repetitions,
        num_clean=2 * num_prompts * repetitions,
        watching=True,
        peak_memory={"process": 700 << 20},
        timed=timed,
    )


def story(setting: Setting, num_tokens: int = 12) -> list[dict[str, Any]]:
    """A coloured text: rounds of two drafted tokens and one of the target's."""
    words = ["def", " area", "(", "shape", "):", "\n", "    return", " shape", ".", "width", " *", " height"]
    tokens = []
    for i in range(num_tokens):
        drafted = i % 3 != 2
        tokens.append(
            {
                "text": words[i % len(words)],
                "origin": setting.drafter if drafted else "target",
                "round": i // 3,
                "p": 0.9 - 0.05 * (i % 5),
                "q": 0.8 - 0.1 * (i % 4) if drafted else None,
                "margin": 0.4 + 0.3 * (i % 3),
            }
        )
    return [{"prompt": "# a shape's area\n", "tokens": tokens}]


def cell(
    setting: Setting, *, failed: bool = False, with_story: bool = False, num_prompts: int = 3, timed: bool = True
) -> dict[str, Any]:
    return dict(json.loads(_cell(setting, failed, with_story, num_prompts, timed)))


@lru_cache(maxsize=1024)
def _cell(setting: Setting, failed: bool, with_story: bool, num_prompts: int, timed: bool) -> str:
    """As it comes out of a store: keys of tables are texts."""
    key = setting.keyed("made up")
    if failed:
        made = failed_cell(setting, key, MemoryBudgetError("the caches of a text do not fit"), 0.1)
    else:
        # Nobody needs exact intervals here, and everybody short tests.
        with mock.patch.object(measured, "bootstrap", partial(bootstrap, resamples=100)):
            made = done_cell(
                setting,
                key,
                comparison(setting, num_prompts, timed=timed),
                memory={"target_weights": 53_600_000, "draft_weights": 6_400_000, "kv": 1_300_000},
                timing={"prefill": FORKED, "measured": timed},
                story=story(setting) if with_story else None,
                seconds=2.5,
            )
    return json.dumps({**made, "when": "2026-01-02T03:04:05+00:00"})


def document(
    num_cells: int = 6, *, num_failed: int = 0, with_story: bool = True, num_prompts: int = 3, timed: bool = True
) -> dict[str, Any]:
    """A document of `num_cells` cells, the last `num_failed` of which failed; the first one has a story.

    Without `timed`, figures of speed are None.
    """
    cells = [
        cell(
            setting,
            failed=i >= num_cells - num_failed,
            with_story=with_story and i == 0,
            num_prompts=num_prompts,
            timed=timed,
        )
        for i, setting in enumerate(settings(num_cells))
    ]
    return {"schema": 1, "environment": json.loads(json.dumps(ENVIRONMENT)), "cells": cells}
