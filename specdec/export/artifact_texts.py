"""Texts that an artefact decodes: against those of full precision, and its plain ones against its speculative ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from specdec.api import SpeculativeDecoder
from specdec.bench.divergence import explain
from specdec.generation import Generation
from specdec.runtime.session import Session


@dataclass(frozen=True)
class Text:
    """Where one greedy text leaves that of full precision. `index`: of the first other token, None: nowhere.

    `margin`: how much less full precision likes that token than its own, in logits; None where one of them ended.
    `tokens`: of full precision's text.
    """

    index: int | None
    margin: float | None
    tokens: int


@dataclass
class Identity:
    """Plain against speculative texts of the artefact. `ties`: of those that differ, by rounding; `bugs`: by more."""

    texts: int = 0
    identical: int = 0
    ties: list[str] = field(default_factory=list)
    bugs: list[str] = field(default_factory=list)
    acceptance: float | None = None
    k: int = 0


def greedy(
    decoders: Mapping[str, SpeculativeDecoder],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    told: Callable[[str], None],
) -> dict[str, list[Text]]:
    """The plain greedy texts of each decoder against those of the first one."""
    full, *others = decoders
    texts: dict[str, list[Text]] = {name: [] for name in others}
    for number, prompt in enumerate(prompts):
        plain = {}
        for name, decoder in decoders.items():
            told(f"text {number + 1}, {name}")
            plain[name] = decoder.generate_plain(list(prompt), max_new_tokens=new_tokens).tokens
        for name in others:
            texts[name].append(_parting(decoders[full], list(prompt), plain[full], plain[name]))
    return texts


@torch.inference_mode()
def _parting(decoder: SpeculativeDecoder, prompt: list[int], full: Sequence[int], other: Sequence[int]) -> Text:
    at = next((i for i, (a, b) in enumerate(zip(full, other, strict=False)) if a != b), min(len(full), len(other)))
    if at in (len(full), len(other)):  # all of one, at least, is the same
        return Text(None if len(full) == len(other) else at, None, len(full))
    session = Session(decoder.backend.fork(0))
    session.append([*prompt, *full[:at]])
    session.prefill()
    logits_V = session.forward().logits[-1]
    return Text(at, float(logits_V[full[at]] - logits_V[other[at]]), len(full))


def speculative(
    decoder: SpeculativeDecoder,
    k: int,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    told: Callable[[str], None],
    rounds: bool = False,
) -> Identity:
    """Texts with the decoder's own drafter, greedy and at temperature 1, that should be its plain ones; none at k 0.

    `rounds`: the graphs round activations. There the last digit of a sum may decide on a whole rounding step, so that a
    difference of rows is no fault as long as it explains the tokens.
    """
    found, accepted, proposed = Identity(k=k), 0, 0
    if not k:
        return found
    for number, prompt in enumerate(prompts):
        for more in ({}, {"temperature": 1.0, "seed": number}):
            told(f"text {number + 1}, speculative")
            options = {"max_new_tokens": new_tokens, **more}
            plain = decoder.generate_plain(list(prompt), **options)
            made = decoder.generate(list(prompt), **options)
            _count(found, decoder, plain, made, options, rounds)
            accepted += made.stats.num_accepted_draft_tokens
            proposed += made.stats.num_draft_tokens
    found.acceptance = accepted / proposed if proposed else None
    return found


def _count(
    found: Identity,
    decoder: SpeculativeDecoder,
    plain: Generation,
    made: Generation,
    options: Mapping[str, Any],
    rounds: bool,
) -> None:
    found.texts += 1
    if plain.tokens == made.tokens:
        found.identical += 1
        return
    why = explain(decoder, plain, made, **options)
    assert why is not None
    explained = rounds and why.gap <= 2 * why.noise
    (found.bugs if why.is_bug and not explained else found.ties).append(str(why))
