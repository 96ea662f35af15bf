"""SmoothQuant: outliers of activations are moved into the weights (Xiao et al., arXiv 2211.10438).

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.format import Format
from specdec.quant.methods.method import Linear, Method, Stats, have, number, register_method

# Scales stay within this factor of one, so that what they are folded into stays a normal number.
_WIDEST = 1e4


@dataclass(frozen=True)
class SmoothQuant(Method):
    """s = max|X|^alpha / max|W|^(1 - alpha) for each channel, folded into the norm before; then round to nearest.

    For formats that round activations too (int8). Layers of a recipe that are in other formats are rounded to nearest.
    alpha: how much of the difficulty moves, 0 to 1. Lossless: no.
    """

    alpha: float = 0.5

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"amax_K"})

    def __post_init__(self) -> None:
        number("smoothquant's alpha", self.alpha, 0.0, 1.0)

    def check(self, formats: Mapping[str, Format]) -> None:
        if not any(format.rounds_rows for format in formats.values()):
            others = ", ".join(sorted({format.name for format in formats.values()}))
            raise InputError(
                f"smoothquant makes activations easier to round, and {others} rounds weights alone; use int8, or the "
                "method awq or gptq"
            )

    def scales(
        self, layers: list[Linear], stats: Stats, into: str, shared: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        if into != "norm" or not all(layer.format.rounds_rows for layer in layers):
            return None
        return shared(migration(have(stats.amax_K, "amax_K"), [layer.weight_NK for layer in layers], self.alpha))

    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        return format.pack(weight_NK)


def migration(amax_K: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """The scales `[K]` of an input with these largest magnitudes, read by these weights `[N, K]`; 1 if unused."""
    weight_K = reduce(torch.maximum, (weight.abs().amax(0) for weight in weights)).to(amax_K)
    s_K = amax_K**alpha / weight_K ** (1 - alpha)
    return torch.where((amax_K > 0) & (weight_K > 0), s_K, 1.0).clamp(1 / _WIDEST, _WIDEST)


register_method("smoothquant", SmoothQuant)
