"""What products with stored weights cost on a CPU, beside bfloat16 ones, interleaved: one command, dated files.

    python experiments/quantised/kernels.py [--threads 1,2] [--formats mxfp4,int4] [--rounds 7] [--out FOLDER]

In a round all products take their turn. A turn walks through copies of the weight that together pass the caches, as
the layers of a model do, for about a tenth of a second; turns in which other processes were busy are repeated, then
left out. A ratio is the median over rounds of bfloat16's time over the product's in the same round: of torch's
product, and of the project's own, whose bits do not depend on M either. `GB/s` are stored bytes per second at M = 1,
`memory` their share of the fastest reading that any product or a plain sum reached, `roof` the ratio to torch's product
that reading the stored bytes at that rate would give. Activations are bfloat16. About four minutes on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from specdec import kernels
from specdec.bench.timing import Gate
from specdec.kernels import packed
from specdec.quant import parse

HERE = Path(__file__).parent
FORMATS = ("int8", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "int4", "int4-g64",
           "int4-g128", "int4-asym", "sparse", "mxfp4-a8", "int4-a8", "int4-g128-a8")  # fmt: skip
SHAPES = ((4096, 4096), (4096, 11008))  # inputs, outputs
ROWS = (1, 4, 8, 16)
TORCH, OWN = "torch bfloat16", "own bfloat16"
COLD_BYTES = 128 << 20  # of copies: four times the largest cache here
TURN = 0.1  # seconds
# What is aimed at, as ratios to torch's bfloat16 product at M = 1 and 4.
GOALS = {"int8": 2.5, "mxint8": 1.5, "mxfp8_e4m3": 1.5, "mxfp8_e5m2": 1.5, "mxfp6_e2m3": 1.9, "mxfp6_e3m2": 1.9,
         "mxfp4": 2.8, "int4": 2.8, "mxfp4-a8": 2.8, "int4-a8": 2.8}  # fmt: skip

Product = Callable[[Tensor], Tensor]


def copies(num_bytes: int) -> int:
    return max(2, COLD_BYTES // num_bytes + 1)


def products(inputs: int, outputs: int, formats: list[str]) -> dict[str, tuple[int, list[Product]]]:
    """By name: stored bytes, and the product with each copy of the weight."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = [weight, *(weight.clone() for _ in range(copies(weight.nbytes) - 1))]
    made: dict[str, tuple[int, list[Product]]] = {
        TORCH: (weight.nbytes, [partial(torch_linear, weight=w) for w in plain]),
        OWN: (weight.nbytes, [partial(kernels.linear, weight=w) for w in plain]),
    }
    for name in formats:
        format = parse(name)
        parts = format.pack(weight.float())
        stored = sum(part.nbytes for part in parts.values())
        every = [{key: part.clone() for key, part in parts.items()} for _ in range(copies(stored))]
        made[name] = (stored, [partial(packed.linear, format=format, parts=one) for one in every])
    return made


def turn(each: list[Product], rows: Tensor) -> float:
    """Seconds per product."""
    calls, start = 0, perf_counter()
    while (now := perf_counter()) - start < TURN:
        for product in each:
            product(rows)
        calls += len(each)
    return (now - start) / max(calls, 1)


