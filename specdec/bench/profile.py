"""Where a round's time goes: by stage, against the bare forwards; and by function."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.bench.runbench import Bench
from specdec.costs import cost_at
from specdec.trace import STAGES

_NUM_FUNCTIONS = 15


def profile(bench: Bench, name: str, prompt: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of a round by stage, from the timed texts; the functions with the most own time, from one more text.

    The profiler slows Python down, so `functions` tells what to look at, and `stages` what it costs.
    """
    method, rounds = bench.method(name), bench.rounds(name)
    costs = bench.probes[method.backend or ""].costs
    draft = costs.draft if method.drafter == "model" else 0.0
    bare = {
        "draft": sum(draft * r.depth_proposed for r in rounds),
        "verify": sum(cost_at(costs.target, r.num_nodes + 1) for r in rounds),
    }
    stages = []
    for stage in STAGES[1:]:  # the prefill belongs to no round
        seconds = sum(r.seconds[stage] for r in rounds)
        stages.append(
            {
                "stage": stage,
                "ms_per_round": 1e3 * seconds / len(rounds),
                "bare_ms_per_round": 1e3 * bare.get(stage, 0.0) / len(rounds),
            }
        )
    return {"row": name, "rounds": len(rounds), "stages": stages, "functions": _functions(bench, name, prompt)}


def _functions(bench: Bench, name: str, prompt: Sequence[int]) -> list[dict[str, Any]]:
    recorder = cProfile.Profile()
    made = recorder.runcall(bench.method(name).run, prompt)
    table: Any = pstats.Stats(recorder)
    found = [
        {
            "function": _label(*where),
            "calls_per_round": calls / max(made.steps, 1),
            "own_ms_per_round": 1e3 * own / max(made.steps, 1),
        }
        for where, (_, calls, own, _, _) in table.stats.items()
    ]
    return sorted(found, key=lambda line: -float(line["own_ms_per_round"]))[:_NUM_FUNCTIONS]


def _label(file: str, line: int, function: str) -> str:
    """`session.py:92 forward`; built-in functions have no file."""
    return function if file == "~" else f"{Path(file).name}:{line} {function}"
