"""Colours and letters of pictures, for light and for dark paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

THEMES = ("auto", "light", "dark")
MARKERS = ("o", "s", "D", "^", "v", "P", "h", "X")
# Light and dark: paper, ink, quiet ink, grid; then the slots, of even strength on either paper.
LIGHT = ("#fefefe", "#1f2328", "#59636e", "#e2e6ea")
DARK = ("#0e1116", "#e6edf3", "#9299a2", "#2b3138")
LIGHT_SLOTS = ("#1f6fc4", "#d06a05", "#0e8a6a", "#a3428c", "#93780a", "#0f8fa8", "#b83a22", "#55585e")
DARK_SLOTS = ("#6fb1ff", "#f5a24a", "#41cda6", "#e193d0", "#dcc357", "#63d3e8", "#ff8468", "#b2b5bb")


@dataclass(frozen=True)
class Look:
    paper: str
    ink: str
    quiet: str
    pale: str
    slots: tuple[str, ...]

    def slot(self, index: int) -> str:
        return self.slots[index % len(self.slots)]


LOOKS = {"light": Look(*LIGHT, LIGHT_SLOTS), "dark": Look(*DARK, DARK_SLOTS)}


def style(look: Look) -> dict[str, Any]:
    return {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9.5,
        "text.color": look.ink,
        "axes.edgecolor": look.pale,
        "axes.facecolor": "none",
        "axes.labelcolor": look.quiet,
        "axes.labelsize": 9.5,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.titlecolor": look.ink,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlepad": 9,
        "figure.facecolor": look.paper,
        "grid.color": look.pale,
        "grid.linewidth": 0.8,
        "savefig.facecolor": look.paper,
        "svg.hashsalt": "specdec",
        "xtick.color": look.pale,
        "xtick.labelcolor": look.quiet,
        "ytick.color": look.pale,
        "ytick.labelcolor": look.quiet,
        "ytick.left": False,
    }


def halo(look: Look) -> list[Any]:
    """Letters keep clear of what they cross."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground=look.paper)]


def ramp(share: float) -> tuple[str, str]:
    """Fill and ink of a square, from a pale to a full blue; they are the same in both themes."""
    pale, full = (222, 235, 247), (8, 69, 148)
    mixed = [round(a + (b - a) * share) for a, b in zip(pale, full, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#ffffff" if share > 0.66 else "#0a1628"


def follows_theme(svg: str) -> str:
    """The same picture, its colours swapped where the reader's theme is dark."""
    swaps = zip((*LIGHT, *LIGHT_SLOTS), (*DARK, *DARK_SLOTS), strict=True)
    rules = "".join(
        f'[style*="{kind}: {light}"]{{{kind}:{dark}!important}}' for light, dark in swaps for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    inside = svg.index(">", svg.index("<svg")) + 1
    return f"{svg[:inside]}\n {style}{svg[inside:]}"
