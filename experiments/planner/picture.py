"""Speed-up against drafted tokens, published and measured, in one picture: `docs/theory.svg`.

    pip install matplotlib
    python experiments/planner/picture.py [--data FOLDER] [--out FILE]

The two published points (a tutorial of AWS Neuron: 0.744 s plain, 0.502 s with k = 5, 0.889 s with k = 50) with the
band of curves of uniform acceptance that pass through both, see docs/theory.md; and the embedded pair, measured and
predicted (`kcurve.json`, by `kcurve.py`). Same data and matplotlib, same bytes. Without a background, in colours that
are read on white and on black.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from specdec.planner.work import tokens_per_round

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "theory.svg"
PLAIN, AT_5, AT_50 = 0.744, 0.502, 0.889  # seconds, as published
ASSUMED = (0.5, 0.9)  # acceptance of every token, from and to
LENGTHS = range(1, 51)
# Mid-tones: at least 3:1 against white and against black.
BLUE, ORANGE, GREY = "#2f7fd0", "#d0661b", "#808080"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "specdec", "font.size": 10,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11.5,
    "axes.titleweight": "bold", "axes.titlecolor": GREY, "figure.dpi": 72, "legend.labelcolor": GREY,
}  # fmt: skip


def through_both(acceptance: float) -> list[float]:
    """Speed-up at every length, of the costs that give both published numbers at this acceptance."""
    cost_5 = tokens_per_round(acceptance, 5) * AT_5 / PLAIN
    cost_50 = tokens_per_round(acceptance, 50) * AT_50 / PLAIN
    token = (cost_50 - cost_5) / 45
    return [tokens_per_round(acceptance, k) / (cost_5 + (k - 5) * token) for k in LENGTHS]


def published(axes: Any) -> None:
    low, high = (through_both(acceptance) for acceptance in ASSUMED)
    axes.fill_between(LENGTHS, low, high, color=ORANGE, alpha=0.22, lw=0)
    for curve, acceptance, style in ((low, ASSUMED[0], "--"), (high, ASSUMED[1], "-")):
        axes.plot(LENGTHS, curve, style, color=ORANGE, lw=1.4, label=f"acceptance {acceptance}, assumed")
    for k, seconds in ((5, AT_5), (50, AT_50)):
        axes.plot([k], [PLAIN / seconds], "o", color=ORANGE, ms=7, label="published" if k == 5 else None)
        axes.annotate(f"k = {k}: {PLAIN / seconds:.2f}×", (k, PLAIN / seconds), textcoords="offset points",
                      xytext=(-8, 8) if k == 5 else (4, -18), ha="right")  # fmt: skip
    axes.set_title("Published: a 70B target on an accelerator")


def measured(axes: Any, found: dict[str, Any]) -> None:
    rows = found["rows"]
    lengths = [row["k"] for row in rows]
    middle = [row["speedup"]["median"] for row in rows]
    errors = [
        [row["speedup"]["median"] - row["speedup"]["low"] for row in rows],
        [row["speedup"]["high"] - row["speedup"]["median"] for row in rows],
    ]
    predicted = [[row["predicted"][name] for row in rows] for name in ("low", "high", "speedup")]
    axes.fill_between(lengths, predicted[0], predicted[1], color=BLUE, alpha=0.22, lw=0)
    axes.plot(lengths, predicted[2], "-", color=BLUE, lw=1.4, label="predicted from other prompts")
    axes.errorbar(lengths, middle, errors, fmt="o", color=BLUE, ms=6, lw=1.2, label="measured")
    axes.set_title(f"Measured: the embedded pair, {found['date']}")


def picture(folder: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    path = folder / "kcurve.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found is None:
        print(
            f"{path} is missing (python experiments/planner/kcurve.py makes it): the left panel only", file=sys.stderr
        )
    with plt.rc_context(STYLE):
        panels = 1 if found is None else 2
        figure, axes = plt.subplots(1, panels, figsize=(5.6 * panels, 4.2), sharey=True, squeeze=False)
        published(axes[0][0])
        if found is not None:
            measured(axes[0][1], found)
        for one in axes[0]:
            one.axhline(1, color=GREY, lw=1, ls=(0, (2, 3)))
            one.set_xscale("log")
            one.xaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 8, 12, 20, 32, 50]))
            one.xaxis.set_minor_locator(NullLocator())
            one.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            one.set_xlabel("drafted tokens per round, k")
            one.set_ylim(bottom=0)
            one.legend(frameon=False, fontsize=9, loc="lower left")
        axes[0][0].set_ylabel("times plain decoding")
        figure.tight_layout()
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            out, transparent=True, metadata={"Date": None, "Creator": None} if out.suffix == ".svg" else None
        )
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE, help="folder of kcurve.json (beside this one)")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    try:
        picture(args.data, args.out)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("the picture needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
