"""What the studies of this folder share: prompts, texts decoded without a clock, acceptance with intervals, results.

Nothing here is timed. Drafts are of fixed sizes, so that the figures are the same on every machine, up to rounding.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import specdec
from specdec.bench.prompts import Prompt, read_prompts
from specdec.generation import Generation
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.trace import Round, summarize
from specdec.train import provenance

HERE = Path(__file__).parent
RESAMPLES = 1000
console = Console(highlight=False, stderr=True)


def arguments(doc: str | None, parser: argparse.ArgumentParser | None = None, *, tokens: int) -> argparse.Namespace:
    """The command line with what every study takes. One thread: sums come out the same everywhere."""
    parser = parser or argparse.ArgumentParser()
    parser.description, parser.formatter_class = doc, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--limit", type=int, help="so many of the built-in prompts (default: all 16)")
    parser.add_argument("--max-new-tokens", type=int, default=tokens, help=f"of each text (default: {tokens})")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results (default: this one)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    return args


def embedded() -> tuple[Any, Any, Any]:
    """The embedded target, its draft and their tokenizer, in float32."""
    folders = EMBEDDED / "target", EMBEDDED / "draft"
    target, draft = (load_model(folder, device="cpu") for folder in folders)
    return target, draft, load_tokenizer(folders[0])


def prompts(limit: int | None) -> list[Prompt]:
    return read_prompts(None, limit)


def decoder(target: Any, tokenizer: Any, drafter: Any, policy: Any, **options: Any) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(target, tokenizer=tokenizer, drafter=drafter, policy=policy, **options)


def texts(call: Callable[..., Generation], inputs: Iterable[Any], **options: Any) -> list[Generation]:
    """One text for each prompt. Each has a seed of its own: the same noise behind every prompt would be one sample."""
    return [call(each, seed=seed, **options) for seed, each in enumerate(inputs)]


def rounds_of(made: Iterable[Generation]) -> list[Round]:
    return [record for text in made for record in text.trace.rounds]


def interval(groups: Sequence[tuple[float, float]], seed: int = 0) -> dict[str, float]:
    """The ratio of two sums, one pair for each prompt, and its 95 % percentile bootstrap over prompts."""

    def ratio(pairs: Sequence[tuple[float, float]]) -> float:
        below = sum(b for _, b in pairs)
        return sum(a for a, _ in pairs) / below if below else 0.0

    draw = random.Random(seed)
    found = sorted(ratio(draw.choices(groups, k=len(groups))) for _ in range(RESAMPLES))
    return {"mean": ratio(groups), "low": found[int(0.025 * RESAMPLES)], "high": found[int(0.975 * RESAMPLES)]}


def change(pairs: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How much more the ratio of the first is, on the same prompts with the same counts below."""
    assert all(a[1] == b[1] for a, b in zip(pairs, others, strict=True))
    return interval([(a[0] - b[0], a[1]) for a, b in zip(pairs, others, strict=True)])


def acceptance(made: Sequence[Generation]) -> dict[str, Any]:
    """Over all rounds of all texts; `tokens_per_round` has its interval over prompts."""
    stats = summarize(rounds_of(made), sum(len(text.tokens) for text in made))
    pairs = [(sum(1 + r.num_accepted for r in text.trace.rounds), len(text.trace.rounds)) for text in made]
    return {
        "tokens_per_round": interval(pairs),
        "draft_acceptance_rate": stats.draft_acceptance_rate,
        "conditional_acceptance": stats.conditional_acceptance,
        "num_tokens": stats.num_tokens,
        "num_rounds": stats.num_rounds,
    }


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The index of the first token that differs; the shorter length when one text goes on; None for equal texts."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


def agreement(made: Sequence[Generation], reference: Sequence[Generation]) -> dict[str, Any]:
    """How far texts follow those of a reference: how many are equal, and where the others leave."""
    firsts = [first_difference(a.tokens, b.tokens) for a, b in zip(made, reference, strict=True)]
    return {"identical": sum(first is None for first in firsts), "texts": len(firsts), "first_divergences": firsts}


def pair_text(value: Mapping[str, float], digits: int = 2) -> str:
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low}{' to ' if low.startswith('-') else '–'}{high})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


class Rows:
    """Rows of `NAME.json` in the output folder, by name: each is written when it is there, and measured only once.

    Rows of other settings (`--limit`, `--max-new-tokens`) are of another study: they are dropped. Delete the file to
    measure anew.
    """

    def __init__(self, args: argparse.Namespace, name: str):
        self.path = args.out / f"{name}.json"
        self.settings = {"limit": args.limit, "max_new_tokens": args.max_new_tokens}
        self.found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.found = content["rows"] if content["settings"] == self.settings else {}

    def get(self, name: str, measure: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
        """The row of that name; `measure(*given)` when there is none."""
        if name not in self.found:
            console.print(name)
            self.found[name] = {**measure(*given), "date": datetime.date.today().isoformat()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"versions": provenance.versions(), "settings": self.settings, "rows": self.found}
            provenance.write_json(self.path, content)
        return self.found[name]


def publish(args: argparse.Namespace, name: str, title: str, text: str, made: str | None = None) -> None:
    """`NAME.md` in the output folder, dated. `made`: the command and circumstances; by default this one, on one thread.

    What the figures mean is written by hand under the page's last heading, and kept when the study is run again.
    """
    today = datetime.date.today().isoformat()
    if made is None:
        command = " ".join(["python experiments/studies/" + Path(sys.argv[0]).name, *sys.argv[1:]])
        stated = ", ".join(f"{key} {number}" for key, number in provenance.versions().items())
        made = f"`{command}` ({stated}; CPU, float32, one thread; not timed)"
    args.out.mkdir(parents=True, exist_ok=True)
    page = args.out / f"{name}.md"
    heading = "## What it means\n"
    old = page.read_text(encoding="utf-8") if page.exists() else ""
    meaning = old.split(heading, 1)[1].lstrip() if heading in old else "Not written yet.\n"
    page.write_text(f"# {title}, {today}\n\n{made}\n\n{text}\n{heading}\n{meaning}", encoding="utf-8")
    print(text)
