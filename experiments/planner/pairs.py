"""The pairs of these studies, and their prompts: those that a plan sees, and those that speed is measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import specdec
from specdec.bench.prompts import Prompt
from specdec.bench.synthetic import PRESETS, make_pair, make_prompts, piece
from specdec.bench.timing import Interval
from specdec.train import stdlib

# Lines of a prompt, and of the file before it is too short for one.
_LINES, _LEAST = 8, 40


@dataclass
class Pair:
    """`planned` and `measured` have no prompt in common. `options` go to every text."""

    name: str
    threads: int
    planned: list[Prompt]
    measured: list[Prompt]
    repetitions: int
    options: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    _decoders: dict[tuple[str, str], Any] = field(default_factory=dict)

    def decoder(self, drafter: str, verifier: str = "coupled") -> Any:
        """Made once; its steps are compiled before anything is measured."""
        key = drafter, verifier
        if key not in self._decoders:
            self._decoders[key] = self._make(drafter, verifier)
            self._decoders[key].warmup()
        return self._decoders[key]

    def _make(self, drafter: str, verifier: str) -> Any:
        if not self.parts:
            return specdec.load(drafter=drafter, verifier=verifier, prefix_cache=0)
        return specdec.SpeculativeDecoder(
            self.parts["target"], tokenizer=self.parts["tokenizer"], drafter=self.parts["draft"], verifier=verifier,
            prefix_cache=0,
        )  # fmt: skip


def excerpts() -> list[Prompt]:
    """Beginnings of functions and classes in files of the standard library that the embedded pair never saw."""
    found = []
    for number, document in enumerate(stdlib.documents()):
        if not document.held_out:
            continue
        lines = document.text.splitlines(keepends=True)
        starts = [i for i, line in enumerate(lines[:-_LEAST]) if line.startswith(("def ", "class "))]
        found += [Prompt(f"{number}:{i}", "".join(lines[i : i + _LINES]).rstrip("\n"), "held out") for i in starts]
    random.Random(0).shuffle(found)
    return found


def embedded(quick: bool = False) -> Pair:
    """Float32, one thread; 40 prompts to plan on, 40 others to measure on, once each."""
    torch.set_num_threads(1)
    prompts = excerpts()
    plan, measure = (2, 2) if quick else (40, 40)
    return Pair("embedded", 1, prompts[:plan], prompts[plan : plan + measure], 1)


def synthetic(quick: bool = False, preset: str = "134m") -> Pair:
    """Bfloat16, two threads; the texts of such a pair are much alike, so fewer of them are enough."""
    torch.set_num_threads(2)
    preset = "tiny" if quick else preset
    pair = make_pair(preset, dtype=torch.bfloat16, share=False)
    plan, measure = (2, 2) if quick else (12, 12)

    def prompts(number: int, seed: int) -> list[Prompt]:
        rows = make_prompts(PRESETS[preset], number, 64, seed)
        return [Prompt(f"{seed}:{i}", "".join(map(piece, row))) for i, row in enumerate(rows)]

    parts = {"target": pair.target, "draft": pair.draft, "tokenizer": pair.tokenizer}
    options = {"eos_token_id": []}
    return Pair(preset, 2, prompts(plan, 0), prompts(measure, 1), 1, options, parts)


def pooled(seconds: Sequence[tuple[float, ...]]) -> Interval:
    """Plain seconds of all prompts over the others, from (plain, other) of each; 95 % by bootstrap over prompts."""

    def ratio(of: Sequence[tuple[float, ...]]) -> float:
        return sum(plain for plain, _ in of) / sum(other for _, other in of)

    draw = random.Random(0)
    drawn = sorted(ratio(draw.choices(seconds, k=len(seconds))) for _ in range(1000))
    return Interval(ratio(seconds), drawn[24], drawn[975])
