"""Times all rows of a benchmark in turns, with the bare forwards and the machine's bandwidth between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from typing import Any

import torch

from specdec.bench import bare
from specdec.bench.machine import ReadProbe
from specdec.bench.rows import SPECULATIVE, Absent, Made, Method
from specdec.bench.timing import MAX_OTHERS, Gate, Interval, bootstrap

# Bare forwards of one slice: enough for a median, few enough that a disturbed slice is cheap to repeat.
_BARE_REPETITIONS = 4

Progress = Callable[[int, int, str], None]
Key = tuple[str, int]


@dataclass(frozen=True)
class Sample:
    """One text by one method, timed."""

    made: Made
    seconds: float
    clean: bool

    @property
    def seconds_per_token(self) -> float:
        return self.seconds / max(len(self.made.tokens), 1)

    @property
    def decoding_seconds_per_token(self) -> float:
        """Without the prefill, where it is known apart."""
        return (self.seconds - self.made.prefill_seconds) / max(len(self.made.tokens), 1)


@dataclass
class BareProbe:
    """Bare forwards of one backend, and what they took."""

    calls: Mapping[Key, Callable[[], object]]
    length: int
    device: torch.device
    seconds: dict[Key, list[float]] = field(default_factory=dict)

    def block(self) -> dict[Key, list[float]]:
        taken: dict[Key, list[float]] = {key: [] for key in self.calls}
        for _ in range(_BARE_REPETITIONS):
            for key, call in self.calls.items():
                taken[key].append(bare.timed(call, self.device))
        return taken

    def add(self, taken: Mapping[Key, Sequence[float]]) -> None:
        for key, values in taken.items():
            self.seconds.setdefault(key, []).extend(values)

    @property
    def costs(self) -> bare.BareCosts:
        return bare.collect(self.seconds, self.length)

    @property
    def plain_steps(self) -> list[float]:
        """Seconds of one row: the median of each block."""
        values, size = self.seconds["target", 1], _BARE_REPETITIONS
        return [statistics.median(values[at : at + size]) for at in range(0, len(values), size)]

    def ratio(self, width: int) -> float | None:
        """The cost of `width` rows in that of one just before, at the median; None when this width was not measured."""
        wide = self.seconds.get(("target", width))
        return statistics.median(map(truediv, wide, self.seconds["target", 1])) if wide else None


@dataclass
class Bench:
    """Everything that was measured: `samples[row][prompt][repetition]`."""

    methods: list[Method]
    samples: dict[str, list[list[Sample]]]
    probes: dict[str, BareProbe]
    bandwidth: list[float]  # bytes per second, one reading a turn
    gate: Gate
    absent: list[Absent] = field(default_factory=list)

    @property
    def num_prompts(self) -> int:
        return len(next(iter(self.samples.values()), []))

    def method(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)

    def has(self, name: str) -> bool:
        return name in self.samples

    def milliseconds(self, name: str) -> Interval:
        """Per token, of whole calls."""
        return bootstrap([[1e3 * s.seconds_per_token for s in _best(group)] for group in self.samples[name]])

    def decoding_seconds(self, name: str) -> float:
        """Median seconds per token, without the prefill."""
        return statistics.median(s.decoding_seconds_per_token for group in self.samples[name] for s in _best(group))

    def speed(self, name: str, other: str, *, decoding: bool = False) -> Interval:
        """How many times faster `name` makes a token than `other`: median of the ratios of neighbouring slices."""

        def cost(sample: Sample) -> float:
            return sample.decoding_seconds_per_token if decoding else sample.seconds_per_token

        groups = []
        for mine, its in zip(self.samples[name], self.samples[other], strict=True):
            pairs = list(zip(mine, its, strict=True))
            clean = [(a, b) for a, b in pairs if a.clean and b.clean]
            groups.append([cost(b) / cost(a) for a, b in clean or pairs])
        return bootstrap(groups)

    def tokens_per_step(self, name: str) -> float | None:
        made = [s.made for group in self.samples[name] for s in group]
        steps = sum(m.steps for m in made)
        return sum(len(m.tokens) for m in made) / steps if steps else None

    def num_identical(self, name: str, other: str) -> int:
        """Prompts of which every repetition gave the other row's first text.

        Of a batch every repetition holds all prompts; its other texts are not compared.
        """
        same = 0
        for number, (mine, its) in enumerate(zip(self.samples[name], self.samples[other], strict=True)):
            expected = its[0].made.tokens
            made = [s.made for group in self.samples[name] for s in group] if mine[0].made.texts else []
            texts = [m.texts[number] for m in made] or [s.made.tokens for s in mine]
            same += all(text == expected for text in texts)
        return same

    def rounds(self, name: str) -> list[Any]:
        return [r for group in self.samples[name] for s in group for r in s.made.rounds]

    def num_clean(self, name: str) -> tuple[int, int]:
        samples = [s for group in self.samples[name] for s in group]
        return sum(s.clean for s in samples), len(samples)

    def ideal(self, name: str) -> dict[str, float] | None:
        """What a row's own rounds would cost if only bare forwards cost anything.

        `ideal_ms`: per token. `efficiency`: of that time in the achieved one, prefill left out of both.
        `ideal_speedup`, `speedup`: over the plain loop, bare over bare and decoding over decoding, and `of_ideal` their
        ratio. `overhead_us`: per round. None for rows that are not ours.
        """
        method = self.method(name)
        probe = self.probes.get(method.backend or "")
        rounds = self.rounds(name)
        if probe is None or not rounds or not probe.seconds:
            return None
        costs = probe.costs
        if method.drafter != "model":
            costs = bare.BareCosts(costs.target, 0.0, costs.length)
        seconds = bare.round_seconds(rounds, costs)
        emitted = sum(r.num_emitted for r in rounds)
        achieved = self.decoding_seconds(name)
        found = {
            "ideal_ms": 1e3 * seconds / emitted,
            "efficiency": seconds / emitted / achieved,
            "overhead_us": 1e6 * (achieved * emitted - seconds) / len(rounds),
        }
        if method.mode == SPECULATIVE:
            found["ideal_speedup"] = bare.ideal_speedup(rounds, costs)
            found["speedup"] = self.speed(name, method.base, decoding=True).median
            found["of_ideal"] = found["speedup"] / found["ideal_speedup"]
        return found

    def row(self, method: Method, reference: str) -> dict[str, Any]:
        """One row of the report; `reference` is the row that "our plain loop" means."""
        name = method.name
        clean, slices = self.num_clean(name)
        base = method.base if self.has(method.base) else None
        return {
            "name": name,
            "engine": method.engine,
            "mode": method.mode,
            "backend": method.backend,
            "drafter": method.drafter,
            "k": method.k,
            "describes": method.describes,
            "ms_per_token": self.milliseconds(name).as_dict(),
            "over_our_plain": self.speed(name, reference).as_dict(),
            "over_own_plain": self.speed(name, base).as_dict() if base else None,
            "tokens_per_step": self.tokens_per_step(name),
            "plain_identical": self.num_identical(name, base) if base else None,
            "same_as_ours": self.num_identical(name, reference),
            "ideal": self.ideal(name),
            "clean_slices": clean,
            "slices": slices,
            "raw_ms_per_token": [[1e3 * s.seconds_per_token for s in group] for group in self.samples[name]],
            "raw_clean": [[s.clean for s in group] for group in self.samples[name]],
        }

    def bare(self) -> dict[str, Any]:
        return {
            backend: {
                "target_ms": {str(width): 1e3 * value for width, value in probe.costs.target.items()},
                "draft_ms": 1e3 * probe.costs.draft,
                "cached_tokens": probe.length,
                "verify8_over_decode1": probe.ratio(8),
            }
            for backend, probe in self.probes.items()
            if probe.seconds
        }

    def slices(self) -> dict[str, Any]:
        watching = self.gate.watching
        return {
            "slices": self.gate.num_slices,
            "clean_slices": self.gate.num_clean,
            "repeated_slices": self.gate.num_retries,
            "clean_means": f"other processes used at most {MAX_OTHERS:.0%} of one core" if watching else "unknown",
        }


def _best(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Clean samples where there are any."""
    return [sample for sample in samples if sample.clean] or samples


