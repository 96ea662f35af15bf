"""Bits per weight against quality and speed in one picture: `docs/quantisation.svg`.

    pip install matplotlib
    python experiments/quantised/picture.py [--data FOLDER] [--out FILE]

Left: KL divergence of the embedded target from full precision, for each format and method (`quality.json`), and after
fine-tuning (`recover.json`). Right: the speed of products on the CPU over torch's bfloat16 one (`kernels.json`), for
4096 inputs x 11008 outputs and the largest number of threads there. Same data and matplotlib, same bytes. The picture
shows text as text; where the font is missing, the reader's own takes its place.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from labels import Box, label

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "quantisation.svg"
MAKERS = {
    "quality.json": "python experiments/quantised/quality.py",
    "recover.json": "python experiments/quantised/recover.py --out runs/recover",
    "kernels.json": "python experiments/quantised/kernels.py",
}
MODEL, SHAPE = "embedded target", (4096, 11008)
FAMILIES = {"integers": "#1f5fa8", "MX": "#c8501e", "sparse": "#24804f", "mixed recipes": "#7a3fa0"}
RECIPES = ("w4a16", "mx4")  # of several formats
SAME = {"sparse": "sparse-80"}  # one format by two names: the short one is shown as the long one
METHODS = {
    "rtn": ("o", "rounded to nearest (rtn)"),
    "awq": ("^", "awq"),
    "gptq": ("s", "gptq"),
    "smoothquant": ("D", "smoothquant"),
    "wanda": ("v", "wanda"),
    "recovered": ("*", "recovered by fine-tuning"),
}  # fmt: skip; a method with options has the same marker, hollow
INK, GREY, PALE = "#222222", "#666666", "#dddddd"
WIDTH, HEIGHT, DPI = 11.6, 6.1, 72  # inches; pixels are points
GAP = 1.021  # between the bits of neighbours at about the same height
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "specdec", "font.size": 9.5,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#999999", "xtick.color": GREY, "ytick.color": GREY,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11.5,
    "axes.titleweight": "bold", "axes.axisbelow": True, "figure.facecolor": "white", "figure.dpi": DPI,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    y: float
    marker: str
    filled: bool
    method: str = ""


@dataclass
class Column:
    """The points of one format, above each other."""

    name: str
    bits: float
    points: list[Point]
    x: float = 0.0

    @property
    def colour(self) -> str:
        if self.name in RECIPES:
            return FAMILIES["mixed recipes"]
        starts = {"int": "integers", "mx": "MX", "sparse": "sparse"}
        return next(FAMILIES[family] for start, family in starts.items() if self.name.startswith(start))

    @property
    def spots(self) -> list[tuple[float, float]]:
        return [(self.x, point.y) for point in self.points]

    @property
    def span(self) -> tuple[float, float]:
        heights = [point.y for point in self.points]
        return min(heights), max(heights)


def read(folder: Path, name: str) -> Any:
    path = folder / name
    if not path.exists():
        raise SystemExit(f"{path} is missing: `{MAKERS[name]}` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def quality_columns(quality: dict[str, Any], recover: dict[str, Any]) -> list[Column]:
    if MODEL not in quality["models"]:
        raise SystemExit(f"quality.json has nothing of the {MODEL}: `{MAKERS['quality.json']}` measures it")
    found: dict[str, Column] = {}
    for row in quality["models"][MODEL].values():
        if not row["kl"]:  # full precision
            continue
        name = SAME.get(row["recipe"], row["recipe"])
        method, *options = row["method"].split()
        column = found.setdefault(name, Column(name, row["bits"], []))
        column.points.append(Point(row["kl"], METHODS[method][0], not options, row["method"]))
    for recipe, row in recover["formats"].items():
        name = SAME.get(recipe, recipe)
        column = found.setdefault(name, Column(name, row["bits"], []))
        column.points.append(Point(row["after"]["kl"], METHODS["recovered"][0], True))
    return list(found.values())


def speed_columns(kernels: dict[str, Any]) -> tuple[list[Column], int]:
    """And the number of threads."""
    inputs, outputs = SHAPE
    rows = [row for row in kernels["rows"] if (row["inputs"], row["outputs"]) == SHAPE and row["rows"] in (1, 4)]
    if not rows:
        raise SystemExit(f"kernels.json has no {inputs} x {outputs}: `{MAKERS['kernels.json']}` measures it")
    threads = max(row["threads"] for row in rows)
    found: dict[str, Column] = {}
    for row in rows:
        if row["threads"] == threads and not row["weights"].endswith("bfloat16"):
            name = SAME.get(row["weights"], row["weights"])
            column = found.setdefault(name, Column(name, 8 * row["bytes"] / (inputs * outputs), []))
            column.points.append(Point(row["over_torch"], "o", row["rows"] == 1))
    return list(found.values()), threads


def spread(columns: list[Column], margin: Any) -> None:
    """Places columns of about the same bits and height side by side. `margin(low, high)` widens a span."""
    columns.sort(key=lambda column: (column.bits, column.name))
    for column in columns:
        column.x = column.bits
    for _ in range(60):
        for i, left in enumerate(columns):
            for right in columns[i + 1 :]:
                (low, high), (low_2, high_2) = margin(*left.span), margin(*right.span)
                short = GAP / (right.x / left.x)
                if short > 1 and low < high_2 and low_2 < high:
                    left.x, right.x = left.x / math.sqrt(short), right.x * math.sqrt(short)


def draw(axes: Any, columns: list[Column]) -> None:
    alike: dict[tuple[str, bool, str], list[tuple[float, float]]] = {}
    for column in columns:
        axes.plot([column.x] * 2, column.span, color=column.colour, lw=1.4, alpha=0.35, zorder=1, clip_on=False)
        for point in column.points:
            alike.setdefault((point.marker, point.filled, column.colour), []).append((column.x, point.y))
    for (marker, filled, colour), spots in alike.items():
        star = marker == METHODS["recovered"][0]
        axes.plot(
            *zip(*spots, strict=True), marker, ms=10.5 if star else 6.3, mfc=colour if filled else "none",
            mec="white" if filled else colour, mew=0.6 if filled else 1.2, zorder=4 if star else 3 if filled else 5,
            clip_on=False,
        )  # fmt: skip


def legend(axes: Any, entries: list[tuple[str, str, bool, str]], **where: Any) -> Any:
    """`entries` are (marker, colour, filled, text)."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker=marker, ms=9 if marker == "*" else 6, mfc=colour if filled else "white",
               mec=colour, mew=1.1, label=text)
        for marker, colour, filled, text in entries
    ]  # fmt: skip
    return axes.legend(handles=handles, frameon=False, fontsize=8.8, labelcolor=INK, handletextpad=0.3, **where)


