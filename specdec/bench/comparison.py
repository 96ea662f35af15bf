"""What a comparison of plain and speculative decoding measured, and what that says.

Every time here is the wall time of a whole call, for us and for every baseline alike: prefill included, unless prompts
were prefilled before and forked for all methods (`specdec sweep`).
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from specdec.bench import bare
from specdec.bench.baselines import Baseline
from specdec.bench.divergence import Divergence
from specdec.bench.prompts import turn_id
from specdec.bench.timing import MAX_OTHERS, Interval, bootstrap
from specdec.trace import STAGES, Stats, summarize

if TYPE_CHECKING:
    from specdec.bench.prompts import Prompt
    from specdec.generation import Generation

PLAIN, SPECULATIVE = "plain", "speculative"


@dataclass(frozen=True)
class Timed:
    """One text by one method. `generation` is None for baselines.

    `seconds`: of texts that were decoded together, this one's share by tokens; so each has the rate of all of them.
    """

    tokens: tuple[int, ...]
    seconds: float
    clean: bool
    generation: Generation | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclass
class Row:
    """One turn of one prompt: `runs[method][repetition]`, and what explains a difference."""

    prompt: Prompt
    num_prompt_tokens: int
    runs: dict[str, list[Timed]] = field(default_factory=dict)
    divergence: Divergence | None = None
    turn: int = 1
    num_cut: int = 0  # tokens of the prompt that were cut off in front
    group: int | None = None  # rows of one group were decoded together; None: alone

    @property
    def id(self) -> str:
        return turn_id(self.prompt, self.turn)

    def identical(self, method: str) -> bool:
        """Whether every repetition gave the plain loop's tokens."""
        plain = self.runs[PLAIN][0].tokens
        return all(run.tokens == plain for run in self.runs[method])

    def ratios(self, method: str, other: str) -> list[float]:
        """How many times faster `method` made a token than `other`, by repetition."""
        pairs = zip(self.runs[method], self.runs[other], strict=True)
        return [a.tokens_per_second / b.tokens_per_second for a, b in pairs]

    def rounds(self, method: str = SPECULATIVE) -> list[Any]:
        made = [run.generation for run in self.runs[method] if run.generation is not None]
        return [r for generation in made for r in generation.trace.rounds]

    def as_dict(self, timed: bool = True) -> dict[str, Any]:
        """Without figures of speed (None in their place) unless `timed`."""

        def rate(method: str) -> float:
            return statistics.median(run.tokens_per_second for run in self.runs[method])

        seconds = {method: [run.seconds for run in runs] for method, runs in self.runs.items()}
        return {
            "id": self.id,
            "question": self.prompt.id,
            "turn": self.turn,
            "category": self.prompt.category,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_cut_tokens": self.num_cut,
            "num_tokens": len(self.runs[SPECULATIVE][0].tokens),
            "tokens": {method: [len(run.tokens) for run in runs] for method, runs in self.runs.items()},
            "identical": self.identical(SPECULATIVE),
            "speedup": statistics.median(self.ratios(SPECULATIVE, PLAIN)) if timed else None,
            "tokens_per_second": {method: rate(method) for method in self.runs} if timed else None,
            "seconds": seconds if timed else None,
            "mean_acceptance_length": summarize(self.rounds(), 0).mean_acceptance_length,
        }


