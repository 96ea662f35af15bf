"""What `specdec bench` times: one `Method` per row of its table, each a way to make the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from specdec import registry
from specdec.bench import baselines
from specdec.errors import InputError, UnsupportedModelError
from specdec.policy import Fixed, Policy
from specdec.trace import Round

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.generation import Generation

T = TypeVar("T")

OURS, TRANSFORMERS = "specdec", "transformers"
PLAIN, SPECULATIVE, BATCH = "plain", "speculative", "batch"
BATCH_SIZE = 8


@dataclass(frozen=True)
class Made:
    """What one timed call made. `seconds`: by the engine's own clock, where a call does more than make the text.

    `texts`: one by one, where several were made; `tokens` then holds them all.
    """

    tokens: tuple[int, ...]
    steps: int = 0  # target forwards for these tokens; 0: not known
    seconds: float | None = None
    prefill_seconds: float = 0.0
    rounds: tuple[Round, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Method:
    """One row. `base` names the row that is its own plain mode; `k` is None where a policy chooses.

    `cpu_seconds`: used so far by the process in which it runs, where that goes on beside this one.
    """

    name: str
    engine: str
    mode: str
    base: str
    describes: str
    run: Callable[[Sequence[int]], Made]
    backend: str | None = None
    drafter: str | None = None
    k: int | None = None
    cpu_seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Absent:
    """A row that cannot be measured here, and why."""

    name: str
    reason: str


def made_by_us(generation: Generation) -> Made:
    trace = generation.trace
    return Made(
        tuple(generation.tokens),
        steps=len(trace.rounds),
        prefill_seconds=trace.prefill_seconds,
        rounds=tuple(trace.rounds),
    )


def split_backends(names: Sequence[str], make: Callable[[str], T]) -> tuple[dict[str, T], list[Absent]]:
    """What `make` makes with each backend that is installed and runs the model here; rows that say why others do not.

    `make` takes a backend's name, and raises `UnsupportedModelError` where the backend does not run the model.
    """
    there = registry.available("backend")
    made, absent = {}, []
    for name in names:
        if name not in there:
            absent.append(Absent(f"specdec {name}", f"no backend is called {name!r} here"))
            continue
        try:
            made[name] = make(name)
        except UnsupportedModelError as error:
            absent.append(Absent(f"specdec {name}", str(error)))
    return made, absent


def plain_row(decoder: SpeculativeDecoder, backend: str, options: dict[str, Any]) -> Method:
    name = f"{backend} plain"
    return Method(
        name,
        OURS,
        PLAIN,
        name,
        f"our loop, {backend} backend, one token per step",
        lambda prompt: made_by_us(decoder.generate_plain(prompt, **options)),
        backend,
    )


def speculative_rows(
    decoder: SpeculativeDecoder, backend: str, drafter: str, ks: Sequence[int], options: dict[str, Any]
) -> list[Method]:
    """The decoder's own policy, then constant draft lengths."""

    def row(policy: Policy, k: int | None) -> Method:
        label = "policy" if k is None else f"k={k}"
        return Method(
            f"{backend} {drafter} {label}",
            OURS,
            SPECULATIVE,
            f"{backend} plain",
            f"our loop, {backend} backend, {drafter} drafter, {policy.name}",
            lambda prompt: made_by_us(decoder.generate(prompt, policy=policy, **options)),
            backend,
            drafter,
            k,
        )

    return [row(decoder.policy, None), *(row(Fixed(k), k) for k in ks)]


def batch_row(
    decoder: SpeculativeDecoder, backend: str, prompts: Sequence[Sequence[int]], options: dict[str, Any]
) -> Method | Absent:
    """Plain decoding of several prompts at once, the timed ones first; `Absent` when only one is taken at a time."""
    name = f"{backend} plain batch {len(prompts)}"
    texts: Any = [list(prompt) for prompt in prompts]
    try:
        tried: Any = decoder.generate_plain(texts, **{**options, "max_new_tokens": 1})
        if not isinstance(tried, (list, tuple)) or len(tried) != len(texts):
            return Absent(name, "this decoder does not return one text per prompt")
    except InputError as error:
        return Absent(name, f"this decoder takes no lists of prompts ({str(error).split(';')[0]})")

    def run(_: Sequence[int]) -> Made:
        made: Any = decoder.generate_plain(texts, **options)
        each = tuple(tuple(generation.tokens) for generation in made)
        return Made(tuple(token for text in each for token in text), texts=each)

    return Method(name, OURS, BATCH, f"{backend} plain", f"our loop, {len(texts)} prompts at once", run, backend)


def transformers_rows(
    decoder: SpeculativeDecoder, draft: Any, ks: Sequence[int], options: dict[str, Any]
) -> list[Method]:
    """`generate`: eager, with a static cache and compiled, assisted by default and with each constant k."""

    def plain(baseline: baselines.Baseline) -> Method:
        return Method(
            baseline.name,
            TRANSFORMERS,
            PLAIN,
            "hf",
            baseline.describes,
            lambda prompt: Made(tuple(baseline.generate(prompt))),
        )

    def assisted(k: int | None) -> Method:
        baseline = baselines.assisted(decoder, options, draft, k)

        def run(prompt: Sequence[int]) -> Made:
            calls = 0

            def count(*_: Any) -> None:
                nonlocal calls
                calls += 1

            handle = decoder.target.register_forward_hook(count)
            try:
                tokens = tuple(baseline.generate(prompt))
            finally:
                handle.remove()
            return Made(tokens, calls)

        return Method(baseline.name, TRANSFORMERS, SPECULATIVE, "hf", baseline.describes, run, drafter="model", k=k)

    rows = [plain(baselines.plain(decoder, options)), plain(baselines.static(decoder, options))]
    if draft is not None:
        rows += [assisted(k) for k in (None, *ks)]
    return rows


def warm_up(
    methods: Sequence[Method], prompt: Sequence[int], say: Callable[[str], None]
) -> tuple[list[Method], list[Absent], dict[str, Made]]:
    """Run each once, unmeasured. One that fails becomes an absent row with its error, and the others go on."""
    kept, absent, made = [], [], {}
    for method in methods:
        say(f"warming up: {method.name}")
        try:
            made[method.name] = method.run(prompt)
        except Exception as error:
            if method.engine == OURS:
                raise
            # Someone else's engine: the rest of the table is still worth having.
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            absent.append(Absent(method.name, first))
            continue
        kept.append(method)
    return kept, absent, made
