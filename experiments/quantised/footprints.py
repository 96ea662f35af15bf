"""What each weight format stores of a matrix, and how well it keeps a Gaussian one; delta-CSC beside its formula.

    python experiments/quantised/footprints.py [--rows 1024] [--seed 0]         about a minute on one core

Bytes are those of packed tensors, counted, and must be what the format says beforehand. The signal-to-noise ratio is
that of standard normal rows of 4096 inputs: 10 log10 of the weights' energy over that of what rounding changed. For
delta-CSC the smallest weights of each row are dropped; the formula takes zeros to be anywhere, each by itself:

    bits of a weight = d (1 + e) (v + g) + c / K + s,   e = q / (1 - q),   q = (1 - d)^(2^g)

with density d, v bits of a value, g of a gap, c = 16 of a column's count, s of scales. Writes `footprints.json` and
`footprints.md` beside this file. The last line printed is JSON; exits with 1 where bytes are not as foretold, or
delta-CSC is off its formula by more than 1 %.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.quant import parse
from specdec.quant.delta_csc import Half, compress, values_of
from specdec.quant.delta_streams import GAPS
from specdec.quant.format import Format
from specdec.quant.sparse import keep_largest
from specdec.train import provenance

HERE = Path(__file__).parent
INPUTS = 4096
MATRICES = ((4096, 4096), (4096, 11008))  # outputs, inputs: as of an attention and a down projection
FORMATS = (
    *("int8", "mxint8", "mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"),
    *("int4", "int4-g64", "int4-g128", "int4-asym", "int4-g64-asym", "int4-g128-asym"),
    *("sparse-60", "sparse-70", "sparse", "sparse-90", "sparse-2x4"),
)
RULES = tuple(
    f"{family}-{rule}" for family in ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp4") for rule in ("rceil", "ceil", "even")
)
SPARSITIES = (0.6, 0.7, 0.8, 0.9)
VALUES = {"bfloat16": Half(torch.bfloat16), "int8": parse("int8"), "mxfp6_e2m3": parse("mxfp6_e2m3")}
TOLERANCE = 0.01
COUNT_BITS = 16


def stored_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def sqnr(weight: Tensor, kept: Tensor) -> float:
    noise = (kept.double() - weight.double()).square().sum()
    return 10 * math.log10(weight.double().square().sum() / noise)


def footprint(name: str, weight: Tensor) -> dict[str, Any]:
    form = parse(name)
    parts = form.pack(weight)
    N, K = weight.shape
    return {
        "format": name,
        "bits": form.bits(*MATRICES[0]),
        "bytes": {f"{N}x{K}": form.num_bytes(N, K) for N, K in MATRICES},
        "of_bf16": {f"{N}x{K}": form.num_bytes(N, K) / (2 * N * K) for N, K in MATRICES},
        "sqnr_db": sqnr(weight, form.unpack(parts)),
        "as_foretold": stored_bytes(parts) == form.num_bytes(N, K),
    }


def formula(sparsity: float, value_bits: int, gap: int, K: int, scale_bits: float) -> float:
    """bf16 bits over expected bits of a weight."""
    full_gap = sparsity ** (1 << gap)
    dummies = full_gap / (1 - full_gap)
    return 16 / ((1 - sparsity) * (1 + dummies) * (value_bits + gap) + COUNT_BITS / K + scale_bits)


def delta_csc(kind: str, form: Format, pruned: Tensor, sparsity: float, gap: int) -> dict[str, Any]:
    N, K = pruned.shape
    parts = form.pack(pruned)
    scale_bits = 8 * stored_bytes({"scales": parts["scales"]}) / (N * K) if "scales" in parts else 0.0
    measured = 2 * N * K / stored_bytes(compress(form, parts, N, K, gap))
    expected = formula(sparsity, values_of(form).bits, gap, K, scale_bits)
    return {
        "values": kind,
        "sparsity": sparsity,
        "gap": gap,
        "times_smaller": measured,
        "formula": expected,
        "off": measured / expected - 1,
    }


def delta_rows(weight: Tensor) -> list[dict[str, Any]]:
    """All gap widths for bf16 values; for others the usual one, and the best by the formula."""
    rows = []
    for sparsity in SPARSITIES:
        pruned = weight.masked_fill(~keep_largest(weight.abs(), INPUTS - int(INPUTS * sparsity)), 0)
        for kind, form in VALUES.items():
            bits = values_of(form).bits
            best = max(GAPS, key=lambda gap: formula(sparsity, bits, gap, INPUTS, 0))
            gaps = GAPS if kind == "bfloat16" else sorted({4, best})
            rows += [delta_csc(kind, form, pruned, sparsity, gap) for gap in gaps]
    return rows


def tables(result: dict[str, Any]) -> str:
    first, second = (f"{N}x{K}" for N, K in MATRICES)
    lines = [
        f"# Footprints, {result['date']}",
        "",
        f"`{result['command']}`; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; CPU, exact counts.",
        "",
        f"Matrices are outputs x inputs. SQNR: of {result['rows']} standard normal rows of {INPUTS}. Rules of "
        "scales other than the specification's stand at the end.",
        "",
        f"| format | bits per weight, {first} | bytes | over bf16 | bytes, {second} | over bf16 | SQNR, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["formats"]:
        sizes = [f"{row['bytes'][shape]:,} | {row['of_bf16'][shape]:.4f}" for shape in (first, second)]
        cells = [row["format"], f"{row['bits']:.4f}", *sizes, f"{row['sqnr_db']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "delta-CSC: how many times smaller than bf16; the formula is in the script.",
        "",
        "| zeros | values | gap bits | times smaller | formula | off |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["delta_csc"]:
        cells = [f"{row['sparsity']:.0%}", row["values"], str(row["gap"])]
        cells += [f"{row['times_smaller']:.3f}", f"{row['formula']:.3f}", f"{row['off']:+.2%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="of the Gaussian matrix (default: 1024)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    weight = torch.randn(args.rows, INPUTS, generator=torch.Generator().manual_seed(args.seed))
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python experiments/quantised/footprints.py --rows {args.rows} --seed {args.seed}",
        "versions": provenance.versions(),
        "rows": args.rows,
        "formats": [footprint(name, weight) for name in (*FORMATS, *RULES)],
        "delta_csc": delta_rows(weight),
    }
    text = tables(result)
    (HERE / "footprints.md").write_text(text, encoding="utf-8")
    provenance.write_json(HERE / "footprints.json", result)
    print(text)
    worst = max(abs(row["off"]) for row in result["delta_csc"])
    foretold = all(row["as_foretold"] for row in result["formats"])
    print(json.dumps({"bytes_as_foretold": foretold, "delta_csc_worst": worst}))
    sys.exit(not foretold or worst > TOLERANCE)


if __name__ == "__main__":
    main()
