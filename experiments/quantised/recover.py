"""What fine-tuning wins back of the embedded target's quality in few bits: `specdec train recover`, before and after.

    python experiments/quantised/recover.py --out runs/recover              25 minutes for each format on one thread
    python experiments/quantised/recover.py --out runs/recover --minutes 5  shorter, and comparable only with itself

Trains on the text that the target was trained on, the standard library without the held-out files. Interrupted, it
goes on; a finished format is only read. Quality is measured on folders as they are loaded again, on held-out rows by
which no weights were chosen. Writes `recover.json` and `recover.md` beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specdec import cli
from specdec.loading import EMBEDDED, load_model, load_tokenizer
from specdec.quant import PackedLinear, named_packed
from specdec.quant.layers import candidates
from specdec.quant.recipe import Recipe
from specdec.train import provenance, stdlib
from specdec.train.data import Rows, packed
from specdec.train.recover import compare
from specdec.train.rounding import packed_model, rounded_layers
from specdec.train.trainer import look

HERE = Path(__file__).parent
LENGTH, BATCH, EVALUATED = 256, 8, 48


@dataclass(frozen=True)
class Run:
    recipe: str
    options: tuple[str, ...]


RUNS = (
    Run("mxfp4", ("--lr", "1e-4", "--masters")),
    Run("int4", ("--lr", "1e-4")),
    Run("sparse-80", ("--lr", "1e-3", "--prune", "wanda", "--prune-steps", "6", "--prune-share", "0.4")),
)


def train(run: Run, out: Path, minutes: float) -> dict[str, Any]:
    """The record of the run, made now or before."""
    words = ["train", "recover", "--recipe", run.recipe, *run.options, "--minutes", f"{minutes:g}", "--out", str(out)]
    words += ["--precision", "bf16", "--batch", str(BATCH), "--length", str(LENGTH), "--evaluations", "6"]
    words += ["--evaluation-rows", str(EVALUATED), "--patience", "0", "--threads", "1"]
    if cli.main(words):
        raise SystemExit(f"training {run.recipe} failed")
    return provenance.read(out)


def unseen(held_out: Rows, count: int) -> list[Rows]:
    """Held-out rows, spread over all there are, without those that the run chose its weights by."""
    used = torch.linspace(0, len(held_out) - 1, EVALUATED).round().long().numpy()
    left = np.setdiff1d(np.arange(len(held_out)), used)
    index = left[np.unique(np.linspace(0, len(left) - 1, count).round().astype(int))]
    return [held_out.take(index[i : i + BATCH]) for i in range(0, len(index), BATCH)]


@torch.no_grad()
def quality(target: Any, model: Any, rows: list[Rows]) -> dict[str, float]:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for some in rows:
        batch = look(target, *some.tensors())
        for name, value_N in compare(batch, model(input_ids=batch.tokens_BL, use_cache=False).logits).items():
            sums[name] = sums.get(name, 0.0) + float(value_N.double().sum())
            counts[name] = counts.get(name, 0) + value_N.numel()
    return {name: total / counts[name] for name, total in sums.items()}


def floating(model: Any) -> Any:
    """A model with stored weights in float32, whatever else it is in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return model


def measure(run: Run, out: Path, target: Any, rows: list[Rows], record: dict[str, Any]) -> dict[str, Any]:
    """Rounded to nearest, and as it was trained."""
    recipe = Recipe.of(run.recipe)
    layers = rounded_layers(target, recipe.assign(candidates(target)))
    before = quality(target, floating(packed_model(target, layers, recipe)), rows)
    recovered = load_model(out, device="cpu")
    stored: list[PackedLinear] = list(named_packed(recovered).values())
    bits = 8 * sum(x.num_bytes for x in stored) / sum(x.in_features * x.out_features for x in stored)
    return {"bits": bits, "before": before, "after": quality(target, recovered, rows), "record": record}


def line(run: Run, found: dict[str, Any]) -> str:
    before, after, record = found["before"], found["after"], found["record"]
    lost = before["loss"] - before["target_loss"]
    cells = [
        f"{run.recipe} ({found['bits']:.2f} bits)",
        f"{before['loss']:.4f} → {after['loss']:.4f}",
        f"{1 - (after['loss'] - after['target_loss']) / lost:.0%}",
        f"{before['kl']:.4f} → {after['kl']:.4f}",
        f"{before['agree']:.4f} → {after['agree']:.4f}",
        f"{before['overlap']:.4f} → {after['overlap']:.4f}",
        f"{record['steps_done']} ({record['tokens_seen'] / 1e3:.0f}K), {record['wall_seconds'] / 60:.0f} min",
    ]
    return "| " + " | ".join(cells) + " |"


def report(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    target_loss = next(iter(found.values()))["after"]["target_loss"]
    head = "| weights | held-out loss, nats | won back | KL | greedy agreement | overlap | steps (tokens), time |"
    lines = [
        f"# Recovery of the embedded target, {datetime.date.today().isoformat()}",
        "",
        f"`python experiments/quantised/recover.py --out DIR --minutes {args.minutes:g}`; {versions}; CPU, one thread "
        "each, with other work on the machine; trained under bfloat16 autocast, measured in float32 on "
        f"{args.rows} held-out rows of {LENGTH} tokens that chose no weights. Before: rounding to nearest (sparse: the "
        f"largest of each row). In full precision the loss is {target_loss:.4f}. KL is from the target, in nats.",
        "",
        head,
        "|---" * 7 + "|",
        *(line(run, found[run.recipe]) for run in RUNS if run.recipe in found),
        "",
        "Options: " + "; ".join(f"{run.recipe} `{' '.join(run.options)}`" for run in RUNS) + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0, help="for each format (default: 25)")
    parser.add_argument("--rows", type=int, default=96, help="held-out rows to measure on (default: 96)")
    parser.add_argument("--formats", nargs="*", choices=[run.recipe for run in RUNS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    target = load_model(EMBEDDED / "target", device="cpu").requires_grad_(False)
    tokenizer = load_tokenizer(EMBEDDED / "target")
    rows = unseen(packed(stdlib.documents(), tokenizer, LENGTH, 0, {}).held_out, args.rows)
    found: dict[str, dict[str, Any]] = {}
    for run in RUNS:
        if args.formats and run.recipe not in args.formats:
            continue
        record = train(run, args.out / run.recipe, args.minutes)
        kept = args.out / f"{run.recipe}-{args.rows}.json"
        measured = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if measured.get("record") != record:
            measured = measure(run, args.out / run.recipe, target, rows, record)
            provenance.write_json(kept, measured)
        found[run.recipe] = measured
    text = report(found, args)
    (HERE / "recover.md").write_text(text, encoding="utf-8")
    provenance.write_json(HERE / "recover.json", {"date": datetime.date.today().isoformat(), "formats": found})
    print(text)


if __name__ == "__main__":
    main()
