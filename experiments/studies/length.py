"""Acceptance along a text: does a draft get better or worse as the text grows?

    python experiments/studies/length.py                448 new tokens behind the first 32 tokens of each prompt

Rounds are counted where they begin, in bins of 64 new tokens. Four drafted tokens a round whatever the drafter thinks
of its chances, so that a change with the position is the drafter's and not the policy's; a lookup that finds nothing
drafts nothing. Beside it, how much of the text stands in it already: the share of 4-grams that occurred before.
Ends of text are ignored: the context of the embedded pair, 512 tokens, is filled to 480.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import study

from specdec.drafter import BuildContext
from specdec.generation import Generation
from specdec.loading import EMBEDDED, resolve_drafter
from specdec.policy import Fixed

K, BIN, PROMPT = 4, 64, 32
DRAFTERS = ("model", "eagle", "medusa", "ngram", "suffix", "hybrid")
TEMPERATURES = (0.0, 1.0)


def binned(made: Sequence[Generation], num_bins: int) -> list[list[tuple[float, float]]]:
    """By bin, for each text: tokens emitted and rounds."""
    bins = [[(0.0, 0.0)] * len(made) for _ in range(num_bins)]
    for number, text in enumerate(made):
        done = 0
        for record in text.trace.rounds:
            emitted, rounds = bins[min(done // BIN, num_bins - 1)][number]
            bins[min(done // BIN, num_bins - 1)][number] = (emitted + 1 + record.num_accepted, rounds + 1)
            done += record.num_emitted
    return bins


def repeated(made: Sequence[Generation], num_bins: int, n: int = 4) -> list[float]:
    """The share of each bin's n-grams that occurred before, in the prompt or in the text."""
    found, total = [0] * num_bins, [0] * num_bins
    for text in made:
        tokens = [*text.prompt, *text.tokens]
        first = {}
        for end in range(n, len(tokens) + 1):
            known = first.setdefault(tuple(tokens[end - n : end]), end) < end
            index = end - 1 - len(text.prompt)
            if index >= 0:
                found[min(index // BIN, num_bins - 1)] += known
                total[min(index // BIN, num_bins - 1)] += 1
    return [a / b if b else 0.0 for a, b in zip(found, total, strict=True)]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    target, _, tokenizer = study.embedded()
    context = BuildContext(
        target, tokenizer, device=target.device, dtype=target.dtype, target_source=str(EMBEDDED / "target")
    )
    inputs = [tokenizer(prompt.text)["input_ids"][:PROMPT] for prompt in study.prompts(args.limit)]
    num_bins = -(-args.max_new_tokens // BIN)

    def row(name: str, temperature: float) -> dict[str, Any]:
        decoder = study.decoder(target, tokenizer, resolve_drafter(name, context), Fixed(K), prefix_cache=0)
        options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature, "eos_token_id": []}
        made = study.texts(decoder.generate, inputs, **options)
        return {
            "drafter": name,
            "temperature": temperature,
            "tokens_per_round": [study.interval(pairs) for pairs in binned(made, num_bins)],
            "all": study.acceptance(made)["tokens_per_round"],
            "repeated": repeated(made, num_bins),
        }

    kept = study.Rows(args, "length")
    return [
        kept.get(f"{name}, temperature {temperature:g}", row, name, temperature)
        for name in args.drafters
        for temperature in TEMPERATURES
    ]


def page(rows: list[dict[str, Any]]) -> str:
    parts = []
    for temperature in TEMPERATURES:
        mine = [row for row in rows if row["temperature"] == temperature]
        count = len(mine[0]["tokens_per_round"])
        header = ["drafter", *(f"{BIN * i}–{BIN * (i + 1) - 1}" for i in range(count)), "all"]
        lines = [
            [row["drafter"], *(study.pair_text(value) for value in (*row["tokens_per_round"], row["all"]))]
            for row in mine
        ]
        # All drafters write the same text: the shared noise keeps it.
        lines.append(["*4-grams that occurred before*", *(f"{share:.0%}" for share in mine[0]["repeated"]), ""])
        parts.append(f"## Temperature {temperature:g}: tokens per round\n\n{study.table(header, lines)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--drafters", nargs="+", default=DRAFTERS)
    args = study.arguments(__doc__, parser, tokens=448)
    rows = measure(args)
    study.publish(args, "length", "Acceptance along a text", page(rows))


if __name__ == "__main__":
    main()
