"""Plain against speculative decoding, interleaved, on a set of prompts.

Every time here is the wall time of a whole call, prefill included, for us and for every baseline alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from specdec.bench import bare
from specdec.bench.baselines import Baseline
from specdec.bench.divergence import BUG, Divergence, explain
from specdec.bench.timing import MAX_OTHERS, Gate, Interval, bootstrap
from specdec.dtypes import dtype_name
from specdec.errors import InputError
from specdec.trace import STAGES, Stats, summarize

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.bench.prompts import Prompt
    from specdec.generation import Generation

PLAIN, SPECULATIVE = "plain", "speculative"
# Retried slices, as a share of all: bounds the delay on a machine that is never quiet.
_RETRY_SHARE = 0.5

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Timed:
    """One text by one method. `generation` is None for baselines."""

    tokens: tuple[int, ...]
    seconds: float
    clean: bool
    generation: Generation | None = None

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@dataclass
class Row:
    """One prompt: `runs[method][repetition]`, and what explains a difference."""

    prompt: Prompt
    num_prompt_tokens: int
    runs: dict[str, list[Timed]] = field(default_factory=dict)
    divergence: Divergence | None = None

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

    def as_dict(self) -> dict[str, Any]:
        def rate(method: str) -> float:
            return statistics.median(run.tokens_per_second for run in self.runs[method])

        return {
            "id": self.prompt.id,
            "category": self.prompt.category,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_tokens": len(self.runs[SPECULATIVE][0].tokens),
            "identical": self.identical(SPECULATIVE),
            "speedup": statistics.median(self.ratios(SPECULATIVE, PLAIN)),
            "tokens_per_second": {method: rate(method) for method in self.runs},
            "seconds": {method: [run.seconds for run in runs] for method, runs in self.runs.items()},
            "mean_acceptance_length": summarize(self.rounds(), 0).mean_acceptance_length,
        }


@dataclass
class Comparison:
    """Everything that was measured; every number derives from `rows` and `costs`."""

    rows: list[Row]
    baselines: list[Baseline]
    costs: bare.BareCosts
    repetitions: int
    expects_identity: bool
    num_slices: int
    num_clean: int
    watching: bool
    peak_memory: dict[str, int]

    def rate(self, method: str) -> Interval:
        """Tokens per second over all prompts and repetitions."""
        return bootstrap([[run.tokens_per_second for run in row.runs[method]] for row in self.rows])

    def ratio(self, method: str, other: str) -> Interval:
        """Median of the paired ratios: the same prompt, one after the other."""
        return bootstrap([row.ratios(method, other) for row in self.rows])

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

    def as_dict(self) -> dict[str, Any]:
        """The fields of `specdec compare --json`, but for those that describe the set-up."""
        stats = self.stats()
        taken = stats.as_dict()
        seconds = taken.pop("seconds")
        plain = self.stats(PLAIN)
        return {
            "prompts": len(self.rows),
            "repetitions": self.repetitions,
            "identical": self.num_identical(),
            "expects_identity": self.expects_identity,
            "divergences": [{"id": row.prompt.id, **divergence.as_dict()} for row, divergence in self.divergences],
            "plain": {"tokens_per_second": self.rate(PLAIN).as_dict(), "seconds": plain.seconds},
            "speculative": {"tokens_per_second": self.rate(SPECULATIVE).as_dict()},
            "speedup": {**self.ratio(SPECULATIVE, PLAIN).as_dict(), "baseline": "plain loop"},
            "ideal_speedup": self.ideal_speedup,
            "efficiency": self.efficiency,
            "stats": taken,
            "seconds": {stage: seconds[stage] for stage in STAGES},
            "bare_seconds": {
                "target": {str(width): value for width, value in self.costs.target.items()},
                "draft": self.costs.draft,
                "cached_tokens": self.costs.length,
            },
            "peak_memory_bytes": self.peak_memory,
            "slices": self.num_slices,
            "clean_slices": self.num_clean,
            "clean_means": f"other processes used at most {MAX_OTHERS:.0%} of one core" if self.watching else "unknown",
            "baselines": {baseline.name: self._baseline(baseline) for baseline in self.baselines},
            "rows": [row.as_dict() for row in self.rows],
        }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at the highest point so far: of the process, and on the accelerator if there is one."""
    peak: dict[str, int] = {}
    try:
        import resource
        import sys
    except ImportError:  # no such module on Windows
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _methods(
    decoder: SpeculativeDecoder, options: Mapping[str, Any], baselines: Sequence[Baseline]
) -> dict[str, Callable[[Sequence[int]], tuple[list[int], Generation | None]]]:
    # Every call prefills its prompt, as those that it is compared with do.
    options = {**options, "reuse_prefix": False}

    def speculative(ids: Sequence[int]) -> tuple[list[int], Generation | None]:
        made = decoder.generate(ids, **options)
        return made.tokens, made

    def plain(ids: Sequence[int]) -> tuple[list[int], Generation | None]:
        made = decoder.generate_plain(ids, **{**options, "exact": False})
        return made.tokens, made

    def other(baseline: Baseline) -> Callable[[Sequence[int]], tuple[list[int], None]]:
        return lambda ids: (baseline.generate(ids), None)

    return {PLAIN: plain, SPECULATIVE: speculative, **{b.name: other(b) for b in baselines}}


