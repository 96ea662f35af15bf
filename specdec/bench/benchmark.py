"""`specdec bench`, without its screen: gathers the rows, times them, and reports."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from specdec import registry
from specdec.api import SpeculativeDecoder
from specdec.bench import bare, peers, rows, runbench, synthetic, targets
from specdec.bench.draft_vocabulary import Chosen
from specdec.bench.machine import ReadProbe, streamed_bytes
from specdec.bench.profile import profile
from specdec.bench.rows import SPECULATIVE, Absent, Made, Method
from specdec.bench.runbench import BareProbe, Bench, Progress
from specdec.bench.timing import Gate
from specdec.drafter import BuildContext
from specdec.dtypes import dtype_name
from specdec.errors import InputError
from specdec.loading import resolve_drafter
from specdec.quant.linear import num_parameters, stored_as

MODEL = "model"
# The width at which verification is compared with decoding.
_WIDE = 8
# Retried slices, as a share of all: bounds the delay on a machine that is never quiet.
_RETRY_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: loaded models and prompts (token ids). `pair` is set when both were made here.

    `batch`: the prompts of the batched row; the first of them are `prompts`. `vocabulary`: of our draft; None: all.
    `quantize`: what the target's weights were rounded to; those of `pair` are as they were made.
    """

    name: str
    target: Any
    draft: Any
    tokenizer: Any
    prompts: list[list[int]]
    batch: list[list[int]]
    pair: synthetic.Pair | None = None
    vocabulary: Chosen | None = None
    quantize: str | None = None


@dataclass(frozen=True)
class Settings:
    """How it is measured. `ks`: constant draft lengths; `retries`: of a slice that other processes disturbed."""

    backends: tuple[str, ...] = ("eager", "compiled")
    drafters: tuple[str, ...] = (MODEL,)
    ks: tuple[int, ...] = (3, 4, 5, 6)
    peers: tuple[str, ...] = ()
    max_new_tokens: int = 128
    repetitions: int = 3
    retries: int = 3
    transformers: bool = True
    profile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("repetitions", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is a whole number >= {least}, not {getattr(self, name)}")
        if any(k < 1 for k in self.ks):
            raise InputError(f"k is the number of drafted tokens per round, >= 1: {','.join(map(str, self.ks))}")


@dataclass
class _Gathered:
    """Rows before they are timed, and the decoders that they run on: the first of each backend."""

    methods: list[Method] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)
    decoders: dict[str, SpeculativeDecoder] = field(default_factory=dict)
    main: str = ""


def _drafter(name: str, subject: Subject, backend: str) -> Any:
    if name != MODEL:
        return resolve_drafter(name, BuildContext(subject.target, subject.tokenizer, backend=backend))
    if subject.draft is None:
        raise InputError("the model drafter needs a draft model: name one with --drafter FOLDER_OR_HUB_ID")
    vocabulary = subject.vocabulary.vocabulary if subject.vocabulary is not None else None
    return registry.find("drafter", MODEL)(subject.draft, backend=backend, vocabulary=vocabulary)


def _decoders(subject: Subject, settings: Settings, backend: str) -> dict[str, SpeculativeDecoder]:
    """One for each drafter. Raises `UnsupportedModelError` when the backend does not run the models."""
    return {
        name: SpeculativeDecoder(
            subject.target,
            tokenizer=subject.tokenizer,
            drafter=_drafter(name, subject, backend),
            backend=backend,
            prefix_cache=0,  # every row computes its prompt, every time
        )
        for name in settings.drafters
    }


def _warm(decoder: SpeculativeDecoder, say: Callable[[str], None], backend: str) -> None:
    """Compile now what would be compiled when it pays."""
    say(f"preparing: {backend} backend")
    decoder.warmup()


