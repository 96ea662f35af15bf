"""The table of a quantised model: bits and bytes of each layer and of the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from specdec.cli.screen import size

if TYPE_CHECKING:
    from rich.table import Table

    from specdec.quant.report import Layer, Report


def table(report: Report, every: bool = False) -> Table:
    """Layers that differ in the numbers of their names alone share a line, unless `every`."""
    from rich.table import Table

    from specdec.quant.report import grouped

    found = Table(box=None, pad_edge=False)
    found.add_column("layer", overflow="fold")
    for title in ("", "shape", "format", "bits", "before", "after", "ratio"):
        found.add_column(title, justify="left" if title == "format" else "right", no_wrap=True)
    groups: Iterable[tuple[str, list[Layer]]] = grouped(report.layers)
    if every:
        groups = [(layer.module, [layer]) for layer in report.layers]
    for name, layers in groups:
        first, before, after = layers[0], sum(layer.before for layer in layers), sum(layer.after for layer in layers)
        N, K = first.shape
        times = f"×{len(layers)}" if len(layers) > 1 else ""
        numbers = (size(before), size(after), f"{before / after:.2f}") if before else ("tied", size(after), "")
        found.add_row(name, times, f"{N}×{K}", first.format, f"{first.bits:.3g}", *numbers)
    found.add_section()
    linear = sum(layer.after for layer in report.layers)
    read = report.weight_bytes * sum(layer.weights for layer in report.layers)
    bits, ratio = f"{report.bits:.3g}", f"{report.linear_ratio:.2f}"
    found.add_row("all of these", f"×{len(report.layers)}", "", "", bits, size(read), size(linear), ratio)
    for reason, kept in report.kept_bytes().items():
        found.add_row(f"left out: {reason}", "", "", "", "", size(kept), size(kept), "")
    whole = (size(report.before), size(report.after), f"{report.ratio:.2f}")
    found.add_row("the whole model", "", "", "", "", *whole)
    return found
