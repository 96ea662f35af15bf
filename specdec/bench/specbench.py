"""Spec-Bench's figures (Xia et al. 2024, arXiv:2401.07851) from the rows of a comparison.

As the benchmark defines them: mean accepted tokens (MAT) are pooled over all target steps of a task, the target's own
token included, so that plain decoding has 1.00; tokens per second are averaged over questions, a question's being all
new tokens of its turns over all their seconds; a speed-up is the ratio of two such averages, and Overall pools all
questions. Beside each speed-up stands an interval that resamples questions in pairs, which the benchmark does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench.comparison import PLAIN, SPECULATIVE
from specdec.bench.specbench_tasks import COLUMNS, MT_BENCH, is_spec_bench, task_of

if TYPE_CHECKING:
    from specdec.bench.comparison import Comparison

OVERALL = "overall"
_RESAMPLES = 2000

# Speed-ups of the six tasks, MAT, overall speed-up: Vicuna-7B-v1.3 in float16, one A100 80 GB, temperature 0.
PUBLISHED: dict[str, tuple[float, ...]] = {
    "SAMD[EAGLE2]": (3.30, 2.01, 3.19, 2.36, 2.96, 2.52, 4.58, 2.73),
    "EAGLE2": (2.84, 1.88, 2.34, 2.15, 2.79, 2.13, 4.34, 2.36),
    "Recycling": (2.37, 2.02, 2.27, 2.08, 2.53, 2.02, 2.73, 2.22),
    "EAGLE": (2.45, 1.77, 2.08, 1.93, 2.44, 1.87, 3.58, 2.10),
    "Hydra": (2.43, 1.89, 1.83, 1.97, 2.45, 1.80, 3.26, 2.07),
    "Medusa": (1.97, 1.65, 1.57, 1.65, 1.94, 1.49, 2.31, 1.71),
    "PLD": (1.60, 1.06, 2.66, 1.19, 1.62, 1.86, 1.75, 1.66),
    "SpS (68M draft)": (1.66, 1.13, 1.71, 1.50, 1.47, 1.66, 2.28, 1.52),
    "REST": (1.63, 1.31, 1.36, 1.66, 1.21, 1.73, 1.82, 1.48),
    "Lookahead": (1.47, 1.14, 1.36, 1.25, 1.57, 1.22, 1.64, 1.34),
}
PUBLISHED_ON = "Vicuna-7B-v1.3, float16, one A100 80 GB, torch 2.5.1: other models and other hardware"


@dataclass(frozen=True)
class Figures:
    """Of one task, or of all. Rates are tokens per second; figures of speed are None where no time was measured."""

    num_questions: int
    num_turns: int
    num_cut: int  # turns whose prompt was cut to fit
    mean_accepted: float  # tokens per target step, the target's own included
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    plain_rate: float | None = None
    speculative_rate: float | None = None


@dataclass(frozen=True)
class SpecBench:
    """`tasks`: those of the six that were measured, in the benchmark's order, by name in the file."""

    tasks: dict[str, Figures]
    overall: Figures

    def as_dict(self) -> dict[str, Any]:
        return {"tasks": {name: asdict(one) for name, one in self.tasks.items()}, OVERALL: asdict(self.overall)}


def concerns(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows of a cell are Spec-Bench's, or MT-Bench's alone."""
    categories = {str(row.get("category", "")) for row in rows}
    return bool(categories) and (is_spec_bench(categories) or categories <= set(MT_BENCH))


def _rates(rows: Sequence[Mapping[str, Any]], method: str) -> np.ndarray:
    """Tokens per second, `[questions, repetitions]`: all turns of a question together."""
    questions: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        questions.setdefault(str(row.get("question", row["id"])), []).append(row)
    found = []
    for turns in questions.values():
        seconds = np.array([turn["seconds"][method] for turn in turns], dtype=float)
        tokens = np.array([_tokens(turn, method, seconds.shape[1]) for turn in turns], dtype=float)
        found.append(tokens.sum(0) / seconds.sum(0))
    return np.stack(found)


def _tokens(row: Mapping[str, Any], method: str, repetitions: int) -> list[int]:
    made = row.get("tokens")
    return list(made[method]) if made is not None else [int(row["num_tokens"])] * repetitions


def _interval(plain: np.ndarray, speculative: np.ndarray) -> tuple[float, float]:
    """95 % of the ratio of means: questions are drawn with replacement, then a repetition of each, for both methods
    the same ones.
    """
    draw = np.random.default_rng(0)
    size = (_RESAMPLES, len(plain))
    which = draw.integers(plain.shape[0], size=size), draw.integers(plain.shape[1], size=size)
    low, high = np.quantile(speculative[which].mean(1) / plain[which].mean(1), [0.025, 0.975])
    return float(low), float(high)


def _figures(rows: Sequence[Mapping[str, Any]]) -> Figures:
    accepted = [n for row in rows for n in row["rounds"]["accepted"]]
    counts = {
        "num_questions": len({str(row.get("question", row["id"])) for row in rows}),
        "num_turns": len(rows),
        "num_cut": sum(bool(row.get("num_cut_tokens")) for row in rows),
    }
    mean_accepted = 1 + sum(accepted) / len(accepted) if accepted else 1.0
    if any(row.get("seconds") is None for row in rows):
        return Figures(**counts, mean_accepted=mean_accepted)
    plain, speculative = _rates(rows, PLAIN), _rates(rows, SPECULATIVE)
    low, high = _interval(plain, speculative)
    return Figures(
        **counts,
        mean_accepted=mean_accepted,
        speedup=float(speculative.mean() / plain.mean()),
        low=low,
        high=high,
        plain_rate=float(plain.mean()),
        speculative_rate=float(speculative.mean()),
    )


def measure(rows: Sequence[Mapping[str, Any]]) -> SpecBench | None:
    """The benchmark's figures from a cell's rows; None for rows of another set.

    Rows need `id`, `category`, `num_tokens`, `seconds` by method and `rounds.accepted`; where a question has several
    turns, also `question` and `tokens` by method.
    """
    rows = list(rows)
    if not concerns(rows):
        return None
    by_task = {task: [row for row in rows if task_of(str(row["category"])) == task] for task in COLUMNS}
    return SpecBench({task: _figures(own) for task, own in by_task.items() if own}, _figures(rows))


def comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows for `measure`, of a comparison that was just made."""
    rows = []
    for row in comparison.rows:
        generation = row.runs[SPECULATIVE][0].generation
        rounds = generation.trace.rounds if generation is not None else []
        rows.append({**row.as_dict(), "rounds": {"accepted": [r.num_accepted for r in rounds]}})
    return rows


def measure_document(document: Mapping[str, Any]) -> list[tuple[str, SpecBench]]:
    """Label and figures of every finished cell of Spec-Bench in a document."""
    found = []
    for number, cell in enumerate(document["cells"], 1):
        if cell.get("status", "done") == "done" and cell.get("rows"):
            made = measure(cell["rows"])
            if made is not None:
                found.append((str(cell.get("label") or f"cell {number}"), made))
    return found
