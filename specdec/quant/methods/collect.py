"""Statistics of an input, added up batch by batch.

Shape suffixes: T tokens, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.methods.method import Stats, working

# Rows of an input that are kept where a method works on rows.
ROWS = 512


class Collector:
    """Of the input of the module `name`, for a text of so many tokens: the `Stats` that are `wanted`.

    `InputError` for inputs that are NaN or infinite, and for a module that the text never reaches.
    """

    def __init__(self, name: str, wanted: frozenset[str], tokens: int):
        self.name, self.wanted = name, wanted
        self.stride = max(1, -(-tokens // ROWS))
        self.stats = Stats()
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        x_TK = working(x).reshape(-1, x.shape[-1])
        magnitude_TK = x_TK.abs()
        amax_K = magnitude_TK.amax(0)
        if not bool(torch.isfinite(amax_K).all()):
            raise InputError(
                f"the calibration text makes the input of {self.name} NaN or infinite; check the weights, or load the "
                "model in float32"
            )
        stats = self.stats
        if "amax_K" in self.wanted:
            stats.amax_K = amax_K if stats.amax_K is None else torch.maximum(stats.amax_K, amax_K)
        if "mean_abs_K" in self.wanted:
            stats.mean_abs_K = _sum(stats.mean_abs_K, magnitude_TK.sum(0))
        if "norm_K" in self.wanted:
            stats.norm_K = _sum(stats.norm_K, x_TK.square().sum(0))
        if "hessian_KK" in self.wanted:
            stats.hessian_KK = _sum(stats.hessian_KK, x_TK.t() @ x_TK)
        if "rows_TK" in self.wanted:
            self.rows.append(x_TK[-stats.count % self.stride :: self.stride].clone())
        stats.count += len(x_TK)

    def finish(self) -> Stats:
        stats = self.stats
        if not stats.count:
            raise InputError(f"the calibration text never reaches {self.name}; give more of it, or keep that layer")
        if stats.mean_abs_K is not None:
            stats.mean_abs_K = stats.mean_abs_K / stats.count
        if stats.norm_K is not None:
            stats.norm_K = stats.norm_K.sqrt()
        if stats.hessian_KK is not None:
            stats.hessian_KK = stats.hessian_KK * (2 / stats.count)
        if self.rows:
            stats.rows_TK = torch.cat(self.rows)
        return stats


def _sum(total: Tensor | None, new: Tensor) -> Tensor:
    return new if total is None else total.add_(new)
