"""Weights in fewer bits with and without speculation: measured cells beside the product of their parts.

    python experiments/quantised/grid.py [--preset 350m | --preset embedded] [--k 4] [--formats int8,mxfp4] [--out DIR]

One interleaved run: in turns each format's plain loop and its speculative one (a draft model, stored in the same
format), the loop on full-precision weights among them, and transformers' eager `generate`. The synthetic pair is of
the size that the name says and meaningless text (`specdec.bench.synthetic`), in bfloat16; the embedded pair is in
float32 on one thread. `product`: what the format alone and speculation alone would give together, if they did not meet
in the same bytes. Every speculative text is compared with its own format's plain text. Graphs are compiled first (once
per machine); measuring takes about six minutes. Files are dated and carry the command.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from specdec.drafters import ModelDrafter

import specdec
from specdec.bench.baselines import Baseline, build
from specdec.bench.prompts import read_prompts
from specdec.bench.synthetic import make_pair, make_prompts
from specdec.bench.timing import Gate, Slice, bootstrap
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.policy import Fixed
from specdec.quant.linear import PackedLinear
from specdec.quant.methods import prepare_model

HERE = Path(__file__).parent
FULL = "full precision"
FORMATS = ("int8", "mxfp6_e2m3", "mxfp4", "int4", "sparse")
GENERATE = "transformers generate"


def weight_bytes(model: Any) -> int:
    """Of all that a step reads: the layers' weights, packed or not; the embedding is looked up, not read."""
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]
    plain = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    return sum(m.num_bytes for m in packed) + sum(m.weight.nbytes for m in plain)


def models(preset: str) -> tuple[Any, Any, Any, list[list[int]]]:
    """Target, draft, tokenizer and prompts."""
    if preset == "embedded":
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(EMBEDDED / "target")
        prompts = [tokenizer(prompt.text)["input_ids"] for prompt in read_prompts()[:4]]
        return load_model(EMBEDDED / "target"), load_model(EMBEDDED / "draft"), tokenizer, prompts
    pair = make_pair(preset, dtype=torch.bfloat16, share=False)
    return pair.target, pair.draft, pair.tokenizer, make_prompts(pair.shape, 2, 64)


class Cell:
    """One format: its decoder, and what both loops took and said."""

    def __init__(self, name: str, target: Any, draft: Any, tokenizer: Any, k: int):
        if name != FULL:
            target, draft = prepare_model(target, name), prepare_model(draft, name)
        self.name, self.bytes, self.draft_bytes = name, weight_bytes(target), weight_bytes(draft)
        self.decoder = specdec.SpeculativeDecoder(
            target, tokenizer=tokenizer, drafter=ModelDrafter(draft), policy=Fixed(k), prefix_cache=0
        )

    def runs(self, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{self.name} plain": partial(self.decoder.generate_plain, ids, **options),
            f"{self.name} speculative": partial(self.decoder.generate, ids, **options),
        }