@dataclass
class Comparison:
    """Everything that was measured; every number derives from `rows` and `costs`. `timed`: whether time was."""

    rows: list[Row]
    baselines: list[Baseline]
    costs: bare.BareCosts
    repetitions: int
    expects_identity: bool
    num_slices: int
    num_clean: int
    watching: bool
    peak_memory: dict[str, int]
    timed: bool = True

    @property
    def _calls(self) -> list[Row]:
        """One row of every group: what was decoded together was timed once."""
        first: dict[Any, Row] = {}
        for number, row in enumerate(self.rows):
            first.setdefault(("alone", number) if row.group is None else row.group, row)
        return list(first.values())

    def rate(self, method: str) -> Interval:
        """Tokens per second over all prompts and repetitions."""
        return bootstrap([[run.tokens_per_second for run in row.runs[method]] for row in self._calls])

    def ratio(self, method: str, other: str) -> Interval:
        """Median of the paired ratios: the same prompt, or prompts decoded together, one after the other."""
        return bootstrap([row.ratios(method, other) for row in self._calls])

    def num_identical(self, method: str = SPECULATIVE) -> int:
        return sum(row.identical(method) for row in self.rows)

    def stats(self, method: str = SPECULATIVE) -> Stats:
        """Acceptance and seconds by stage, pooled over all prompts and repetitions."""
        made = [run.generation for row in self.rows for run in row.runs[method] if run.generation is not None]
        return summarize(
            [r for generation in made for r in generation.trace.rounds],
            sum(len(generation.tokens) for generation in made),
            sum(generation.trace.prefill_seconds for generation in made),
            lossless=all(generation.trace.lossless for generation in made),
            drafter_error=next((g.trace.drafter_error for g in made if g.trace.drafter_error), None),
            num_redecided=sum(generation.trace.num_redecided for generation in made),
            num_recomputed_rows=sum(generation.trace.num_recomputed_rows for generation in made),
            redecide_seconds=sum(generation.trace.redecide_seconds for generation in made),
        )

    @property
    def ideal_speedup(self) -> float:
        return bare.ideal_speedup([r for row in self.rows for r in row.rounds()], self.costs)

    @property
    def efficiency(self) -> float:
        """Achieved over ideal, both pooled over all texts: seconds per token against seconds per token."""
        ideal = self.ideal_speedup
        return self._seconds_per_token(PLAIN) / self._seconds_per_token(SPECULATIVE) / ideal if ideal else 0.0

    def _seconds_per_token(self, method: str) -> float:
        runs = [run for row in self.rows for run in row.runs[method]]
        return sum(run.seconds for run in runs) / sum(len(run.tokens) for run in runs)

    @property
    def divergences(self) -> list[tuple[Row, Divergence]]:
        return [(row, row.divergence) for row in self.rows if row.divergence is not None]

    @property
    def has_bug(self) -> bool:
        return any(divergence.is_bug for _, divergence in self.divergences)

    def _baseline(self, baseline: Baseline) -> dict[str, Any]:
        return {
            "describes": baseline.describes,
            "tokens_per_second": self.rate(baseline.name).as_dict(),
            "identical": self.num_identical(baseline.name),
            "speculative_over_it": self.ratio(SPECULATIVE, baseline.name).as_dict(),
            "plain_over_it": self.ratio(PLAIN, baseline.name).as_dict(),
        }

    def _speed(self) -> dict[str, Any]:
        plain = self.stats(PLAIN)
        return {
            "plain": {"tokens_per_second": self.rate(PLAIN).as_dict(), "seconds": plain.seconds},
            "speculative": {"tokens_per_second": self.rate(SPECULATIVE).as_dict()},
            "speedup": {**self.ratio(SPECULATIVE, PLAIN).as_dict(), "baseline": "plain loop"},
            "ideal_speedup": self.ideal_speedup,
            "efficiency": self.efficiency,
            "bare_seconds": {
                "target": {str(width): value for width, value in self.costs.target.items()},
                "draft": self.costs.draft,
                "cached_tokens": self.costs.length,
            },
        }

    def as_dict(self) -> dict[str, Any]:
        """The fields of `specdec compare --json`, but for those that describe the set-up.

        Figures of speed are None when no time was measured.
        """
        stats = self.stats()
        taken = stats.as_dict()
        seconds = taken.pop("seconds")
        names = ("plain", "speculative", "speedup", "ideal_speedup", "efficiency", "bare_seconds")
        speed = self._speed() if self.timed else dict.fromkeys(names)
        return {
            "prompts": len(self.rows),
            "repetitions": self.repetitions,
            "identical": self.num_identical(),
            "expects_identity": self.expects_identity,
            "divergences": [{"id": row.id, **divergence.as_dict()} for row, divergence in self.divergences],
            **speed,
            "stats": taken,
            "seconds": {stage: seconds[stage] for stage in STAGES} if self.timed else None,
            "peak_memory_bytes": self.peak_memory,
            "slices": self.num_slices,
            "clean_slices": self.num_clean,
            "clean_means": f"other processes used at most {MAX_OTHERS:.0%} of one core" if self.watching else "unknown",
            "baselines": {baseline.name: self._baseline(baseline) for baseline in self.baselines},
            "rows": [row.as_dict(self.timed) for row in self.rows],
        }
