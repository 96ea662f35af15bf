"""How long a start takes when everything has been compiled before: each part, in new processes, one after another.

    python experiments/runtime/start.py [--processes 9] [--out FOLDER]

Imports are those of torch, of what transformers needs for a Llama and a tokenizer, which any program pays that runs
one with it, and then our own. Opening loads the embedded pair, its native kernels and its compiled graphs; the first
text is eight tokens. The first process compiles what is missing and is not counted. Writes `start-DATE.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
PARTS = ("torch", "transformers", "specdec", "open", "warm up", "first text")
CODE = """
import json, time
marks = [time.perf_counter()]
import torch; marks.append(time.perf_counter())
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast; marks.append(time.perf_counter())
import specdec; specdec.load; marks.append(time.perf_counter())
decoder = specdec.load(drafter="model"); marks.append(time.perf_counter())
decoder.warmup(); marks.append(time.perf_counter())
decoder.generate("def f", max_new_tokens=8); marks.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def start() -> list[float]:
    """Seconds of each part in a process of its own."""
    quiet = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True, env=quiet)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    start()
    runs = [start() for _ in range(args.processes)]
    today = datetime.date.today().isoformat()
    medians = {part: median(run[i] for run in runs) for i, part in enumerate(PARTS)}
    ours, imports, total = (median(map(sum, parts)) for parts in zip(*((r[2:], r[:2], r) for r in runs), strict=True))
    for part, seconds in medians.items():
        print(f"{part:<14}{seconds:6.2f} s")
    print(f"{'imports':<14}{imports:6.2f} s  torch and transformers")
    print(f"{'ours':<14}{ours:6.2f} s  everything else")
    print(f"{'total':<14}{total:6.2f} s  all are medians of {len(runs)} processes")
    report = {
        "date": today,
        "machine": platform.machine(),
        "parts": PARTS,
        "seconds": runs,
        "ours": ours,
        "imports": imports,
        "total": total,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"start-{today}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
