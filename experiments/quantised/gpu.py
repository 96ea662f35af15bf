"""What products with stored weights cost on a GPU, beside bfloat16 ones, interleaved: one command, dated files.

    python experiments/quantised/gpu.py [--formats mxfp4,int4] [--rows 1,4,8,16] [--quick] [--no-tune] [--out FOLDER]

Result so far: none. This has not been run on a GPU yet; the kernels have been run by Triton's interpreter and compiled
for compute capability 8.0 and 9.0 (`tests/kernels/test_triton_packed.py`).

Every figure is the median of some rounds; in a round all products take their turn. One turn is one CUDA graph that
walks through copies of the weight which together pass the device's cache, so weights come from memory. Baselines are
torch's bfloat16 product and the project's own batch-invariant one. `reach` is the speed over torch's at that number of
rows, divided by how many times fewer bytes are stored: 1 would be all that memory allows. Schedules are measured first
and kept in the user's cache, unless `--no-tune`. Also checks, on the device, each product against unpacked weights and
its rows' bits alone. About ten minutes, most of them compilation; `--quick` measures one shape without tuning.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import tuning
from specdec.quant import parse
from specdec.quant.format import Format, Parts

HERE = Path(__file__).parent
FORMATS = ("int8", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "int4", "int4-g128-asym",
           "sparse")  # fmt: skip
SHAPES = ((4096, 4096), (4096, 11008), (8192, 28672))  # inputs, outputs
TORCH, OURS = "torch bfloat16", "own bfloat16"
HEADS = ("inputs × outputs", "rows", "weights", "µs (low to high)", "× torch", "× own bf16", "fewer bytes", "reach",
         "bandwidth", "error", "rows alone")  # fmt: skip
GOAL = 0.8  # of the bytes' ratio, for one row and matrices past the cache


def bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second of a large copy, read and written, or of a read alone: the better one."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    jobs = ((2, tuning.Replay([lambda: target.copy_(source)])), (1, tuning.Replay([source.amax])))
    return max(passes * source.nbytes / job.seconds() for _ in range(rounds) for passes, job in jobs)


def copies(num_bytes: int, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(64, max(2, 3 * cache // num_bytes + 1))


def packed_job(format: Format, parts: Parts, rows: Tensor) -> tuning.Replay:
    from specdec.kernels.triton_packed import linear

    stored = sum(part.nbytes for part in parts.values())
    weights = [parts] + [{k: v.clone() for k, v in parts.items()} for _ in range(copies(stored, rows.device) - 1)]
    return tuning.Replay([partial(linear, rows, format, weight) for weight in weights])


def plain_job(product: Callable[..., Tensor], weight: Tensor, rows: Tensor) -> tuning.Replay:
    weights = [weight, *(weight.clone() for _ in range(copies(weight.nbytes, rows.device) - 1))]
    return tuning.Replay([partial(product, rows, one) for one in weights])


def check(format: Format, parts: Parts, K: int) -> dict[str, Any]:
    """The largest error against unpacked weights, over the largest value; and whether rows have their bits alone."""
    from specdec.kernels.packed import rounded_rows
    from specdec.kernels.triton_packed import linear

    device = next(iter(parts.values())).device
    rows = torch.randn(64, K, device=device).bfloat16()
    whole = linear(rows, format, parts)
    exact = rows.double()
    if format.name == "int8":
        codes, scales = rounded_rows(rows)
        exact = codes.double() * scales.double()
    weight = format.unpack(parts, torch.float32 if format.name == "int8" else torch.bfloat16)
    want = torch.cat([exact @ some.double().T for some in weight.split(2048)], 1)
    alone = all(
        torch.equal(linear(rows[a:b], format, parts), whole[a:b]) for a, b in ((0, 1), (5, 9), (3, 19), (63, 64))
    )
    return {"error": float((whole.double() - want).abs().max() / want.abs().max()), "rows_alone": alone}


def measure(K: int, N: int, names: list[str], num_rows: list[int], rounds: int, tune: bool) -> list[dict[str, Any]]:
    from specdec.kernels import triton_ops, triton_packed

    device = torch.device("cuda")
    weight = torch.randn(N, K, device=device) / K**0.5
    plain = weight.bfloat16()
    found = []
    stored = {name: parse(name).pack(weight) for name in names}
    checks = {name: check(parse(name), parts, K) for name, parts in stored.items()}
    del weight
    if tune:
        for name in names:
            triton_packed.tune(parse(name), N, K, device=device, num_rows=(1,))
    for M in num_rows:
        rows = torch.randn(M, K, device=device).bfloat16()
        jobs = {
            TORCH: plain_job(torch.nn.functional.linear, plain, rows),
            OURS: plain_job(triton_ops.linear, plain, rows),
            **{name: packed_job(parse(name), parts, rows) for name, parts in stored.items()},
        }
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                times[name].append(job.seconds())
        for name, seconds in times.items():
            num_bytes = plain.nbytes if name in (TORCH, OURS) else parse(name).num_bytes(N, K)
            found.append(
                {"name": name, "inputs": K, "outputs": N, "rows": M, "bytes": num_bytes,
                 "fewer_bytes": plain.nbytes / num_bytes, "seconds": statistics.median(seconds),
                 "low": min(seconds), "high": max(seconds), **checks.get(name, {})}
            )  # fmt: skip
    return found


def judged(found: list[dict[str, Any]], peak: float) -> list[dict[str, Any]]:
    """Ratios to both baselines of the same shape and rows, and the share of the bandwidth."""
    base = {(r["name"], r["inputs"], r["outputs"], r["rows"]): r["seconds"] for r in found}
    made = []
    for row in found:
        where = (row["inputs"], row["outputs"], row["rows"])
        over_torch = base[(TORCH, *where)] / row["seconds"]
        made.append(
            {**row, "over_torch": over_torch, "over_own": base[(OURS, *where)] / row["seconds"],
             "reach": over_torch / row["fewer_bytes"], "of_bandwidth": row["bytes"] / row["seconds"] / peak}
        )  # fmt: skip
    return made


def markdown(record: dict[str, Any]) -> str:
    lines = [
        f"# Products with stored weights on {record['device']}",
        "",
        f"{record['date']}, torch {record['torch']}, triton {record['triton']}, memory measured at "
        f"{record['bandwidth'] / 1e9:.0f} GB/s, {record['rounds']} rounds; "
        f"`python experiments/quantised/gpu.py {record['arguments']}`".rstrip(),
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---" * len(HEADS) + "|",
    ]
    for r in record["products"]:
        sound = f"{r['error']:.1e} | {'yes' if r['rows_alone'] else 'NO'}" if "error" in r else "| "
        lines.append(
            f"| {r['inputs']} × {r['outputs']} | {r['rows']} | {r['name']} | {r['seconds'] * 1e6:.1f} "
            f"({r['low'] * 1e6:.1f} to {r['high'] * 1e6:.1f}) | {r['over_torch']:.2f} | {r['over_own']:.2f} "
            f"| {r['fewer_bytes']:.2f} | {r['reach']:.2f} | {r['of_bandwidth']:.0%} | {sound} |"
        )
    single = [r for r in record["products"] if r["rows"] == 1 and r["name"] not in (TORCH, OURS)]
    below = [f"{r['name']} {r['inputs']}×{r['outputs']} ({r['reach']:.2f})" for r in single if r["reach"] < GOAL]
    lines += ["", f"Below {GOAL} of the bytes' ratio for one row: {', '.join(below) or 'none'}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,4,8,16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-tune", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py measures kernels on an NVIDIA GPU, and torch finds none here")
    if find_spec("triton") is None:
        sys.exit("gpu.py measures Triton kernels, and triton is not installed: pip install triton")
    device = torch.device("cuda")
    names, num_rows = options.formats.split(","), [int(rows) for rows in options.rows.split(",")]
    peak = bandwidth(device, options.rounds)
    products: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in SHAPES[:1] if options.quick else SHAPES:
            tune = not (options.no_tune or options.quick)
            products += judged(measure(*shape, names, num_rows, options.rounds, tune), peak)
            print(f"{shape[0]} × {shape[1]} measured", file=sys.stderr)
    record = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__, "triton": tuning.triton_version(), "rounds": options.rounds,
        "arguments": " ".join(sys.argv[1:]), "bandwidth": peak, "products": products,
    }  # fmt: skip
    name = "".join(c if c.isalnum() else "-" for c in record["device"].lower())
    path = options.out / f"gpu-{name}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
