"""What the numbers mean, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.bench.timing import Interval
from specdec.costs import cost_at
from specdec.planner.predict import Prediction, TextCost, best
from specdec.tree import structure

# Less than this is not worth a second model.
WORTH_IT = 1.02
# A plain step that reads weights at this share of the memory's speed waits for memory; below the other, for the rest.
_BOUND, _IDLE = 0.6, 0.35
_MORE = "plan on more prompts, or measure with specdec compare"


@dataclass(frozen=True)
class Verdict:
    """`speculate`: whether it pays. `sure`: whether the whole interval says so, widened for the choice of the best
    setting; that it does not pay is sure where no setting's interval reaches what is worth it."""

    speculate: bool
    sure: bool
    sentence: str
    reason: str

    def as_dict(self) -> dict[str, Any]:
        return {"speculate": self.speculate, "sure": self.sure, "sentence": self.sentence, "reason": self.reason}


def flags(row: Prediction) -> str:
    """How to ask for a setting on the command line."""
    if row.setting.shape:
        return f"--tree {row.setting.name.removeprefix('tree ')}" if "," in row.setting.name else "--tree-plan FILE"
    return f"--k {row.setting.k}"


def best_drafting(rows: Sequence[Prediction]) -> Prediction:
    """The best row that drafts anything."""
    return best([row for row in rows if row.setting.k or row.setting.shape])


def verdict(rows: Sequence[Prediction], costs: TextCost, drafter: str, first: float) -> Verdict:
    """Of all settings of a plan. `first`: the share of first drafted tokens that are accepted under the best one."""
    drafting = [row for row in rows if row.setting.k or row.setting.shape]
    top = best_drafting(rows)
    reason = _reason(top, costs, drafter, first)
    if top.speedup <= WORTH_IT:
        what = f"do not speculate here: with {top.setting.label}, the best, a text takes {_times(top.speedup)}"
        # Every setting has to fail, so that each is judged by its own interval.
        likely = max(drafting, key=lambda row: row.high)
        sure = likely.high < WORTH_IT
        if not sure:
            what += f"; not sure, for the interval of {likely.setting.label} reaches {likely.high:.2f}x: {_MORE}"
        return Verdict(False, sure, what, reason)
    what = f"speculate with {top.setting.label} ({flags(top)}): {top.speedup:.2f}x ({top.low:.2f} to {top.high:.2f})"
    sure = Interval(top.speedup, top.low, top.high).among(len(drafting)).low > 1
    interval = "the interval"
    if len(drafting) > 1:
        what += f", the best of {len(drafting)} settings, chosen by the same data"
        interval = "an interval that allows for the choice"
    if not sure:
        what += f"; not sure, for {interval} holds 1.0x: {_MORE}"
    return Verdict(True, sure, what, reason)


def _times(speedup: float) -> str:
    if speedup < 1:
        return f"{1 / speedup:.2f} times as long"
    return f"no less than {100 / speedup:.0f} % of its time"


def _reason(top: Prediction, costs: TextCost, drafter: str, first: float) -> str:
    cost, plain = costs.round, costs.round.plain_round()
    k, shape = top.setting.k, top.setting.shape
    levels = k or structure(shape).max_depth
    drafted = (cost.level + cost.node + cost.start / levels) / plain
    nodes = k or len(shape)
    verified = (cost_at(cost.verify, nodes + 1) + cost.other) / plain
    parts = [
        f"a drafted token of {drafter} costs {drafted:.0%} of a plain step",
        f"verifying {nodes} costs {verified:.2f} steps",
        f"{first:.0%} of first drafted tokens are accepted",
    ]
    if top.break_even is not None:
        parts.append(f"{top.setting.label} needs {top.break_even:.0%} of all to be worth its cost")
    elif k and top.cost > k + 1:
        parts.append(f"{top.setting.label} would not be worth its cost if every token were accepted")
    return ", ".join(parts)


@dataclass(frozen=True)
class Roofline:
    """How far a plain step is from what reading its weights would take. Seconds and bytes."""

    step: float  # a bare forward of one row
    in_loop: float  # a plain round, everything included
    step_bytes: int
    bandwidth: float  # bytes per second, measured

    @property
    def share(self) -> float:
        """Of the memory's speed that the step's reading reaches; above 1 where weights lie in a cache."""
        return self.step_bytes / self.step / self.bandwidth

    def as_dict(self) -> dict[str, Any]:
        return {
            "step_seconds": self.step,
            "round_seconds": self.in_loop,
            "step_bytes": self.step_bytes,
            "bytes_per_second": self.bandwidth,
            "share": self.share,
            "advice": self.advice(),
        }

    def advice(self) -> str:
        if self.share > 1:
            return "its weights lie in a cache, so memory is no limit: speculation and fewer bits save less here"
        if self.share >= _BOUND:
            return (
                "it waits for memory: weights in fewer bits (--quantize int8, w4a16) make it faster, and rows of a "
                "verification are nearly free"
            )
        if self.share >= _IDLE:
            return (
                "it waits for memory about half of the time: weights in fewer bits help in part, a compiled --backend "
                "with the rest"
            )
        return (
            "it waits for something else than memory: a compiled --backend, other --threads, or bfloat16 "
            "(--dtype auto) come before fewer bits"
        )
