"""One record per round; every statistic, plot and replay derives from it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from specdec.drafter import Outcome
from specdec.runtime.clock import HostClock

STAGES = ("prefill", "draft", "verify", "commit", "other")


@dataclass
class Round:
    """One round. `num_emitted` counts the accepted tokens and the target's own one, before any cut at the end."""

    num_nodes: int = 0
    depth_proposed: int = 0
    num_accepted: int = 0
    num_evaluated: int = 0
    num_emitted: int = 0
    drafter: str = ""
    expected: float | None = None  # accepted tokens, by the drafter's own estimate
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def take(self, drafter: str, outcome: Outcome) -> None:
        """Record what became of this round's proposal."""
        tree = outcome.proposal.tree
        self.drafter, self.expected = outcome.proposal.origin or drafter, outcome.proposal.expected
        self.num_nodes, self.depth_proposed = len(tree), tree.max_depth
        self.num_accepted, self.num_evaluated = outcome.num_accepted, outcome.num_evaluated
        self.num_emitted = len(outcome.tokens)


@dataclass(frozen=True)
class Stats:
    """Acceptance, in the field's own names. `accepted` excludes the target's own token of a round.

    `mean_acceptance_length` = 1 + accepted / rounds (vLLM's convention, bonus included); `draft_acceptance_rate` =
    accepted / drafted; `acceptance_histogram[n]` = rounds that accepted n; `joint_acceptance[i]` = share of rounds
    that accepted more than i tokens; `conditional_acceptance[i]` = the same among rounds that decided about depth i.
    """

    num_tokens: int
    num_rounds: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: dict[int, int]
    joint_acceptance: list[float]
    conditional_acceptance: list[float]
    seconds: dict[str, float]
    lossless: bool = True
    drafter_error: str | None = None
    num_redecided: int = 0  # doubtful positions that exact=True decided again
    num_recomputed_rows: int = 0  # single-row forwards that this took
    redecide_seconds: float = 0.0  # a part of seconds["verify"]
    num_reused_tokens: int = 0  # of the prompt: computed for an earlier one that began alike

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Decoding alone: the prefill is not counted."""
        decoding = self.total_seconds - self.seconds["prefill"]
        return self.num_tokens / decoding if decoding > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {value:.3f}" for name, value in self.seconds.items())
        lines = [
            f"{self.num_tokens} tokens in {self.num_rounds} rounds, {self.tokens_per_second:.1f} tokens/s",
            f"mean acceptance length {self.mean_acceptance_length:.2f}, "
            f"{self.num_accepted_draft_tokens} of {self.num_draft_tokens} drafted tokens accepted "
            f"({self.draft_acceptance_rate:.1%})",
            f"seconds: {stages}",
        ]
        if self.num_recomputed_rows:
            lines.append(
                f"{self.num_redecided} doubtful positions decided again: {self.num_recomputed_rows} rows, "
                f"{self.redecide_seconds:.3f} s of verify"
            )
        if self.num_reused_tokens:
            lines.append(f"{self.num_reused_tokens} prompt tokens reused from an earlier prompt")
        if not self.lossless:
            lines.append("LOSSY: the verifier does not keep the target's distribution")
        if self.drafter_error:
            lines.append(f"finished by plain decoding: {self.drafter_error}")
        return "\n".join(lines)


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def summarize(rounds: Sequence[Round], num_tokens: int, prefill: float = 0.0, **extra: Any) -> Stats:
    """Statistics of any set of rounds: one text, or many texts pooled."""
    accepted, drafted = sum(r.num_accepted for r in rounds), sum(r.num_nodes for r in rounds)
    depth = max((r.num_evaluated for r in rounds), default=0)
    reached = [sum(r.num_evaluated > d for r in rounds) for d in range(depth)]
    passed = [sum(r.num_accepted > d for r in rounds) for d in range(depth)]
    seconds = {stage: sum(r.seconds[stage] for r in rounds) for stage in STAGES}
    seconds["prefill"] += prefill
    return Stats(
        num_tokens=num_tokens,
        num_rounds=len(rounds),
        num_draft_tokens=drafted,
        num_accepted_draft_tokens=accepted,
        mean_acceptance_length=1 + _ratio(accepted, len(rounds)),
        draft_acceptance_rate=_ratio(accepted, drafted),
        acceptance_histogram=dict(sorted(Counter(r.num_accepted for r in rounds).items())),
        joint_acceptance=[_ratio(n, len(rounds)) for n in passed],
        conditional_acceptance=[_ratio(n, m) for n, m in zip(passed, reached, strict=True)],
        seconds=seconds,
        **extra,
    )


class Trace:
    """The record of one text. The clock belongs to it: `with trace.stage("verify")` inside `with trace.round()`.

    In a batch the clock stops while other texts run; of a step in common, it counts this text's share by rows.

    `device`: the clock of a device that works on after the host has gone ahead. It may still draft while the host
    waits for it to verify: that time is the draft's.
    """

    def __init__(self, device: HostClock | None = None) -> None:
        self._device = device if device is not None and device.lags else None
        self._drafted: tuple[Any, Any] | None = None  # when the device began to draft, and when it was done
        self.rounds: list[Round] = []
        self.prefill_seconds = 0.0
        self.num_tokens = 0
        self.lossless = True
        self.drafter_error: str | None = None
        self.num_redecided = 0
        self.num_recomputed_rows = 0
        self.redecide_seconds = 0.0
        self.num_reused_tokens = 0
        self.is_prefilling = False
        self.seconds_away = 0.0  # spent on other texts; less this text's share of steps that it had in common with them
        self.current = Round()

    def now(self) -> float:
        """The clock of this text."""
        return time.perf_counter() - self.seconds_away

    @contextmanager
    def prefill(self) -> Iterator[None]:
        started, self.is_prefilling = self.now(), True
        yield
        self.prefill_seconds += self.now() - started
        self.is_prefilling = False

    @contextmanager
    def round(self) -> Iterator[Round]:
        started = self.now()
        self.current, self._drafted = Round(), None
        yield self.current
        self._set_right(self.current.seconds)
        self.current.seconds["other"] += self.now() - started - sum(self.current.seconds.values())
        self.rounds.append(self.current)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started, away = self.now(), self.seconds_away
        mark = self._device.mark() if self._device is not None and name == "draft" else None
        yield
        self.current.seconds[name] += self.now() - started
        if self._device is not None and mark is not None and away == self.seconds_away:  # no other text came between
            self._drafted = mark, self._device.mark()

    def _set_right(self, seconds: dict[str, float]) -> None:
        """The verdict has been read, so that the device is done with both stages."""
        if self._device is not None and self._drafted is not None:
            late = self._device.between(*self._drafted) - seconds["draft"]
            late = max(0.0, min(late, seconds["verify"]))
            seconds["draft"] += late
            seconds["verify"] -= late

    @property
    def stats(self) -> Stats:
        return summarize(
            self.rounds,
            self.num_tokens,
            self.prefill_seconds,
            lossless=self.lossless,
            drafter_error=self.drafter_error,
            num_redecided=self.num_redecided,
            num_recomputed_rows=self.num_recomputed_rows,
            redecide_seconds=self.redecide_seconds,
            num_reused_tokens=self.num_reused_tokens,
        )
