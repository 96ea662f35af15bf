"""What keys and values in fewer bits cost: quality, and acceptance with the target's, the draft's or both stored so.

    python experiments/quantised/kv.py

The embedded pair in float32. Loss, KL and first choices on held-out text, and greedy texts, as `quality.py` judges
weights; each text is read through a cache of the format. Acceptance: four drafted tokens a round behind the built-in
prompts, greedy and at temperature 1. Not timed. Writes `kv.json` and `kv.md`.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from quality import HERE, PROMPTS, Judge, embedded
from rich.console import Console
from specdec.drafters import ModelDrafter
from torch import Tensor

import specdec
from specdec.bench.prompts import read_prompts
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.quant.kv import KV_CACHES, bytes_per_token
from specdec.runtime.session import Session
from specdec.trace import summarize
from specdec.train import provenance
from specdec.tree import TokenTree

K, TEMPERATURES = 4, (0.0, 1.0)
FULL = "as computed"


class Cached:
    """A model as `Judge` calls it, on a cache of one format: every position reads what is stored of those before it."""

    def __init__(self, model: Any, kv_cache: str | None):
        self.backend = specdec.SpeculativeDecoder(model, kv_cache=kv_cache, prefix_cache=0).backend

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        tokens = input_ids[0].tolist()
        session = Session(self.backend.fork(0))
        session.append(tokens[:1])
        return SimpleNamespace(logits=session.forward(TokenTree.chain(tokens[1:])).logits[None])


def quality(judge: Judge, kv_cache: str | None) -> dict[str, Any]:
    found = judge.judge(Cached(judge.model, kv_cache))
    size = bytes_per_token(judge.model.config, torch.bfloat16, kv_cache)
    return {"kv_cache": kv_cache or FULL, "bytes_per_token": size, **found}


def acceptance(judge: Judge, target_cache: str | None, draft_cache: str | None, args: Any) -> list[dict[str, Any]]:
    draft, tokenizer = load_model(EMBEDDED / "draft", device="cpu"), load_tokenizer(EMBEDDED / "target")
    decoder = specdec.SpeculativeDecoder(
        judge.model,
        tokenizer=tokenizer,
        drafter=ModelDrafter(draft, kv_cache=draft_cache),
        policy=Fixed(K),
        kv_cache=target_cache,
        prefix_cache=0,
    )
    rows = []
    for temperature in TEMPERATURES:
        options = {"max_new_tokens": args.max_new_tokens, "temperature": temperature}
        rounds, same = [], 0
        for seed, prompt in enumerate(read_prompts(None, args.limit)):
            made = decoder.generate(prompt.text, seed=seed, **options)
            same += made.tokens == decoder.generate_plain(prompt.text, seed=seed, **options).tokens
            rounds += made.trace.rounds
        stats = summarize(rounds, 0)
        rows.append(
            {
                "target": target_cache or FULL,
                "draft": draft_cache or FULL,
                "temperature": temperature,
                "tokens_per_round": stats.mean_acceptance_length,
                "draft_acceptance_rate": stats.draft_acceptance_rate,
                "own_plain_text": f"{same}/{args.limit}",
            }
        )
    return rows


def table(header: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def page(judged: list[dict[str, Any]], accepted: list[dict[str, Any]]) -> str:
    full, lines = judged[0]["loss"], []
    for row in judged:
        firsts = [first for first in row["first_divergences"] if first is not None]
        lines.append(
            [
                row["kv_cache"],
                row["bytes_per_token"],
                f"{row['loss']:.4f} ({row['loss'] - full:+.4f})",
                f"{max(row['kl'], 0.0):.6f}",
                f"{row['agreement']:.2%}",
                f"{len(row['first_divergences']) - len(firsts)}/{len(row['first_divergences'])}",
                f"{statistics.median(firsts):g}" if firsts else "–",
                f"{statistics.median(row['margins']):.3f}" if firsts else "–",
            ]
        )
    header = ["keys and values", "bytes per token (else bfloat16)", "loss", "KL", "same first choice", 
              "greedy texts the same", "first divergence, median", "margin there, median"]  # fmt: skip
    text = table(header, lines) + "\n"
    lines = [
        [
            row["target"],
            row["draft"],
            f"{row['temperature']:g}",
            f"{row['tokens_per_round']:.3f}",
            f"{row['draft_acceptance_rate']:.1%}",
            row["own_plain_text"],
        ]
        for row in accepted
    ]
    header = ["target's", "draft's", "temperature", "tokens per round", "of drafted accepted", "its own plain text"]
    return text + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=PROMPTS, help=f"prompts of the acceptance (default: {PROMPTS})")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console, judge = Console(highlight=False, stderr=True), embedded()
    formats = (None, *KV_CACHES)
    judged, accepted = [], []
    for format in formats:
        console.print(f"quality of {format or FULL}")
        judged.append(quality(judge, format))
    for target, draft in [(None, None), *((t, d) for f in KV_CACHES for t, d in ((f, None), (None, f), (f, f)))]:
        console.print(f"acceptance: target {target or FULL}, draft {draft or FULL}")
        accepted += acceptance(judge, target, draft, args)
    text = page(judged, accepted)
    today, versions = datetime.date.today().isoformat(), provenance.versions()
    args.out.mkdir(parents=True, exist_ok=True)
    content = {"date": today, "versions": versions, "quality": judged, "acceptance": accepted}
    provenance.write_json(args.out / "kv.json", content)
    command = " ".join(["python experiments/quantised/kv.py", *sys.argv[1:]])
    stated = ", ".join(f"{name} {number}" for name, number in versions.items())
    (args.out / "kv.md").write_text(
        f"# Keys and values in fewer bits, {today}\n\n`{command}` ({stated}; CPU, float32, one thread; k = {K})\n\n"
        f"{text}", encoding="utf-8"
    )  # fmt: skip
    print(text)


if __name__ == "__main__":
    main()
