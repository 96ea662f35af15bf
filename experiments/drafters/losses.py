"""Which loss helps the embedded draft, and does its own text? Each setting goes on from the shipped draft.

    python experiments/drafters/losses.py --out runs/losses            about twenty minutes on one core, 14 settings
    python experiments/drafters/losses.py --out runs/losses --steps 60 longer, and comparable only with itself

Every setting sees the same rows in the same order for the same number of steps, so the machine's load changes the time
that it takes and not the result. Interrupted, it goes on; a finished setting is only read. The table is printed and
written to `results.md` and `results.json` in the output folder: expected acceptance length with five drafted tokens on
held-out texts that the target wrote itself, at temperatures 1 and 0, where the final weights are judged, not the best.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import torch
from rich.console import Console

from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.train import provenance, stdlib
from specdec.train.data import TrainingData, packed
from specdec.train.losses import LOSSES
from specdec.train.objective import create
from specdec.train.progress import Progress
from specdec.train.selfgen import SelfGeneration, self_generated
from specdec.train.settings import Report, Settings
from specdec.train.trainer import train

LENGTH, BATCH, K = 128, 8, 5
# (loss, share of on-policy rows)
SETTINGS = [(loss, share) for share in (0.0, 0.5) for loss in LOSSES]


def texts(target, tokenizer, folder: Path, count: int, console: Console) -> TrainingData:
    """The target's own texts, half greedy and half at temperature 1, and as much of the library's."""
    documents = stdlib.documents()
    text = packed(documents, tokenizer, LENGTH, 0, {})
    what = SelfGeneration(count, LENGTH, prompt_tokens=32, temperatures=(0.0, 1.0), held_out_share=0.15)
    return self_generated(
        target, tokenizer, documents, text, what, folder, lambda made, wanted: console.print(f"texts {made}/{wanted}")
    )


def run(target, tokenizer, data: TrainingData, loss: str, on_policy: float, args, console: Console) -> Report:
    torch.manual_seed(args.seed)
    options = {"init": "embedded", "loss": loss, "on_policy": on_policy, "k": K}
    settings = Settings(
        out=args.out / f"{loss}-{on_policy:g}",
        steps=args.steps,
        batch=BATCH,
        lr=args.lr,
        warmup=0.1,
        evaluations=2,
        evaluation_rows=48,
        patience=0,
        seed=args.seed,
    )
    console.print(f"{loss}, {on_policy:.0%} on policy")
    return train(create("draft", target, tokenizer, **options), data, settings, Progress(console))


def table(reports: dict[tuple[str, float], Report], args) -> str:
    start = next(iter(reports.values())).curve[0]
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    lines = [
        f"# Losses for the embedded draft, {datetime.date.today().isoformat()}",
        "",
        f"`experiments/drafters/losses.py --steps {args.steps} --texts {args.texts} --lr {args.lr:g} "
        f"--seed {args.seed}`; {versions}; CPU, float32.",
        "",
        f"Expected tokens a round, {K} drafted, on held-out texts of the target. Before: "
        f"{start['expected_length_t1']:.3f} at temperature 1, {start['expected_length_t0']:.3f} greedy.",
        "",
        "| loss | on policy | temperature 1 | greedy | α at the first position | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for (loss, share), report in sorted(reports.items(), key=lambda item: -item[1].curve[-1]["expected_length_t1"]):
        end = report.curve[-1]
        gains = [
            f"{end[key]:.3f} ({end[key] - start[key]:+.3f})" for key in ("expected_length_t1", "expected_length_t0")
        ]
        lines.append(
            f"| {loss} | {share:.0%} | {gains[0]} | {gains[1]} | {end['alpha_t1'][0]:.3f} | {report.seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="of each setting (default: 40)")
    parser.add_argument("--texts", type=int, default=384, help="texts of the target's own (default: 384)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console(highlight=False)
    target, tokenizer = load_model(EMBEDDED / "target", device="cpu"), load_tokenizer(EMBEDDED / "target")
    data = texts(target, tokenizer, args.out, args.texts, console)
    reports = {(loss, share): run(target, tokenizer, data, loss, share, args, console) for loss, share in SETTINGS}
    text = table(reports, args)
    (args.out / "results.md").write_text(text, encoding="utf-8")
    rows = [
        {"loss": loss, "on_policy": share, "seconds": report.seconds, "curve": report.curve}
        for (loss, share), report in reports.items()
    ]
    provenance.write_json(args.out / "results.json", {"steps": args.steps, "data": data.digest, "rows": rows})
    print(text)
    print(json.dumps({"best": max(rows, key=lambda row: row["curve"][-1]["expected_length_t1"])["loss"]}))


if __name__ == "__main__":
    main()
