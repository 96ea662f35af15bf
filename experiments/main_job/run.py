"""The embedded pair, every drafter, against our plain loop and `transformers`' plain and assisted generation.

    python experiments/main_job/run.py [--out FOLDER] [--quick]

Each row is one run of `specdec compare`, with the baselines interleaved in it. Writes one JSON file per row and a dated
table, `results.md`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# (name, drafter, temperature, further arguments)
ROWS = [
    ("model-t0", "model", "0", []),
    ("model-t1", "model", "1", []),
    ("ngram-t0", "ngram", "0", []),
    ("suffix-t0", "suffix", "0", []),
    ("model-block-t1", "model", "1", ["--verifier", "block"]),
    ("model-fixed4-t0", "model", "0", ["--policy", "fixed", "--k", "4"]),
]


def command(drafter: str, temperature: str, more: list[str], out: Path, quick: bool) -> list[str]:
    words = [
        "compare",
        "--drafter",
        drafter,
        "--temperature",
        temperature,
        *more,
        "--max-new-tokens",
        "128",
        "--limit",
        "8",
    ]
    words += ["--baseline", "hf"]
    if drafter == "model":
        words += ["--baseline", "hf-assisted"]
    if quick:
        words[words.index("--limit") + 1] = "2"
        words += ["--repetitions", "1", "--max-new-tokens", "32"]
    return [*words, "--json", str(out)]


def interval(value: dict[str, float] | None, unit: str = "×") -> str:
    return "" if value is None else f"{value['median']:.2f}{unit} ({value['low']:.2f}–{value['high']:.2f})"


def line(name: str, result: dict[str, Any]) -> str:
    baselines = result["baselines"]

    def over(other: str) -> str:
        return interval(baselines.get(other, {}).get("speculative_over_it"))

    same = f"{result['identical']}/{result['prompts']}" if result["expects_identity"] else "law"
    cells = [
        name,
        same,
        f"{result['stats']['mean_acceptance_length']:.2f}",
        f"{result['stats']['draft_acceptance_rate']:.2f}",
        interval(result["speedup"]),
        f"{result['ideal_speedup']:.2f}× ({result['efficiency']:.0%})",
        over("hf"),
        over("hf-assisted"),
        over("hf-assisted-k4"),
        interval(baselines.get("hf", {}).get("plain_over_it")),
        f"{result['clean_slices']}/{result['slices']}",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = (
    "row",
    "same text",
    "mean acceptance length",
    "draft acceptance rate",
    "over our plain loop",
    "ideal (efficiency)",
    "over transformers plain",
    "over assisted (default)",
    "over assisted (k=4)",
    "our plain over transformers plain",
    "clean",
)
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--rows", nargs="*", choices=[row[0] for row in ROWS], help="only these")
    parser.add_argument("--quick", action="store_true", help="two prompts, one repetition: does it run?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines, first = [], {}
    for name, drafter, temperature, more in ROWS:
        if args.rows and name not in args.rows:
            continue
        out = args.out / f"{name}.json"
        words = command(drafter, temperature, more, out, args.quick)
        print("+ specdec", *words, flush=True)
        subprocess.run([sys.executable, "-m", "specdec", *words], check=True)
        result = json.loads(out.read_text(encoding="utf-8"))
        first = first or result
        lines.append(line(name, result))
    versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items())
    text = (
        f"# The embedded pair, {datetime.date.today().isoformat()}\n\n"
        f"`python experiments/main_job/run.py` on {platform.machine()}, {first['device']}, {first['dtype']}, "
        f"{versions}.\nWhole-call wall time, prefill included; median of paired ratios over prompts and interleaved "
        "repetitions, with bootstrap 95 % intervals.\n`clean`: timed slices during which other processes left the "
        "machine alone.\n\n"
        f"{HEAD}\n" + "\n".join(lines) + "\n"
    )
    (args.out / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
