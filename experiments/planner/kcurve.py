"""Speed against the number of drafted tokens, up to 50: a peak, and then less than plain decoding.

    python experiments/planner/kcurve.py [--out FOLDER]

The embedded pair (float32, one thread, greedy, 64 new tokens, draft model, a fixed k): plain decoding and every k in
turns on each prompt, gated; and what the planner predicts for the same k from other prompts. Four minutes on a quiet
machine. `picture.py` draws it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pairs
from rich.console import Console
from rich.progress import Progress

from specdec.bench.timing import Gate, Slice
from specdec.cli.screen import versions
from specdec.fit.plan import circumstances
from specdec.planner.cache import Store
from specdec.planner.planner import make_plan
from specdec.policy import Fixed
from specdec.train.provenance import write_json

HERE = Path(__file__).parent
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 50)
TOKENS = 64


def measure(decoder: Any, prompts: list[str], repetitions: int) -> tuple[dict[int, list[list[Slice[Any]]]], Gate]:
    """Slices of every k (0: plain) by prompt and repetition, in turns."""
    options = {"max_new_tokens": TOKENS}
    found: dict[int, list[list[Slice[Any]]]] = {k: [[] for _ in prompts] for k in (0, *LENGTHS)}
    total = len(found) * len(prompts) * repetitions
    gate = Gate(budget=total // 4)
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("measuring", total=total)
        for repetition in range(repetitions):
            for number, prompt in enumerate(prompts):
                ids = decoder.encode(prompt)
                turn = (repetition + number) % len(found)
                for k in [*list(found)[turn:], *list(found)[:turn]]:
                    call = partial(decoder.generate_plain if k == 0 else decoder.generate, ids, **options)
                    found[k][number].append(gate.time(partial(call, policy=Fixed(k)) if k else call))
                    progress.advance(task)
                    progress.refresh()
    return found, gate


def rows_of(found: dict[int, list[list[Slice[Any]]]], predicted: dict[int, Any]) -> list[dict[str, Any]]:
    rows = []
    plain = [[one.seconds for one in group] for group in found[0]]
    texts = [group[0].result.tokens for group in found[0]]
    for k in LENGTHS:
        slices = found[k]
        taken = [sum(one.seconds for one in group) for group in slices]
        interval = pairs.pooled(list(zip(map(sum, plain), taken, strict=True)))
        rounds = [len(one.result.trace.rounds) for group in slices for one in group]
        tokens = [len(one.result.tokens) for group in slices for one in group]
        same = sum(all(one.result.tokens == text for one in group) for text, group in zip(texts, slices, strict=True))
        rows.append(
            {
                "k": k,
                "speedup": interval.as_dict(),
                "predicted": {name: getattr(predicted[k], name) for name in ("speedup", "low", "high")},
                "tokens_per_round": sum(tokens) / sum(rounds),
                "identical": f"{same}/{len(texts)}",
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    pair = pairs.embedded()
    decoder = pair.decoder("model")
    report = make_plan(
        decoder, [prompt.text for prompt in pair.planned[: 2 * args.prompts]], {"max_new_tokens": TOKENS},
        lengths=LENGTHS, with_trees=False, seconds=30.0, store=Store(args.out / "runs", fresh=True),
    )  # fmt: skip
    found, gate = measure(decoder, [prompt.text for prompt in pair.measured[: args.prompts]], args.repetitions)
    rows = rows_of(found, {row.setting.k: row for row in report.rows})
    result = {
        "date": datetime.date.today().isoformat(), "versions": versions(), "max_new_tokens": TOKENS,
        "circumstances": circumstances(decoder.target, decoder.drafter), "prompts": args.prompts,
        "repetitions": args.repetitions, "clean": gate.num_clean, "slices": gate.num_slices, "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "kcurve.json", result)

    def interval(middle: float, low: float, high: float) -> str:
        return f"{middle:.2f} ({low:.2f} to {high:.2f})"

    lines = [
        f"| {row['k']} | {interval(*row['speedup'].values())} | {interval(*row['predicted'].values())} | "
        f"{row['tokens_per_round']:.2f} | {row['identical']} |"
        for row in rows
    ]
    text = (
        f"# Speed against k\n\n{result['date']}, {result['circumstances']['device']}, one thread, float32; the "
        f"embedded pair, greedy, {TOKENS} new tokens, {args.prompts} prompts × {args.repetitions}; clean timings "
        f"{gate.num_clean} of {gate.num_slices}. Whole calls over our own plain loop, all prompts together. Printed by "
        "`python experiments/planner/kcurve.py`.\n\n"
        "| k | measured | predicted from other prompts | tokens per round | same text |\n|---|---|---|---|---|\n"
        + "\n".join(lines) + "\n"
    )  # fmt: skip
    (args.out / "kcurve.md").write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps({"peak": max(rows, key=lambda row: row["speedup"]["median"])["k"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