def read_rate(gate: Gate) -> float:
    """Bytes per second of reading alone: the largest of many long words in memory."""
    data = torch.zeros(COLD_BYTES // 4, dtype=torch.int64)  # twice as many bytes as all copies of a weight

    def once() -> float:
        start = perf_counter()
        data.amax()
        return data.nbytes / (perf_counter() - start)

    return max(gate.time(once).result for _ in range(12))


def measure(threads: int, formats: list[str], rounds: int, progress: Progress) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    gate, found = Gate(retries=4, budget=400), []
    rate = read_rate(gate)
    for inputs, outputs in SHAPES:
        made = products(inputs, outputs, formats)
        task = progress.add_task(f"{inputs} × {outputs}, {threads} threads", total=rounds * len(ROWS) * len(made))
        for count in ROWS:
            rows = torch.randn(count, inputs).bfloat16()
            seconds: dict[str, list[float]] = {name: [] for name in made}
            clean = 0
            for _ in range(rounds):
                slices = {}
                for name, (_, each) in made.items():
                    slices[name] = gate.time(partial(turn, each, rows))
                    progress.advance(task)
                if all(one.clean for one in slices.values()):
                    clean += 1
                for name, one in slices.items():
                    seconds[name].append(one.result)
            for name, (stored, _) in made.items():
                over = {
                    base: statistics.median(b / s for b, s in zip(seconds[base], seconds[name], strict=True))
                    for base in (TORCH, OWN)
                }
                middle = statistics.median(seconds[name])
                found.append(
                    {
                        "threads": threads, "inputs": inputs, "outputs": outputs, "rows": count, "weights": name,
                        "bytes": stored, "us": 1e6 * middle, "us_low": 1e6 * min(seconds[name]),
                        "us_high": 1e6 * max(seconds[name]), "over_torch": over[TORCH], "over_own": over[OWN],
                        "gigabytes_per_second": stored / middle / 1e9, "read_gigabytes_per_second": rate / 1e9,
                        "clean_rounds": clean, "rounds": rounds,
                    }
                )  # fmt: skip
    return found


def read_fastest(found: list[dict[str, Any]], threads: int) -> float:
    """GB/s, of a plain sum or of the fastest product."""
    rows = [row for row in found if row["threads"] == threads]
    return max(max(row["gigabytes_per_second"], row["read_gigabytes_per_second"]) for row in rows)


def table(found: list[dict[str, Any]], threads: int, inputs: int, outputs: int) -> str:
    here = [row for row in found if (row["threads"], row["inputs"], row["outputs"]) == (threads, inputs, outputs)]
    rate = read_fastest(found, threads)
    clean = min(row["clean_rounds"] for row in here)
    heads = ["weights", "bytes / bf16", *(f"M = {m}: µs" for m in ROWS)]
    heads += [f"× torch, M = {m}" for m in ROWS] + [f"× own, M = {m}" for m in ROWS]
    heads += ["GB/s", "memory", "roof", "aim at M = 1, 4"]
    lines = []
    for name in dict.fromkeys(row["weights"] for row in here):
        by_rows = {row["rows"]: row for row in here if row["weights"] == name}
        one = by_rows[1]
        bf16 = next(row["us"] for row in here if row["weights"] == TORCH and row["rows"] == 1)
        aim = GOALS.get(name)
        met = all(by_rows[m]["over_torch"] >= aim for m in (1, 4)) if aim else None
        cells = [name, f"{one['bytes'] / (2 * inputs * outputs):.3f}"]
        cells += [f"{by_rows[m]['us']:.0f}" for m in ROWS]
        cells += [f"{by_rows[m]['over_torch']:.2f}" for m in ROWS] + [f"{by_rows[m]['over_own']:.2f}" for m in ROWS]
        cells += [
            f"{one['gigabytes_per_second']:.1f}",
            f"{one['gigabytes_per_second'] / rate:.2f}",
            f"{bf16 * rate / one['bytes'] * 1e3:.1f}",
            "" if aim is None else f"{aim}: {'met' if met else 'not met'}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    head = "| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|\n"
    title = f"## {inputs} inputs × {outputs} outputs, {threads} thread{'s' * (threads > 1)}\n\n"
    return (
        title
        + f"Fastest reading: {rate:.1f} GB/s. Rounds that were clean throughout: {clean} or more of "
        + (f"{here[0]['rounds']}.\n\n" + head + "\n".join(lines) + "\n")
    )


def text_of(report: dict[str, str], found: list[dict[str, Any]]) -> str:
    head = (
        f"# Products with stored weights on the CPU\n\n{report['date']}, {report['machine']}, kernels {report['isa']}, "
        f"torch {report['torch']}. Printed by `python experiments/quantised/kernels.py`, which says what is what.\n"
    )
    shapes = dict.fromkeys((row["threads"], row["inputs"], row["outputs"]) for row in found)
    return head + "".join("\n" + table(found, *shape) for shape in shapes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2", help="numbers of threads (1,2)")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated names")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if not kernels.available():
        print(f"no compiled kernels here: {kernels.why_not()}", file=sys.stderr)
        return 1
    with Progress(transient=True) as progress:
        found = [
            row
            for threads in map(int, args.threads.split(","))
            for row in measure(threads, args.formats.split(","), args.rounds, progress)
        ]
    today = datetime.date.today().isoformat()
    report = {"date": today, "machine": platform.machine(), "isa": kernels.isa(), "torch": torch.__version__}
    (args.out / "kernels.json").write_text(json.dumps({**report, "rows": found}, indent=1) + "\n", encoding="utf-8")
    text = text_of(report, found)
    (args.out / "kernels.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
