"""What `specdec train` reaches from a clean clone: one row per folder, from its provenance and a comparison.

    specdec train eagle --out runs/eagle
    specdec compare --drafter runs/eagle --k 5 --json eagle.json
    python experiments/drafters/trained.py runs/eagle eagle.json "chain, k = 5" --cpu-seconds 2400

Adds to `trained.json` and writes `trained.md` anew. `--cpu-seconds`: of the training, as `time` says (user + sys).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from measure import HERE, write

ROWS = HERE / "trained.json"


def row(folder: Path, comparison: Path, proposal: str, cpu_seconds: float) -> dict[str, Any]:
    content = (folder / "provenance.json").read_bytes()
    record, result = json.loads(content), json.loads(comparison.read_text(encoding="utf-8"))
    stats = result["stats"]
    return {
        "kind": record["kind"],
        "date": record["date"],
        "provenance_sha256": hashlib.sha256(content).hexdigest(),
        "options": {**record["options"], "lr": record["lr"], "optimizer": record["optimizer"]},
        "data": record["data"],
        "target": record["target"],
        "seed": record["seed"],
        "precision": record["precision"],
        "steps": record["steps_done"],
        "tokens": record["tokens_seen"],
        "wall_seconds": record["wall_seconds"],
        "cpu_seconds": cpu_seconds,
        "held_out": record["best"],
        "curve": [(at["step"], round(at["expected_length_t0"], 3)) for at in record["held_out_curve"]],
        "proposal": proposal,
        "mean_acceptance_length": stats["mean_acceptance_length"],
        "draft_acceptance_rate": stats["draft_acceptance_rate"],
        "rounds": stats["num_rounds"],
        "identical": f"{result['identical']}/{result['prompts']}",
        "versions": record["versions"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = "| kind | trained | steps | tokens | CPU seconds | proposal | tokens per round | same text | provenance |"
    lines = [head, "|---" * 9 + "|"]
    for made in rows:
        cells = [
            made["kind"],
            made["date"],
            str(made["steps"]),
            f"{made['tokens'] / 1e6:.2f}M",
            f"{made['cpu_seconds']:.0f}",
            made["proposal"],
            f"{made['mean_acceptance_length']:.2f}",
            made["identical"],
            f"`{made['provenance_sha256'][:16]}`",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("proposal")
    parser.add_argument("--cpu-seconds", type=float, required=True)
    args = parser.parse_args()
    rows = json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.is_file() else []
    rows.append(row(args.folder, args.comparison, args.proposal, args.cpu_seconds))
    write(ROWS, rows)
    text = (
        "# Heads trained from a clean clone\n\nThe embedded target, defaults unless said otherwise; judged on the "
        "built-in prompts, which neither target nor heads have seen: 16 × 64 tokens at temperature 0.\n\n"
        f"{table(rows)}\n\nCPU seconds are user and system time; where `time` did not run, the wall time of one "
        "thread, which is at least that. Notes on each run: `experiments/LOG.md`.\n"
    )
    (HERE / "trained.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