def _our_rows(subject: Subject, settings: Settings, say: Callable[[str], None]) -> _Gathered:
    """All rows on the main backend (cuda or compiled, where one is there); on others the plain loop and the policy's
    choice."""
    opened, absent = rows.split_backends(settings.backends, lambda name: _decoders(subject, settings, name))
    if not opened:
        reasons = "; ".join(row.reason for row in absent)
        raise InputError(f"none of the backends {', '.join(settings.backends)} can be used: {reasons}")
    gathered = _Gathered(absent=absent, main=next(b for b in ("cuda", "compiled", *opened) if b in opened))
    options = {"max_new_tokens": settings.max_new_tokens}
    for backend, decoders in opened.items():
        for name, decoder in decoders.items():
            _warm(decoder, say, backend)
            if backend not in gathered.decoders:
                gathered.decoders[backend] = decoder
                gathered.methods.append(rows.plain_row(decoder, backend, options))
            ks = settings.ks if backend == gathered.main else ()
            gathered.methods += rows.speculative_rows(decoder, backend, name, ks, options)
    main = gathered.decoders[gathered.main]
    batch = rows.batch_row(main, gathered.main, subject.batch, options)
    (gathered.absent if isinstance(batch, Absent) else gathered.methods).append(batch)  # type: ignore[arg-type]
    return gathered