def measure(
    cells: list[Cell], baseline: Baseline, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": []}
    slices: dict[str, list[list[Slice[Any]]]] = {}
    total = (2 * len(cells) + 1) * len(prompts) * args.repetitions
    gate = Gate(retries=3, budget=total // 2)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=total)
        for ids in prompts:
            calls = {name: call for cell in cells for name, call in cell.runs(ids, options).items()}
            calls[GENERATE] = partial(baseline.generate, ids)
            for name in calls:
                slices.setdefault(name, []).append([])
            for turn in range(args.repetitions):
                order = list(calls)[turn:] + list(calls)[:turn]
                for name in order:
                    slices[name][-1].append(gate.time(calls[name]))
                    progress.advance(task)
    return {"slices": slices, "clean": gate.num_clean, "of": gate.num_slices}


def ratios(slices: dict[str, list[list[Slice[Any]]]], name: str, over: str) -> Any:
    pairs = [list(zip(slices[over], slices[name], strict=True))[i] for i in range(len(slices[name]))]
    return bootstrap([[b.seconds / a.seconds for b, a in zip(base, mine, strict=True)] for base, mine in pairs])


def rows_of(cells: list[Cell], slices: dict[str, list[list[Slice[Any]]]], tokens: int) -> list[dict[str, Any]]:
    full = f"{FULL} plain"
    alone = ratios(slices, f"{FULL} speculative", full).median
    rows = []
    for cell in cells:
        plain, fast = f"{cell.name} plain", f"{cell.name} speculative"
        texts = [(group[0].result, other) for group, other in zip(slices[plain], slices[fast], strict=True)]
        same = sum(all(one.result.tokens == text.tokens for one in other) for text, other in texts)
        drafted = [one.result.stats.mean_acceptance_length for group in slices[fast] for one in group]
        first = ratios(slices, plain, full)
        rows.append(
            {
                "weights": cell.name,
                "target_megabytes": cell.bytes / 1e6,
                "draft_megabytes": cell.draft_bytes / 1e6,
                "ms_per_token": bootstrap(
                    [[1e3 * one.seconds / tokens for one in group] for group in slices[plain]]
                ).as_dict(),
                "plain": first.as_dict(),
                "speculative": ratios(slices, fast, full).as_dict(),
                "over_own_plain": ratios(slices, fast, plain).as_dict(),
                "product": first.median * alone,
                "over_generate": ratios(slices, fast, GENERATE).as_dict(),
                "tokens_per_round": sum(drafted) / len(drafted),
                "identical": f"{same}/{len(texts)}",
            }
        )
    return rows


def text_of(report: dict[str, Any]) -> str:
    def interval(value: dict[str, float]) -> str:
        return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"

    head = ["weights", "target MB", "plain, ms per token", "plain ×", "speculative ×", "product of parts",
            "measured / product", "× its own plain", "× transformers generate", "tokens per round",
            "own text"]  # fmt: skip
    lines = []
    for row in report["rows"]:
        cells = [row["weights"], f"{row['target_megabytes']:.0f}", interval(row["ms_per_token"])]
        cells += [interval(row["plain"]), interval(row["speculative"]), f"{row['product']:.2f}"]
        cells += [f"{row['speculative']['median'] / row['product']:.2f}", interval(row["over_own_plain"])]
        cells += [interval(row["over_generate"]), f"{row['tokens_per_round']:.2f}", row["identical"]]
        lines.append("| " + " | ".join(cells) + " |")
    body = "| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|\n" + "\n".join(lines) + "\n"
    return (
        f"## {report['preset']}\n\n{report['date']}, {report['machine']}, {report['dtype']}, "
        f"{report['threads']} threads, k = {report['k']}, {report['max_new_tokens']} new tokens, "
        f"{report['prompts']} prompts × {report['repetitions']}; clean timings {report['clean']} of "
        f"{report['slices']}. × is over our own plain loop on full-precision weights, unless a column says otherwise. "
        f"Printed by `{report['command']}`.\n\n{body}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="350m", help="a synthetic pair's size, or embedded (350m)")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-graphs", action="store_true", help="do not compile first: native kernels, eager glue")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    target, draft, tokenizer, prompts = models(args.preset)
    cells = []
    for name in (FULL, *args.formats.split(",")):
        print(f"preparing {name}", file=sys.stderr, flush=True)
        cell = Cell(name, target, draft, tokenizer, args.k)
        if not args.no_graphs:
            cell.decoder.warmup()
        for call in cell.runs(prompts[0], {"max_new_tokens": 16, "eos_token_id": []}).values():
            call()
        cells.append(cell)
    options = {"max_new_tokens": args.max_new_tokens, "eos_token_id": []}
    (baseline,) = build("hf", cells[0].decoder, options)
    baseline.generate(prompts[0])
    found = measure(cells, baseline, prompts, args)
    report = {
        "preset": args.preset, "date": datetime.date.today().isoformat(), "machine": platform.machine(),
        "dtype": str(target.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "k": args.k,
        "max_new_tokens": args.max_new_tokens, "prompts": len(prompts), "repetitions": args.repetitions,
        "clean": found["clean"], "slices": found["of"],
        "backend": cells[0].decoder.backend.describes, "numerics": cells[0].decoder.backend.numerics,
        "command": f"python experiments/quantised/grid.py --preset {args.preset}" + " --no-graphs" * args.no_graphs,
        "rows": rows_of(cells, found["slices"], args.max_new_tokens),
    }  # fmt: skip
    text = text_of(report)
    (args.out / f"grid-{args.preset}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / f"grid-{args.preset}.md").write_text("# Weights in fewer bits, with speculation\n\n" + text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
