"""What texts that decode together share: the costs of their common steps, and the draft lengths that follow.

Alone, a text's verification of a few more tokens is nearly free. In a batch it is not: the rows of all texts make one
step, and past the width at which the hardware is busy every row costs. What counts is by how much the whole batch's
step grows for one more drafted token, against what that token brings; not the step's time divided by the texts.

Shape suffix: T drafted tokens that could be verified, of all texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from specdec.policy import Policy, PolicyRun, ThroughputRun

# Measured widths are binned, this many bins to a doubling, so that every bin is an average of several steps.
_BINS = 4
_HALF_LIFE = 16


@dataclass
class Curve:
    """Seconds of a step by its number of rows, as measured; newer measurements count more."""

    bins: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # weight, rows, seconds: weighted sums

    def add(self, rows: int, seconds: float) -> None:
        keep = 0.5 ** (1 / _HALF_LIFE)
        weight, a, b = self.bins.get(key := round(_BINS * math.log2(rows)), (0.0, 0.0, 0.0))
        self.bins[key] = weight * keep + 1, a * keep + rows, b * keep + seconds

    def __len__(self) -> int:
        return len(self.bins)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Linear between measured widths, constant below them, and beyond them along the line from the narrowest.

        More rows are never cheaper: where measurements say so, they are noise.
        """
        known = sorted((a / weight, b / weight) for weight, a, b in self.bins.values())
        x, y = np.array([k[0] for k in known]), np.maximum.accumulate([k[1] for k in known])
        seconds: np.ndarray = np.interp(rows, x, y)
        if len(known) > 1:
            slope = (y[-1] - y[0]) / (x[-1] - x[0])
            seconds = seconds + slope * np.maximum(0, rows - x[-1])
        return seconds


def share_out(
    survival: Sequence[Sequence[float]],
    base_rows: int,
    verify: Callable[[np.ndarray], np.ndarray],
    draft: float,
    other_tokens: int = 0,
) -> list[int]:
    """The draft length of each text that gives the batch the most tokens per second.

    `survival[i][d]`: the probability that text i accepts its drafted token at depth d and all before it (it falls with
    d). `base_rows`: rows of the step when none of them drafts; `other_tokens`: what texts beside them emit. `verify`:
    seconds of a step by its rows, overhead included. `draft`: seconds of one more draft step, in which every text can
    take part. For each number of draft steps, tokens are taken in the order of their survival while the rate rises: the
    best set of every size. (Goodput: Liu et al., arXiv 2406.14066, here over unequal texts.)
    """
    texts = len(survival)
    flat = [(-p, depth, text) for text, row in enumerate(survival) for depth, p in enumerate(row, 1)]
    flat.sort()
    gain_T = np.array([-entry[0] for entry in flat])
    depth_T = np.array([entry[1] for entry in flat], dtype=np.int64)
    text_T = np.array([entry[2] for entry in flat], dtype=np.int64)
    sure = texts + other_tokens
    best, chosen = sure / float(verify(np.array([base_rows]))[0]), text_T[:0]
    for limit in range(1, int(depth_T.max(initial=0)) + 1):
        within = depth_T <= limit
        gained = np.cumsum(gain_T[within])
        rates = (sure + gained) / (verify(base_rows + np.arange(1, len(gained) + 1)) + limit * draft)
        at = int(rates.argmax())
        if rates[at] > best:
            best, chosen = float(rates[at]), text_T[within][: at + 1]
    depths: list[int] = np.bincount(chosen, minlength=texts).tolist()
    return depths


class Load:
    """The costs that the texts of one batch have in common, measured as it runs; and the plan that follows."""

    def __init__(self) -> None:
        self.verify, self.draft = Curve(), Curve()
        self.overhead = Curve()  # what a turn costs besides forwards, by the number of texts
        self.turns = 0  # measured ones
        self.runs: list[ThroughputRun] = []  # those that plan together
        self._other_rows = self._other_tokens = 0
        self._plan: dict[int, int] | None = None

    def join(self, run: ThroughputRun) -> None:
        self.runs.append(run)
        self._plan = None

    def leave(self, run: PolicyRun | None) -> None:
        if isinstance(run, ThroughputRun) and run in self.runs:
            self.runs.remove(run)
            self._plan = None

    def new_turn(self, other_rows: int, other_tokens: int) -> None:
        """A turn begins; in the last one, texts that do not plan together had so many rows and emitted so much."""
        self._plan, self._other_rows, self._other_tokens = None, other_rows, other_tokens

    def observe(self, rows: int, verify: float, waves: Sequence[tuple[int, float]], overhead: float) -> None:
        """A turn is over: `rows` of its target step and its seconds, rows and seconds of each draft step."""
        self.turns += 1
        self.verify.add(rows, verify)
        for drafted, seconds in waves:
            self.draft.add(drafted, seconds)
        self.overhead.add(max(1, len(self.runs)), overhead)

    def depth(self, run: ThroughputRun, first: int) -> int:
        """How deep this text drafts in this turn. The first three turns measure: `first` deep, 0, and `first` again."""
        if self.turns < 3 or len(self.verify) < 2:
            return 0 if self.turns == 1 else first
        if self._plan is None:
            texts = len(self.runs)
            draft = float(self.draft(np.array([texts]))[0]) if len(self.draft) else 0.0
            overhead = float(self.overhead(np.array([texts]))[0])
            depths = share_out(
                [other.survival() for other in self.runs],
                texts + self._other_rows,
                lambda rows: self.verify(rows) + overhead,
                draft,
                self._other_tokens,
            )
            self._plan = {id(other): depth for other, depth in zip(self.runs, depths, strict=True)}
        return self._plan[id(run)]


class Joined(Policy):
    """A policy whose run shares the load of a batch; `run` is there once the text has started."""

    def __init__(self, inner: Policy, load: Load):
        self.inner, self.load = inner, load
        self.run: PolicyRun | None = None

    @property
    def branches(self) -> bool:
        return self.inner.branches

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def most_nodes(self) -> int:
        return self.inner.most_nodes

    def start(self) -> PolicyRun:
        self.run = self.inner.start()
        self.run.join(self.load)
        return self.run