def run(
    methods: Sequence[Method],
    prompts: Sequence[Sequence[int]],
    *,
    repetitions: int,
    gate: Gate,
    probes: Mapping[str, BareProbe] | None = None,
    bandwidth: ReadProbe | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Every row on every prompt, `repetitions` times; the order turns, so that none always follows the same other.

    Between the rows of each turn stand one block of bare forwards per backend and one reading of the bandwidth.
    """
    bench = Bench(list(methods), {m.name: [[] for _ in prompts] for m in methods}, dict(probes or {}), [], gate)
    jobs: list[tuple[str, str]] = [("row", m.name) for m in methods]
    jobs += [("bare", name) for name in bench.probes] + ([("read", "bandwidth")] if bandwidth else [])
    by_name = {m.name: m for m in methods}
    total, done = len(jobs) * len(prompts) * repetitions, 0
    for repetition in range(repetitions):
        for number, prompt in enumerate(prompts):
            turn = (repetition * len(prompts) + number) % len(jobs)
            for kind, name in jobs[turn:] + jobs[:turn]:
                if kind == "row":
                    method = by_name[name]
                    call = partial(method.run, prompt)
                    timed = gate.time(call, method.cpu_seconds)
                    own = timed.result.seconds
                    sample = Sample(timed.result, timed.seconds if own is None else own, timed.clean)
                    bench.samples[name][number].append(sample)
                elif kind == "bare":
                    bench.probes[name].add(gate.time(bench.probes[name].block).result)
                elif bandwidth is not None:
                    bench.bandwidth.append(gate.time(bandwidth).result)
                done += 1
                if progress is not None:
                    progress(done, total, name)
    return bench
