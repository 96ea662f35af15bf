"""Plain against speculative decoding, interleaved, on a set of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from specdec.bench import bare
from specdec.bench.baselines import Baseline
from specdec.bench.comparison import PLAIN, SPECULATIVE, Comparison, Row, Timed
from specdec.bench.divergence import BUG, Divergence, explain
from specdec.bench.forks import PromptForks
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


# What a method makes of the prompts of one call: tokens, and what there is to know about them.
Made = tuple[list[int], "Generation | None"]
Method = Callable[..., list[Made]]


@dataclass(frozen=True)
class Group:
    """Prompts of one call: one, or as many as decode together. `ids[i]`: those of `rows[i]`."""

    rows: tuple[Row, ...]
    ids: tuple[tuple[int, ...], ...]

    @property
    def name(self) -> str:
        return self.rows[0].id if len(self.rows) == 1 else f"{self.rows[0].id} … {self.rows[-1].id}"


def group(encoded: Sequence[Encoded], batch: int) -> list[Group]:
    """`batch` prompts in a group, in order; fewer in the last one."""
    if not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch is a number of prompts >= 1, not {batch!r}")
    found = []
    for number, start in enumerate(range(0, len(encoded), batch)):
        part = encoded[start : start + batch]
        which = number if batch > 1 else None
        rows = [Row(one.prompt, len(one.ids), turn=one.turn, num_cut=one.num_cut, group=which) for one in part]
        found.append(Group(tuple(rows), tuple(one.ids for one in part)))
    return found


def ways(decoder: SpeculativeDecoder, options: Mapping[str, Any], forked: bool = False) -> dict[str, Method]:
    """The plain loop and the speculative one as functions of a group's ids, and of further options.

    Every call prefills its prompts, as those that it is compared with do, unless they are `forked`.
    """
    options = {**options, "reuse_prefix": forked}

    def made(call: Callable[..., Any], ids: Sequence[Sequence[int]], given: Mapping[str, Any]) -> list[Made]:
        if len(ids) == 1:
            one = call(list(ids[0]), **given)
            return [(one.tokens, one)]
        found = call([list(prompt) for prompt in ids], **given, max_rows=len(ids))
        return [(one.tokens, one) for one in found]

    return {
        PLAIN: lambda ids, **more: made(decoder.generate_plain, ids, {**options, "exact": False, **more}),
        SPECULATIVE: lambda ids, **more: made(decoder.generate, ids, {**options, **more}),
    }


def _methods(
    decoder: SpeculativeDecoder, options: Mapping[str, Any], baselines: Sequence[Baseline], forked: bool
) -> dict[str, Method]:
    def other(baseline: Baseline) -> Method:
        return lambda ids, **_: [(baseline.generate(list(prompt)), None) for prompt in ids]

    return {**ways(decoder, options, forked), **{b.name: other(b) for b in baselines}}


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


def explain_differences(decoder: SpeculativeDecoder, rows: Sequence[Row], options: Mapping[str, Any]) -> bool:
    """Give every row that differs from plain decoding and must not its `divergence`. Whether texts must be the same."""
    identity = expects_identity(decoder, options)
    for row in rows:
        if identity and not row.identical(SPECULATIVE):
            row.divergence = _explain(decoder, row, options)
    return identity


def ready(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    options: Mapping[str, Any],
    chat: Chat | bool | None = None,
) -> list[Encoded]:
    """Prompts as token ids, those that are encoded already as they stand. `InputError` when there are none."""
    if not prompts:
        raise InputError("no prompts to compare on")
    encoded = [prompt for prompt in prompts if isinstance(prompt, Encoded)]
    return encoded or encode_prompts(decoder, [p for p in prompts if isinstance(p, Prompt)], options, chat=chat)


def _run(
    methods: Mapping[str, Method],
    groups: Sequence[Group],
    repetitions: int,
    gate: Gate,
    forks: PromptForks | None,
    progress: Progress | None,
) -> None:
    """Fill the rows' runs: all methods on every group in turns, `repetitions` times."""
    names, done = list(methods), 0
    total = len(groups) * repetitions * len(names)
    for repetition in range(repetitions):
        for number, one in enumerate(groups):
            turn = (repetition + number) % len(names)
            for name in names[turn:] + names[:turn]:
                method = methods[name]
                if forks is not None:
                    forks.ready((name, one.ids), lambda method=method, ids=one.ids: method(ids, max_new_tokens=1))  # type: ignore[misc]
                timed = gate.time(lambda method=method, ids=one.ids: method(ids))  # type: ignore[misc]
                num_tokens = sum(len(tokens) for tokens, _ in timed.result)
                for row, (tokens, generation) in zip(one.rows, timed.result, strict=True):
                    seconds = timed.seconds * len(tokens) / num_tokens
                    row.runs.setdefault(name, []).append(Timed(tuple(tokens), seconds, timed.clean, generation))
                done += 1
                if progress is not None:
                    progress(done, total, one.name)


