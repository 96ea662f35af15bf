"""What M rows cost in the native linear and attention, beside the stock ones, interleaved.

    python experiments/runtime/kernels.py [--threads 1] [--megabytes 96] [--slices 40]

`cold` walks through copies of a weight matrix that together pass the caches, as the layers of a model do; `hot` reads
one matrix again and again. Each figure is the fastest of many short slices; run it on an idle machine. GB/s are bytes
of weights per second at M = 1; `c8` is the time at M = 8 over that at M = 1. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear as stock_linear
from torch.nn.functional import scaled_dot_product_attention

from specdec import kernels
from specdec.dtypes import dtype_name

ROWS = (1, 2, 4, 8, 16)
SHAPES = ((256, 256), (256, 640), (768, 768), (768, 2048), (2048, 768), (768, 32000))
HOT_BYTES = 1 << 20  # one slice of a hot matrix reads about this much


def fastest(slices: int, jobs: list[Callable[[], int]]) -> list[float]:
    """Seconds per call of each job, which returns its number of calls; slices of all jobs take turns."""
    best = [float("inf")] * len(jobs)
    for _ in range(slices):
        for index, job in enumerate(jobs):
            start = perf_counter()
            calls = job()
            best[index] = min(best[index], (perf_counter() - start) / calls)
    return best


def linear_job(op: Callable, x: torch.Tensor, weights: list[torch.Tensor], repeats: int) -> Callable[[], int]:
    def job() -> int:
        for _ in range(repeats):
            for weight in weights:
                op(x, weight)
        return repeats * len(weights)

    return job


def linear_costs(inputs: int, outputs: int, dtype: torch.dtype, megabytes: int, slices: int) -> dict:
    """Costs of both linears; `megabytes` 0 is hot."""
    size = inputs * outputs * dtype.itemsize
    copies = max(1, megabytes * 2**20 // size)
    weights = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(copies)]
    repeats = 1 if megabytes else max(1, HOT_BYTES // size)
    xs = [torch.randn(rows, inputs, dtype=dtype) for rows in ROWS]
    jobs = [linear_job(op, x, weights, repeats) for op in (kernels.linear, stock_linear) for x in xs]
    seconds = fastest(slices, jobs)
    return {
        "shape": [inputs, outputs],
        "dtype": dtype_name(dtype),
        "weights": "cold" if megabytes else "hot",
        "native_us": [1e6 * s for s in seconds[: len(ROWS)]],
        "stock_us": [1e6 * s for s in seconds[len(ROWS) :]],
        "gigabytes_per_second": size / seconds[0] / 1e9,
    }


def attention_costs(num_slots: int, dtype: torch.dtype, slices: int) -> dict:
    """12 query heads over 4 key/value heads of size 64, M causal rows behind `num_slots` slots."""
    heads, kv_heads, size = 12, 4, 64
    slots = kernels.slots(1)
    slots.reserve(num_slots + max(ROWS))
    keep, jobs = [], []

    def native(rows: int) -> Callable[[], int]:
        steps = kernels.steps()
        keep.append(steps)
        places = torch.arange(num_slots, num_slots + rows)
        steps.add(slots, num_slots, rows, num_slots, torch.ones(rows, rows, dtype=torch.bool).tril(), places)
        handle = steps.handle()
        q, k = (torch.randn(1, count, rows, size, dtype=dtype) for count in (heads, kv_heads))

        def job() -> int:
            kernels.attend(q, k, k, handle, 0, size**-0.5)
            return 1

        return job

    def stock(rows: int) -> Callable[[], int]:
        q = torch.randn(1, heads, rows, size, dtype=dtype)
        k = torch.randn(1, kv_heads, num_slots + rows, size, dtype=dtype)
        mask = torch.ones(rows, num_slots + rows, dtype=torch.bool).tril(num_slots)

        def job() -> int:
            scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
            return 1

        return job

    prefill(slots, num_slots, heads, kv_heads, size, dtype)
    jobs = [make(rows) for make in (native, stock) for rows in ROWS]
    seconds = fastest(slices, jobs)
    return {
        "slots": num_slots,
        "dtype": dtype_name(dtype),
        "native_us": [1e6 * s for s in seconds[: len(ROWS)]],
        "stock_us": [1e6 * s for s in seconds[len(ROWS) :]],
    }


def prefill(slots: object, num_slots: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    for start in range(0, num_slots, 512):
        rows = min(512, num_slots - start)
        places = torch.arange(start, start + rows)
        steps = kernels.steps()
        steps.add(slots, start, rows, start, torch.ones(rows, rows, dtype=torch.bool).tril(), places)
        q, k = (torch.randn(1, count, rows, size, dtype=dtype) for count in (heads, kv_heads))
        kernels.attend(q, k, k, steps.handle(), 0, size**-0.5)


def show(title: str, rows: list[tuple[str, dict]]) -> None:
    table = Table(title=title)
    for name in ("", "native M=1 µs", *(f"c{m}" for m in ROWS[1:]), "stock M=1 µs", *(f"c{m}" for m in ROWS[1:])):
        table.add_column(name, justify="right")
    for name, costs in rows:
        cells = []
        for kind in ("native_us", "stock_us"):
            first, *rest = costs[kind]
            cells += [f"{first:.1f}", *(f"{cost / first:.2f}" for cost in rest)]
        table.add_row(name, *cells)
    Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=96, help="weights that one cold slice walks through")
    parser.add_argument("--slices", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not kernels.available():
        sys.exit(f"no native kernels: {kernels.why_not()}")
    record: dict = {"isa": kernels.isa(), "threads": options.threads, "torch": torch.__version__}
    record["machine"] = platform.machine()
    dtypes = (torch.float32, torch.bfloat16)
    with torch.inference_mode():
        linears = [
            linear_costs(*shape, dtype, megabytes, options.slices)
            for dtype in dtypes
            for megabytes in (options.megabytes, 0)
            for shape in SHAPES
        ]
        attention = [attention_costs(num, dtype, options.slices) for dtype in dtypes for num in (128, 512, 2048, 8192)]
    show(
        "linear",
        [
            (
                f"{costs['dtype']} {costs['shape'][0]}x{costs['shape'][1]} {costs['weights']} "
                f"{costs['gigabytes_per_second']:.0f} GB/s",
                costs,
            )
            for costs in linears
        ],
    )
    show("attention, 12/4 heads of 64", [(f"{costs['dtype']} {costs['slots']} slots", costs) for costs in attention])
    print(json.dumps({**record, "linear": linears, "attention": attention}))


if __name__ == "__main__":
    main()