def _probes(
    gathered: _Gathered, subject: Subject, settings: Settings, made: Mapping[str, Made]
) -> dict[str, BareProbe]:
    """Bare forwards behind half a text, at the widths that the warm-up's rounds had."""
    probes = {}
    for backend, decoder in gathered.decoders.items():
        rounds = [r for m in gathered.methods if m.backend == backend for r in made[m.name].rounds]
        widths = sorted({*bare.choose_widths(rounds), _WIDE})
        text = [*subject.prompts[0], *made[f"{backend} plain"].tokens[: settings.max_new_tokens // 2]]
        calls, length = bare.forwards(decoder, text, widths)
        for call in calls.values():
            call()
        probes[backend] = BareProbe(calls, length, decoder.backend.capabilities.device)
    return probes


def benchmark(
    subject: Subject,
    settings: Settings,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `subject` and report it as plain data, targets judged; the fields of `specdec bench --json`.

    Every row is warmed up once, then all are timed in turns on every prompt. Raises `InputError` before any work when
    something is missing.
    """
    device, dtype = subject.target.device, subject.target.dtype
    peers.check(settings.peers, device.type, dtype)
    if settings.peers and subject.pair is None:
        raise InputError("peers run on a synthetic pair's weights; use --preset 134m, or leave --peer out")
    with ExitStack() as stack:
        gathered = _our_rows(subject, settings, say)
        methods, absent = gathered.methods, gathered.absent
        if settings.transformers:
            options = {"max_new_tokens": settings.max_new_tokens}
            main = gathered.decoders[gathered.main]
            methods += rows.transformers_rows(main, subject.draft, settings.ks, options)
        if settings.peers and subject.pair is not None:
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="specdec-bench-", ignore_cleanup_errors=True))
            )
            setting = peers.Setting(
                dtype,
                torch.get_num_threads(),
                settings.ks,
                settings.max_new_tokens,
                folder,
                say,
                stack,
                peers.WEIGHTS[subject.quantize] if subject.quantize else None,
            )
            methods += [method for peer in settings.peers for method in peers.open_peer(peer, subject.pair, setting)]
        methods, failed, made = rows.warm_up(methods, subject.prompts[0], say)
        probes = _probes(gathered, subject, settings, made)
        total = (len(methods) + len(probes) + 1) * len(subject.prompts) * settings.repetitions
        gate = Gate(device, retries=settings.retries, budget=int(total * _RETRY_SHARE))
        bench = runbench.run(
            methods,
            subject.prompts,
            repetitions=settings.repetitions,
            gate=gate,
            probes=probes,
            bandwidth=ReadProbe(device),
            progress=progress,
        )
        bench.absent = [*absent, *failed]
        report = make_report(bench, subject, settings, gathered.main)
        report["backends"] = {
            name: {"describes": decoder.backend.describes, "numerics": decoder.backend.numerics}
            for name, decoder in gathered.decoders.items()
        }
        if settings.profile:
            report["profile"] = [profile(bench, name, subject.prompts[0]) for name in _profiled(bench, gathered.main)]
    report["targets"] = [line.as_dict() for line in targets.judge([report])]
    return report


def _profiled(bench: Bench, main: str) -> list[str]:
    """The plain loop, and the fastest row that drafts with the model."""
    drafting = [m.name for m in bench.methods if m.backend == main and m.mode == SPECULATIVE and m.drafter == MODEL]
    best = sorted(drafting, key=lambda name: bench.milliseconds(name).median)[:1]
    return [f"{main} plain", *best]


def agreement(bench: Bench, main: str) -> float | None:
    """Share of the drafted tokens that were decided about and accepted, over the constant-k rows of the model."""
    names = [m.name for m in bench.methods if m.backend == main and m.drafter == MODEL and m.k is not None]
    rounds = [r for name in names for r in bench.rounds(name)]
    evaluated = sum(r.num_evaluated for r in rounds)
    return sum(r.num_accepted for r in rounds) / evaluated if evaluated else None


def machine(bench: Bench, subject: Subject) -> dict[str, Any]:
    """The read bandwidth, and the share of it that the fastest backend's plain step reaches.

    A machine that others share may read at half its best speed for minutes: a step is compared with its turn's reading.
    """
    steps = {backend: probe.costs.target[1] for backend, probe in bench.probes.items()}
    backend = min(steps, key=steps.__getitem__)
    streamed = streamed_bytes(subject.target, bench.probes[backend].length)
    best = max(bench.bandwidth)
    pairs = zip(bench.probes[backend].plain_steps, bench.bandwidth, strict=True)
    return {
        "read_bytes_per_second": best,
        "read_bytes_per_second_median": sorted(bench.bandwidth)[len(bench.bandwidth) // 2],
        "read_by": ReadProbe.describe(subject.target.device),
        "bytes_per_token": streamed,
        "backend": backend,
        "step_ms": 1e3 * steps[backend],
        "share": statistics.median(streamed / seconds / reading for seconds, reading in pairs),
        "share_of_best": streamed / steps[backend] / best,
    }


def make_report(bench: Bench, subject: Subject, settings: Settings, main: str) -> dict[str, Any]:
    """What the timings say; the targets are judged on it."""
    draft, pair = subject.draft, subject.pair
    return {
        "preset": subject.name,
        "parameters": {
            "target": num_parameters(subject.target),
            "draft": num_parameters(draft) if draft is not None else None,
        },
        "stored_as": {
            "target": stored_as(subject.target),
            "draft": stored_as(draft) if draft is not None else None,
        },
        "pair": {"scale": pair.scale, "seed": pair.seed} if pair is not None else None,
        "agreement": agreement(bench, main),
        "draft_vocabulary": subject.vocabulary.as_dict() if subject.vocabulary is not None else None,
        "dtype": dtype_name(subject.target.dtype),
        "device_type": subject.target.device.type,
        "threads": torch.get_num_threads(),
        "prompts": len(subject.prompts),
        "prompt_tokens": [len(prompt) for prompt in subject.prompts],
        "max_new_tokens": settings.max_new_tokens,
        "repetitions": settings.repetitions,
        "backend": main,
        "rows": [bench.row(method, f"{main} plain") for method in bench.methods],
        "absent": [{"name": row.name, "reason": row.reason} for row in bench.absent],
        "bare": bench.bare(),
        "machine": machine(bench, subject),
        **bench.slices(),
    }


def make_prompts(texts: Sequence[str], tokenizer: Any, number: int, length: int) -> list[list[int]]:
    """The first `number` texts that have `length` tokens, cut to them; shorter ones fill up when there are too few."""
    encoded = [list(tokenizer(text)["input_ids"])[:length] for text in texts]
    long = [ids for ids in encoded if len(ids) == length]
    return (long + [ids for ids in encoded if ids and len(ids) < length])[:number]
