"""Plain against speculative decoding, interleaved, on a set of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from specdec.bench import bare
from specdec.bench.baselines import Baseline
from specdec.bench.comparison import PLAIN, SPECULATIVE, Comparison, Row, Timed
from specdec.bench.divergence import BUG, Divergence, explain
from specdec.bench.machine import peak_memory
from specdec.bench.prompt_sets import Encoded, encode_prompts
from specdec.bench.prompts import Prompt
from specdec.bench.timing import Gate
from specdec.dtypes import dtype_name
from specdec.errors import InputError

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.chat import Chat
    from specdec.generation import Generation

# Retried slices, as a share of all: bounds the delay on a machine that is never quiet.
_RETRY_SHARE = 0.5

Progress = Callable[[int, int, str], None]


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


def compare(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    options: Mapping[str, Any] | None = None,
    *,
    repetitions: int = 3,
    warmup: int = 1,
    baselines: Sequence[Baseline] = (),
    chat: Chat | bool | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every method on every prompt, `repetitions` times, one after the other in turns.

    `prompts`: every turn of each (`encode_prompts`), or what was encoded before, for the same options. `options` go to
    `generate`. The order of methods turns from one prompt to the next, so that none always follows
    the same other. `warmup` unmeasured runs of the first prompt come first. Raises `InputError` before any work.

    Lossless: yes where `generate` is; `rows[i].identical(...)` says so for each prompt.
    """
    options = dict(options or {})
    if repetitions < 1 or warmup < 0:
        raise InputError(f"repetitions must be >= 1 and warmup >= 0, not {repetitions} and {warmup}")
    if not prompts:
        raise InputError("no prompts to compare on")
    ready = [prompt for prompt in prompts if isinstance(prompt, Encoded)]
    if not ready:
        ready = encode_prompts(decoder, [p for p in prompts if isinstance(p, Prompt)], options, chat=chat)
    encoded = [(Row(one.prompt, len(one.ids), turn=one.turn, num_cut=one.num_cut), list(one.ids)) for one in ready]
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
                    progress(done, total, row.id)
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
