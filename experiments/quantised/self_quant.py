"""A target that drafts for itself in fewer bits: how many drafted tokens it takes, by the draft's format.

    python experiments/quantised/self_quant.py [--target PATH] [--prompts N] [--tokens N]      some minutes

The built-in prompts, k = 4, on the embedded target or another; greedy and at temperature 1; a target in full precision,
and one that is stored in int8 itself. Texts are compared with plain decoding of the same target. Acceptance does not
depend on the machine; for speed run `specdec compare --drafter self_quant --drafter-option scheme=mxfp4 --k 4`.
Writes `self_quant.md` beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

import torch
from rich.progress import track

import specdec
from specdec.bench.prompts import read_prompts
from specdec.policy import Fixed
from specdec.quant.format import parse
from specdec.train import provenance

HERE = Path(__file__).parent
K = 4
SCHEMES = ("int8", "mxint8", "mxfp8_e4m3", "mxfp6_e2m3", "int4", "int4-a8", "mxfp4", "mxfp4-a8", "sparse-60")
# How the target is stored, its dtype, and the formats that are smaller.
TARGETS = ((None, "float32", SCHEMES), (None, "bfloat16", SCHEMES), ("int8", "float32", SCHEMES[3:]))
TEMPERATURES = (0.0, 1.0)


def row(target: str | None, stored: str | None, dtype: str, scheme: str, texts: list[str], tokens: int) -> str:
    options = {"quantize": stored} if stored else {}
    decoder = specdec.load(
        target, drafter="self_quant", drafter_options={"scheme": scheme}, dtype=dtype, policy=Fixed(K), **options
    )
    cells = [stored or dtype, scheme, f"{parse(scheme).bits():.2f}"]
    for temperature in TEMPERATURES:
        sampling = {"max_new_tokens": tokens, "temperature": temperature, "seed": 0}
        outs = [decoder.generate(text, **sampling) for text in texts]
        plain = [decoder.generate_plain(text, **sampling).tokens for text in texts]
        rounds = [r for out in outs for r in out.trace.rounds]
        drafted, accepted = sum(r.num_nodes for r in rounds), sum(r.num_accepted for r in rounds)
        same = sum(out.tokens == other for out, other in zip(outs, plain, strict=True))
        cells += [f"{accepted / drafted:.3f}", f"{1 + accepted / len(rounds):.2f}", f"{same}/{len(texts)}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a folder or a name (the embedded target)")
    parser.add_argument("--prompts", type=int, help="only so many (all)")
    parser.add_argument("--schemes", nargs="*", default=SCHEMES, help="formats of the draft (all of the table)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "self_quant.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    texts = [prompt.text for prompt in read_prompts(None, args.prompts)]
    cells = [
        (stored, dtype, scheme) for stored, dtype, schemes in TARGETS for scheme in schemes if scheme in args.schemes
    ]
    lines = [row(args.target, *cell, texts, args.tokens) for cell in track(cells, "self_quant", transient=True)]
    heads = ["target", "draft", "bits of a weight"]
    for temperature in TEMPERATURES:
        heads += [f"accepted of drafted, t = {temperature:g}", "tokens per round", "texts as plain"]
    command = " ".join(["python experiments/quantised/self_quant.py", *sys.argv[1:]])
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    text = (
        f"# A target that drafts for itself, {datetime.date.today().isoformat()}\n\n"
        f"`{command}` ({versions}). {args.target or 'Embedded target'}, {len(texts)} "
        f"built-in prompts, {args.tokens} new tokens, k = {K}.\n\n"
        f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n" + "\n".join(lines) + "\n"
    )
    args.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