def picture(folder: Path, out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import StrMethodFormatter

    quality, recover, kernels = (read(folder, name) for name in MAKERS)
    left, (right, threads) = quality_columns(quality, recover), speed_columns(kernels)
    spread(left, lambda low, high: (low / 1.15, high * 1.15))
    spread(right, lambda low, high: (low - 0.08, high + 0.08))
    with plt.rc_context(STYLE):
        figure, (kl, speed) = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT), sharex=True)
        figure.subplots_adjust(left=0.06, right=0.985, top=0.93, bottom=0.2, wspace=0.12)
        dress_x((kl, speed), [column.x for column in left + right])
        kl.set_yscale("log")
        kl.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        kl.set_ylim(min(c.span[0] for c in left) / 1.6, max(c.span[1] for c in left) * 1.9)
        kl.set_title("Quality: KL divergence from full precision, nats")
        top = max(column.span[1] for column in right)
        speed.set_ylim(0, 1.12 * max(top, 16 / 4.1))
        speed.set_title("Speed: times torch's bfloat16 product")
        draw(kl, left)
        draw(speed, right)
        curve = baselines(speed)
        written = explain(figure, kl, speed, left, threads)
        figure.canvas.draw()
        taken = [tuple(one.get_window_extent().extents) for one in written]
        label(kl, {c.name: (c.colour, c.spots) for c in left}, taken)
        label(speed, {c.name: (c.colour, c.spots) for c in right}, taken + curve)
        plt.close(figure)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, metadata={"Date": None, "Creator": None} if out.suffix == ".svg" else None)


def baselines(axes: Any) -> list[Box]:
    """Draws how much faster fewer bytes can be, and the bfloat16 product; boxes that cover both."""
    low, high = axes.get_xlim()
    bits = [low * (high / low) ** (i / 60) for i in range(61)]
    axes.plot(bits, [16 / b for b in bits], color=GREY, lw=1, ls=(0, (2, 3)), zorder=1)
    axes.axhline(1, color=GREY, lw=1, zorder=1)
    spots = [axes.transData.transform((b, 16 / b)) for b in bits]
    level = axes.transData.transform((1, 1))[1]
    line = (spots[0][0], level - 0.5, spots[-1][0], level + 0.5)
    return [line, *((x, y_2, x_2, y) for (x, y), (x_2, y_2) in pairwise(spots))]


def dress_x(panels: Iterable[Any], bits: list[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(min(bits) / 1.04, max(bits) * 1.07)
        axes.xaxis.set_major_locator(FixedLocator([4, 4.5, 5, 6, 7, 8, 9]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("stored bits per weight, scales included")
        axes.grid(color=PALE, lw=0.6)
        axes.tick_params(which="both", length=0)


def explain(figure: Any, kl: Any, speed: Any, columns: list[Column], threads: int) -> list[Any]:
    """Legends and what the picture cannot say; what stands inside the panels."""
    used = {point.marker for column in columns for point in column.points}
    methods = [(marker, GREY, True, text) for marker, text in METHODS.values() if marker in used]
    hollow = {(point.marker, GREY, False, point.method) for c in columns for point in c.points if not point.filled}
    methods += sorted(hollow)
    families = [("o", colour, True, name) for name, colour in FAMILIES.items()]
    legend(figure, families, loc="lower center", ncols=4, bbox_to_anchor=(0.5, 0.075))
    inputs, outputs = SHAPE
    figure.text(
        0.06, 0.03,
        f"Left: held-out text (recovered: other rows of it); lines join the methods of a format. Right: {inputs} × "
        f"{outputs} weights on a CPU, {threads} thread{'s' * (threads > 1)}, M rows of activations;\n"
        "dotted: as many times faster as bytes are fewer. Points of about the same bits are drawn side by side.",
        fontsize=8.8, color=GREY, va="center", linespacing=1.5,
    )  # fmt: skip
    small: dict[str, Any] = {"color": GREY, "fontsize": 8.8}
    return [
        legend(kl, methods, loc="lower left"),
        legend(speed, [("o", GREY, True, "M = 1"), ("o", GREY, False, "M = 4")], loc="upper right"),
        speed.text(5.3, 16 / 5.3 + 0.03, "16 / bits", va="bottom", **small),
        speed.text(5.3, 0.96, "bfloat16", va="top", **small),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HERE, help="folder of the three .json files (beside this one)")
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
