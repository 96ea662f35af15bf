"""`specdec bench` on the 134m pair in bfloat16 and float32, and on the embedded pair: one command, dated raw data.

    python experiments/runtime/run.py [--peer openvino] [--peer llama.cpp=build/bin] [--out FOLDER] [--quick]
    python experiments/runtime/run.py --device cuda

Each group is one run of `specdec bench`; one that has its file of the same day already is not run again, so that a run
that was cut short goes on where it stopped (`--again` starts anew). Writes a JSON file per group and a table,
`results.md`. About twenty-five minutes on two cores with both peers; `--groups` chooses.
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

from specdec.bench.targets import judge

HERE = Path(__file__).parent
# What each runs. Only some are part of the default: on the CPU, and on a GPU.
GROUPS: dict[str, list[str]] = {
    "134m-bf16": ["--preset", "134m", "--dtype", "bf16", "--prompts", "2", "--repetitions", "3", "--profile"],
    "134m-bf16-draft-int8": [
        *("--preset", "134m", "--dtype", "bf16", "--prompts", "2", "--repetitions", "3"),
        *("--draft-quantize", "int8", "--backend", "compiled", "--no-transformers"),
    ],
    "134m-fp32": ["--preset", "134m", "--dtype", "fp32", "--prompts", "2", "--repetitions", "3", "--k", "3,4,5"],
    "embedded": ["--preset", "embedded", "--prompts", "4", "--repetitions", "3", "--drafters", "model,ngram"],
    "350m-bf16": ["--preset", "350m", "--dtype", "bf16", "--prompts", "1", "--repetitions", "3", "--k", "3,5"],
    "1b-bf16": ["--preset", "1b", "--dtype", "bf16", "--prompts", "1", "--repetitions", "3", "--k", "3,5"],
    "3b-bf16": ["--preset", "3b", "--dtype", "bf16", "--prompts", "1", "--repetitions", "3", "--k", "3,5"],
}
DEFAULT_GROUPS = ("134m-bf16", "134m-bf16-draft-int8", "134m-fp32", "embedded")
GPU_GROUPS = ("1b-bf16", "3b-bf16")
WITH_PEERS = ("134m-bf16", "134m-fp32")
QUICK = ["--prompts", "1", "--repetitions", "1", "--max-new-tokens", "8", "--k", "3", "--retries", "0"]
HEAD = ("row", "ms/token", "× our plain", "× own plain", "tokens/step", "own text", "efficiency", "clean")


def interval(value: dict[str, float] | None, unit: str = "") -> str:
    return "" if value is None else f"{value['median']:.2f}{unit} ({value['low']:.2f}–{value['high']:.2f})"


def line(row: dict[str, Any], prompts: int) -> str:
    cells = [
        row["name"],
        interval(row["ms_per_token"]),
        interval(row["over_our_plain"], "×"),
        interval(row["over_own_plain"], "×"),
        f"{row['tokens_per_step']:.2f}" if row["tokens_per_step"] else "",
        f"{row['plain_identical']}/{prompts}",
        f"{row['ideal']['efficiency']:.2f}" if row["ideal"] else "",
        f"{row['clean_slices']}/{row['slices']}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(heads: tuple[str, ...], lines: list[str]) -> str:
    return "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|\n" + "\n".join(lines) + "\n"


def group_text(name: str, report: dict[str, Any]) -> str:
    machine, bare = report["machine"], report["bare"]
    steps = "; ".join(
        f"{backend} {found['target_ms']['1']:.2f} ms at width 1, {found['verify8_over_decode1'] or 0:.2f}× that at 8, "
        f"draft {found['draft_ms']:.2f} ms"
        for backend, found in bare.items()
    )
    agreement = report["agreement"]
    agrees = f"agreement {agreement:.2f}; " if agreement is not None else ""
    absent = "".join(f"\nNot measured: {row['name']}: {row['reason']}\n" for row in report["absent"])
    backends = "; ".join(f"{key}: {b['describes']}, {b['numerics']} numerics" for key, b in report["backends"].items())
    return (
        f"## {name}\n\n"
        f"{report['date']}, {platform.machine()}, {report['device']}, {report['dtype']}, threads {report['threads']}; "
        f"prompts {report['prompts']} of {report['prompt_tokens'][0]} tokens × {report['repetitions']}, "
        f"{report['max_new_tokens']} new tokens; {agrees}clean timings "
        f"{report['clean_slices']} of {report['slices']}.\n"
        f"Backends: {backends}.\n"
        f"Bare steps: {steps}.\n"
        f"Read bandwidth {machine['read_bytes_per_second'] / 1e9:.1f} GB/s ({machine['read_by']}); the "
        f"{machine['backend']} step reaches {machine['share_of_best']:.2f} of it, and {machine['share']:.2f} of the "
        f"reading of its turn.\n\n" + table(HEAD, [line(row, report["prompts"]) for row in report["rows"]]) + absent
    )


def write_results(folder: Path, reports: dict[str, dict[str, Any]], command: str, name: str = "results.md") -> Path:
    """The targets over all groups, then a table per group."""
    first = next(iter(reports.values()))
    versions = ", ".join(f"{key} {value}" for key, value in first["versions"].items())
    lines = [
        f"| {t.target} | {t.needs} | {'' if t.value is None else format(t.value, '.2f')} | {t.verdict} | {t.of} |"
        for t in judge(list(reports.values()))
    ]
    text = (
        f"# The fast runtime, {first['date']}\n\n`{command}`; {versions}.\n"
        "Whole-call times, prefill included (llama.cpp: its own clock, loading left out); medians with 95 % bootstrap "
        "intervals;\nratios are medians of neighbouring timings.\n\n"
        + table(("target", "needs", "measured", "", "of, or what it needs"), lines)
        + "\n"
        + "\n".join(group_text(name, report) for name, report in reports.items())
    )
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, help="(default: those of the device)")
    parser.add_argument("--device", default="cpu", help="as for specdec bench (default: cpu)")
    parser.add_argument("--peer", action="append", default=[], help="as for specdec bench; for the 134m groups")
    parser.add_argument("--threads", help="as for specdec bench; for the made pairs")
    parser.add_argument("--again", action="store_true", help="run groups that have today's file too")
    parser.add_argument("--quick", action="store_true", help="one prompt, few tokens: does it run?")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    today, reports = datetime.date.today().isoformat(), {}
    on_cpu = args.device == "cpu"
    for name in args.groups or (DEFAULT_GROUPS if on_cpu else GPU_GROUPS):
        path = args.out / f"{name}-{'' if on_cpu else 'gpu-'}{today}.json"
        if args.again or not path.is_file():
            words = ["bench", *GROUPS[name], "--device", args.device, *(QUICK if args.quick else [])]
            if name in WITH_PEERS:
                words += [word for peer in args.peer for word in ("--peer", peer)]
            if args.threads and name != "embedded":
                words += ["--threads", args.threads]
            print("+ specdec", *words, flush=True)
            subprocess.run([sys.executable, "-m", "specdec", *words, "--json", str(path)], check=True)
        reports[name] = json.loads(path.read_text(encoding="utf-8"))
    peers = "".join(f" --peer {peer.partition('=')[0]}{'=FOLDER' if '=' in peer else ''}" for peer in args.peer)
    command = f"python experiments/runtime/run.py{peers}" + ("" if on_cpu else f" --device {args.device}")
    path = write_results(args.out, reports, command, "results.md" if on_cpu else "results-gpu.md")
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
