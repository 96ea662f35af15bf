"""AWQ: weights that meet large activations are scaled up before they are rounded (Lin et al., arXiv 2306.00978).

Shape suffixes: N outputs, K inputs, T tokens, G groups of a row, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.format import Format, GridFormat
from specdec.quant.methods.gptq import Gptq
from specdec.quant.methods.method import Linear, Method, Stats, have, number, product, register_method

# Shares of a group's range that are tried as its new range.
_RANGES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_LEAST = 1e-4  # of mean magnitudes, so that a channel that is never used has a scale


@dataclass(frozen=True)
class Awq(Method):
    """s = mean|x|^alpha for each input channel, with the alpha that keeps the outputs of the layers best.

    Searched for all layers together that share an input, over `grid` + 1 alphas from 0 (round to nearest) to 1, by the
    error of the products as the format makes them. Scales are folded into the norm or the linear layer before where
    that is exact, else there are none. clip: each group's range is then cut where that makes the error of its products
    smaller (formats with a grid). rounding: "rtn", or "gptq" on the scaled weights, without clipping. Lossless: no.
    """

    grid: int = 20
    clip: bool = True
    rounding: str = "rtn"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"mean_abs_K", "rows_TK"} | ({"hessian_KK"} if self.rounding == "gptq" else set()))

    def __post_init__(self) -> None:
        number("awq's grid", self.grid, 1, 1000)
        if self.rounding not in ("rtn", "gptq"):
            raise InputError(f"awq's rounding is 'rtn' or 'gptq', not {self.rounding!r}")

    def check(self, formats: Mapping[str, Format]) -> None:
        if self.rounding == "gptq":
            Gptq().check(formats)

    def scales(
        self, layers: list[Linear], stats: Stats, into: str, shared: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        mean_K = have(stats.mean_abs_K, "mean_abs_K")
        return search(layers, mean_K, have(stats.rows_TK, "rows_TK"), int(self.grid), shared)

    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        if self.rounding == "gptq":
            return Gptq().round(weight_NK, format, stats)
        if self.clip and isinstance(format, GridFormat):
            return clipped(weight_NK, have(stats.rows_TK, "rows_TK"), format)
        return format.pack(weight_NK)


def search(
    layers: list[Linear], mean_abs_K: Tensor, rows_TK: Tensor, grid: int, shared: Callable[[Tensor], Tensor]
) -> Tensor:
    """The best scales `[K]`: of mean 1 between their ends, all one when nothing is better than rounding to nearest."""
    mean_K = mean_abs_K.clamp_min(_LEAST * float(mean_abs_K.max()) or 1.0)
    best_K, least = torch.ones_like(mean_K), float("inf")
    wanted = [rows_TK @ layer.weight_NK.to(rows_TK).t() for layer in layers]
    for step in range(grid + 1):
        s_K = shared(mean_K ** (step / grid))
        s_K = s_K / (s_K.max() * s_K.min()).sqrt()
        error = sum(output_error(layer, rows_TK, s_K, exact) for layer, exact in zip(layers, wanted, strict=True))
        if error < least:
            best_K, least = s_K, float(error)
    return best_K


def output_error(layer: Linear, rows_TK: Tensor, s_K: Tensor, exact_TN: Tensor) -> float:
    """Squared error of the products with the scaled and stored weight, relative to the outputs `exact_TN`."""
    s = s_K.to(layer.weight_NK)
    parts = layer.format.pack(layer.weight_NK * s)
    out_TN = product(rows_TK / s.to(rows_TK), layer.format, parts)
    return float((out_TN - exact_TN).square().sum() / exact_TN.square().sum().clamp_min(1e-30))


def clipped(weight_NK: Tensor, rows_TK: Tensor, format: GridFormat) -> dict[str, Tensor]:
    """The parts for ranges cut, group by group, such that the outputs of the group alone are nearest.

    Weights beyond a range saturate. A range is cut only where that is better than the whole.
    """
    N, K = weight_NK.shape
    size = format.group(K)
    format.parts(N, K)
    rows_TGg = rows_TK.to(weight_NK).unflatten(-1, (-1, size))
    gram_Ggg = torch.einsum("tgi,tgj->gij", rows_TGg, rows_TGg)
    groups_NGg = weight_NK.unflatten(-1, (-1, size))
    low, high = groups_NGg.amin(-1, keepdim=True), groups_NGg.amax(-1, keepdim=True)

    def error_NG(fit_NK: Tensor) -> Tensor:
        fitted = format.fit(fit_NK)
        stored = format.unpack({"codes": format.encode(weight_NK, fitted), **fitted}, weight_NK.dtype)
        off = (stored - weight_NK).unflatten(-1, (-1, size))
        # Per group, for a batch of it has the memory of one weight: [G, N, g] times [G, g, g].
        error: Tensor = (torch.bmm(off.transpose(0, 1), gram_Ggg).transpose(0, 1) * off).sum(-1)
        return error

    best_NGg, least_NG = groups_NGg.clone(), error_NG(weight_NK)
    for share in _RANGES:
        cut_NGg = torch.minimum(torch.maximum(groups_NGg, low * share), high * share)
        error = error_NG(cut_NGg.flatten(-2))
        better = error < least_NG
        least_NG = torch.where(better, error, least_NG)
        best_NGg = torch.where(better[..., None], cut_NGg, best_NGg)
    fitted = format.fit(best_NGg.flatten(-2))
    return {"codes": format.encode(weight_NK, fitted), **fitted}


register_method("awq", Awq)
