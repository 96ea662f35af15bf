"""Clean timings: a gate that notices other processes, and intervals that say how sure a number is."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# A slice is dirty when other processes used more than this share of one core.
MAX_OTHERS = 0.08
# The kernel counts busy time in ticks; each of the two readings may be off by one.
_TICKS_OF_DOUBT = 2


@dataclass(frozen=True)
class Reading:
    """Seconds since some fixed moment: by the clock, of all busy cores together, and of this process."""

    wall: float
    busy: float
    own: float


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def read_load() -> Reading | None:
    """The machine's and this process's CPU time; None where the system does not tell (anything but Linux)."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[1:9])
        busy = (user + nice + system + irq + softirq + steal) / _ticks_per_second()
        children = os.times()
        own = time.process_time() + children.children_user + children.children_system
        return Reading(time.perf_counter(), busy, own)
    return None


def others_share(before: Reading | None, after: Reading | None, tick: float = 0.01) -> float:
    """Cores' worth of CPU that other processes used between two readings, less what the ticks leave in doubt."""
    if before is None or after is None or after.wall <= before.wall:
        return 0.0
    others = (after.busy - before.busy) - (after.own - before.own) - _TICKS_OF_DOUBT * tick
    return max(0.0, others / (after.wall - before.wall))


@dataclass(frozen=True)
class Slice(Generic[T]):
    """One timed call."""

    result: T
    seconds: float
    others: float  # cores' worth of CPU used by other processes meanwhile
    retries: int = 0

    @property
    def clean(self) -> bool:
        return self.others <= MAX_OTHERS


class Gate:
    """Times calls, and repeats those during which other processes were busy.

    A call is repeated at most `retries` times, and all calls together at most `budget` times, so that a machine that
    is never quiet costs a bounded delay. The least disturbed try counts; `clean` tells whether it was good enough.
    """

    def __init__(
        self,
        device: Any = None,
        *,
        retries: int = 3,
        budget: int | None = None,
        read: Callable[[], Reading | None] = read_load,
    ):
        self.device, self.retries, self.budget, self.read = device, retries, budget, read
        self.num_slices = self.num_clean = self.num_retries = 0

    @property
    def watching(self) -> bool:
        """Whether the system tells about other processes at all."""
        return self.read() is not None

    def _reading(self, helper: Callable[[], float] | None) -> Reading | None:
        found = self.read()
        return found if found is None or helper is None else replace(found, own=found.own + helper())

    def _once(self, call: Callable[[], T], helper: Callable[[], float] | None) -> Slice[T]:
        synchronize(self.device)
        before, started = self._reading(helper), time.perf_counter()
        result = call()
        synchronize(self.device)
        seconds = time.perf_counter() - started
        return Slice(result, seconds, others_share(before, self._reading(helper), 1 / _ticks_per_second()))

    def time(self, call: Callable[[], T], helper: Callable[[], float] | None = None) -> Slice[T]:
        """`helper`: CPU seconds of a process that works for this call; in other calls it is one of the others.

        Processes that begin and end within the call are counted as its own without that.
        """
        best = self._once(call, helper)
        tries = 0
        while not best.clean and tries < self.retries and (self.budget is None or self.num_retries < self.budget):
            tries += 1
            self.num_retries += 1
            again = self._once(call, helper)
            best = again if again.others < best.others else best
        self.num_slices += 1
        self.num_clean += best.clean
        return Slice(best.result, best.seconds, best.others, tries)


def synchronize(device: Any) -> None:
    """Wait until the device has done what was asked of it; nothing to wait for on a CPU."""
    kind = getattr(device, "type", None)
    if kind in (None, "cpu"):
        return
    import torch

    getattr(torch, kind).synchronize(device)


@dataclass(frozen=True)
class Interval:
    """A median, and where it lies with 95 % confidence."""

    median: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}

    def among(self, number: int) -> Interval:
        """For the best of `number` settings, chosen by the same data: at 5 % / number, after Bonferroni.

        Of ratios above 0: the normal approximation on the log scale, each side by its own width.
        """
        if number < 2 or self.low <= 0 or self.median <= 0:
            return self
        normal = statistics.NormalDist()
        wider = normal.inv_cdf(1 - 0.025 / number) / normal.inv_cdf(0.975)
        low, high = (self.median * (end / self.median) ** wider for end in (self.low, self.high))
        return Interval(self.median, min(low, self.low), max(high, self.high))


def bootstrap(groups: Sequence[Sequence[float]], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The median of all values, and its 95 % percentile-bootstrap interval (Efron, 1979).

    `groups`: one per prompt, holding that prompt's repetitions. Prompts are drawn with replacement, then repetitions
    within them: repetitions of one prompt are no independent evidence about other prompts. Raises `ValueError` when
    there is no value.
    """
    groups = [list(group) for group in groups if len(group)]
    if not groups:
        raise ValueError("no values to resample")
    draw = random.Random(seed)
    medians = sorted(
        statistics.median(
            [value for group in draw.choices(groups, k=len(groups)) for value in draw.choices(group, k=len(group))]
        )
        for _ in range(resamples)
    )
    middle = statistics.median([value for group in groups for value in group])
    low, high = medians[int(0.025 * (resamples - 1))], medians[int(0.975 * (resamples - 1) + 0.5)]
    return Interval(middle, min(low, middle), max(high, middle))
