"""Artefacts of OpenVINO and AOTInductor beside the same model in torch: steps by rows, texts, starts of processes.

    python experiments/accelerators/engines.py --pair embedded            measures; on an otherwise idle machine
    python experiments/accelerators/engines.py --pair embedded --quick    few repetitions: does it run?

Exports stand in `--artifacts` and are made once; the first run of `aoti` compiles. A start is a new process from its
first line to its first token, with the kernels and graphs of earlier processes; "no cache, no compiler" is one that has
neither, which only the package survives. Ten minutes for either pair on two cores, and prints JSON and tables.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import run as study
import torch
from rich.console import Console
from rich.table import Table
from specdec.drafters import ModelDrafter

import specdec
from specdec.bench import bare
from specdec.bench.timing import Gate
from specdec.export.aoti import AotiOptions
from specdec.export.artifact import ArtifactModel, export
from specdec.export.openvino import OpenvinoOptions
from specdec.export.options import Options
from specdec.kernels.build import cache_folder
from specdec.loading import EMBEDDED

EXPORTS: dict[str, Options] = {
    "openvino": OpenvinoOptions(max_seq_len=study.CONTEXT),
    "openvino int8": OpenvinoOptions(max_seq_len=study.CONTEXT, recipe="int8"),
    "aoti": AotiOptions(max_seq_len=study.CONTEXT),
    "aoti int8": AotiOptions(max_seq_len=study.CONTEXT, recipe="int8"),
}
IN_TORCH = ("eager", "compiled")
WIDTHS = (1, 4, 7, 8)
_START = """
import sys, specdec
decoder = specdec.load(sys.argv[1], drafter="none", **({"backend": sys.argv[2]} if len(sys.argv) > 2 else {}))
decoder.generate_plain([3, 5, 7, 9], max_new_tokens=1)
"""


def decoders(pair: str, parent: Path, prompts: int) -> tuple[dict[str, Any], list[list[int]], dict[str, Path]]:
    target, draft, texts = study.pair_of(pair, prompts)
    drafter, made, folders = ModelDrafter(draft), {}, {}
    for name in IN_TORCH:
        made[name] = specdec.SpeculativeDecoder(target, drafter=drafter, backend=name)
    made["compiled"].warmup()
    for name, options in EXPORTS.items():
        folder = parent / pair / f"{name.replace(' ', '-')}-{specdec.__version__}"
        if not folder.is_dir():
            export(target, options, out=folder, tell=lambda stage, n=name: print(f"{n}: {stage}", file=sys.stderr))
        made[name] = specdec.SpeculativeDecoder(ArtifactModel.open(folder), drafter=drafter)
        folders[name] = folder
    return made, texts, folders


def steps(made: Mapping[str, Any], text: list[int], repetitions: int, gate: Gate) -> dict[str, dict[int, float]]:
    """Median milliseconds of one step of the target by backend and rows, all in turns."""
    calls = {}
    for name, decoder in made.items():
        found, _ = bare.forwards(decoder, text, list(WIDTHS))
        calls |= {(name, width): call for (what, width), call in found.items() if what == "target"}
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    for repetition in range(repetitions + 2):
        for key, call in calls.items():
            seconds = gate.time(call).seconds
            if repetition > 1:
                taken[key].append(seconds)
    return {name: {w: 1e3 * statistics.median(taken[name, w]) for w in WIDTHS} for name in made}


def starts(folders: Mapping[str, Path], repetitions: int) -> dict[str, float | str]:
    """Seconds of a process that loads the embedded target and decodes one token; the best of a few."""
    sources = {name: [str(folder)] for name, folder in folders.items()}
    sources |= {name: [str(EMBEDDED / "target"), name] for name in IN_TORCH}
    found: dict[str, float | str] = {}
    for name, source in sources.items():
        seconds = []
        for _ in range(repetitions):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-W", "ignore", "-c", _START, *source], check=True, capture_output=True)
            seconds.append(time.perf_counter() - began)
        found[name] = min(seconds)
    with tempfile.TemporaryDirectory() as empty:
        bare_environment = {**os.environ, "PATH": empty, "SPECDEC_CACHE": empty}
        for name in ("aoti", "compiled"):
            began = time.perf_counter()
            command = [sys.executable, "-W", "ignore", "-c", _START, *sources[name]]
            done = subprocess.run(command, env=bare_environment, capture_output=True, text=True)
            last = (done.stderr.strip().splitlines() or [""])[-1]
            found[f"{name}, no cache, no compiler"] = time.perf_counter() - began if done.returncode == 0 else last
    return found


def show(found: Mapping[str, Any]) -> None:
    console = Console(width=120)
    table = Table(title=f"{found['pair']}, {found['threads']} threads: milliseconds of a step by rows", box=None)
    for column in ("backend", *map(str, WIDTHS), "8 over 1", *(f"speculative, k={k}" for k in found["k"]), "as eager"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for name, costs in found["steps"].items():
        texts = [found["texts"][name][str(k)] for k in found["k"]]
        table.add_row(
            name,
            *(f"{costs[w]:.2f}" for w in WIDTHS),
            f"{costs[8] / costs[1]:.2f}",
            *(f"{text['speedup']['median']:.2f}x of ideal {text['ideal']:.2f}" for text in texts),
            f"{sum(t['as_eager'] for t in texts)} of {sum(t['prompts'] for t in texts)}",
        )
    console.print(table)
    for name, seconds in found.get("starts", {}).items():
        console.print(f"start, {name}: {seconds if isinstance(seconds, str) else f'{seconds:.1f} s'}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=("embedded", "134m", "tiny"), default="embedded")
    parser.add_argument("--artifacts", type=Path, default=cache_folder() / "study-artifacts")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON there")
    arguments = parser.parse_args()
    plan = study.Plan(arguments.quick, arguments.tokens)
    made, prompts, folders = decoders(arguments.pair, arguments.artifacts, plan.prompts)
    gate = Gate(retries=3, budget=20 if arguments.quick else 300)
    found: dict[str, Any] = {
        "pair": arguments.pair,
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "k": list(plan.k),
        "steps": steps(made, prompts[0], plan.steps, gate),
        "texts": {
            name: {str(k): study.texts(decoder, made["eager"], prompts, k, plan, gate) for k in plan.k}
            for name, decoder in made.items()
        },
    }
    if arguments.pair == "embedded":
        found["starts"] = starts(folders, 1 if arguments.quick else 3)
    found["clean_slices"] = [gate.num_clean, gate.num_slices]
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    show(found)


if __name__ == "__main__":
    main()