def compare(
    decoder: SpeculativeDecoder,
    prompts: Sequence[Prompt] | Sequence[Encoded],
    options: Mapping[str, Any] | None = None,
    *,
    repetitions: int = 3,
    warmup: int = 1,
    warmup_prompts: Sequence[Prompt] | Sequence[Encoded] = (),
    baselines: Sequence[Baseline] = (),
    chat: Chat | bool | None = None,
    batch: int = 1,
    forks: PromptForks | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Run every method on every prompt, `repetitions` times, one after the other in turns.

    `prompts`: every turn of each (`encode_prompts`), or what was encoded before, for the same options. `options` go to
    `generate`. The order of methods turns from one prompt to the next, so that none always follows
    the same other. `warmup` unmeasured runs come first, of `warmup_prompts`, or of the first prompt. `batch`: so many
    prompts decode together, plainly and speculatively. `forks`: prompts are prefilled there once, and every call forks
    them; else every call prefills its own. Raises `InputError` before any work.

    Lossless: yes where `generate` is; `rows[i].identical(...)` says so for each prompt.
    """
    options = dict(options or {})
    if repetitions < 1 or warmup < 0:
        raise InputError(f"repetitions must be >= 1 and warmup >= 0, not {repetitions} and {warmup}")
    if baselines and (batch > 1 or forks is not None):
        raise InputError("baselines prefill and decode one prompt at a time: leave batch at 1, and forks out")
    groups = group(ready(decoder, prompts, options, chat), batch)
    warm = group(ready(decoder, warmup_prompts, options, chat), batch)[:1] if warmup_prompts else groups[:1]
    methods = _methods(decoder, options, baselines, forks is not None)
    device = decoder.backend.capabilities.device
    gate = gate or Gate(device, budget=int(len(groups) * repetitions * len(methods) * _RETRY_SHARE))
    with forks.serving(decoder) if forks is not None else nullcontext():
        for _ in range(warmup):
            for run in methods.values():
                run(warm[0].ids)
        _run(methods, groups, repetitions, gate, forks, progress)
    rows = [row for one in groups for row in one.rows]
    identity = explain_differences(decoder, rows, options)
    every = [(row, ids) for one in groups for row, ids in zip(one.rows, one.ids, strict=True)]
    typical, ids = sorted(every, key=lambda pair: pair[0].num_prompt_tokens)[len(every) // 2]
    half = typical.runs[PLAIN][0].tokens[: len(typical.runs[PLAIN][0].tokens) // 2]
    widths = bare.choose_widths([r for row in rows for r in row.rounds()])
    return Comparison(
        rows=rows,
        baselines=list(baselines),
        costs=bare.measure(decoder, [*ids, *half], widths, len(groups[0].rows)),
        repetitions=repetitions,
        expects_identity=identity,
        num_slices=gate.num_slices,
        num_clean=gate.num_clean,
        watching=gate.watching,
        peak_memory=peak_memory(device),
    )