def _explain(decoder: SpeculativeDecoder, row: Row, options: Mapping[str, Any]) -> Divergence | None:
    """The first repetition that differs. Plain decoding that does not repeat itself is a bug too."""
    plain = row.runs[PLAIN][0].generation
    for run in row.runs[SPECULATIVE]:
        if run.tokens != row.runs[PLAIN][0].tokens:
            assert plain is not None
            assert run.generation is not None
            try:
                return explain(decoder, plain, run.generation, **{**options, "exact": False})
            except InputError as error:
                index = _first_difference(plain.tokens, run.generation.tokens)
                tokens = [text[index] if index < len(text) else None for text in (plain.tokens, run.tokens)]
                dtype = dtype_name(decoder.backend.capabilities.dtype)
                return Divergence(index, len(plain.prompt) + index, tokens[0], tokens[1], BUG, str(error), dtype)
    return None


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def expects_identity(decoder: SpeculativeDecoder, options: Mapping[str, Any]) -> bool:
    """Whether speculative tokens must be the plain ones; else only their distribution is."""
    greedy = options.get("temperature", 0.0) == 0
    return decoder.verifier.lossless and (greedy or decoder.verifier.keeps_seed)


def _encode(
    decoder: SpeculativeDecoder, prompts: Sequence[Prompt], options: Mapping[str, Any], chat: bool
) -> list[tuple[Row, list[int]]]:
    """Rows and token ids of every prompt; refuses what does not fit before any work."""
    encoded = []
    for prompt in prompts:
        try:
            text = [{"role": "user", "content": prompt.text}] if chat else prompt.text
            ids = list(decoder.prepare(text, **options).request.prompt)
        except InputError as error:
            raise type(error)(f"prompt {prompt.id}: {error}") from error
        encoded.append((Row(prompt, len(ids)), ids))
    return encoded


def compare(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any] | None = None,
    *,
    repetitions: int = 3,
    warmup: int = 1,
    baselines: Sequence[Baseline] = (),
    chat: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every method on every prompt, `repetitions` times, one after the other in turns.

    `options` go to `generate`. The order of methods turns from one prompt to the next, so that none always follows
    the same other. `warmup` unmeasured runs of the first prompt come first. Raises `InputError` before any work.

    Lossless: yes where `generate` is; `rows[i].identical(...)` says so for each prompt.
    """
    options = dict(options or {})
    if repetitions < 1 or warmup < 0:
        raise InputError(f"repetitions must be >= 1 and warmup >= 0, not {repetitions} and {warmup}")
    encoded = _encode(decoder, prompts, options, chat)
    if not encoded:
        raise InputError("no prompts to compare on")
    methods = _methods(decoder, options, baselines)
    device = decoder.backend.capabilities.device
    total = len(encoded) * repetitions * len(methods)
    gate = gate or Gate(device, budget=int(total * _RETRY_SHARE))
    for _ in range(warmup):
        for run in methods.values():
            run(encoded[0][1])
    names, done = list(methods), 0
    for repetition in range(repetitions):
        for number, (row, ids) in enumerate(encoded):
            turn = (repetition + number) % len(names)
            for name in names[turn:] + names[:turn]:
                timed = gate.time(lambda name=name, ids=ids: methods[name](ids))  # type: ignore[misc]
                tokens, generation = timed.result
                row.runs.setdefault(name, []).append(Timed(tuple(tokens), timed.seconds, timed.clean, generation))
                done += 1
                if progress is not None:
                    progress(done, total, row.prompt.id)
    rows = [row for row, _ in encoded]
    identity = expects_identity(decoder, options)
    for row in rows:
        if identity and not row.identical(SPECULATIVE):
            row.divergence = _explain(decoder, row, options)
    typical, ids = sorted(encoded, key=lambda pair: pair[0].num_prompt_tokens)[len(encoded) // 2]
    half = typical.runs[PLAIN][0].tokens[: len(typical.runs[PLAIN][0].tokens) // 2]
    widths = bare.choose_widths([r for row in rows for r in row.rounds()])
    return Comparison(
        rows=rows,
        baselines=list(baselines),
        costs=bare.measure(decoder, [*ids, *half], widths),
        repetitions=repetitions,
        expects_identity=identity,
        num_slices=gate.num_slices,
        num_clean=gate.num_clean,
        watching=gate.watching,
        peak_memory=peak_memory(device),
    )
