"""GPTQ: columns are rounded in turn, and those to come make up for the error (Frantar et al., arXiv 2210.17323).

Shape suffixes: N outputs, K inputs, M columns of a block, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.format import Format, GridFormat, finite
from specdec.quant.methods.method import Method, Stats, have, names_of, number, register_method, working

# Columns whose effect on the rest is added up before it is applied: one product instead of many.
_BLOCK = 128
# How often a Hessian that is not positive definite is damped ten times more.
_RETRIES = 4


@dataclass(frozen=True)
class Gptq(Method):
    """Rounding that knows what else reads the input, on the grid of any format that has one.

    damping: of the mean of the Hessian's diagonal, added to it. act_order: columns in order of falling activation
    instead of from left to right; scales are then fitted to the weights as they were before. Otherwise the scale of a
    group is fitted when the group is reached, to weights that make up for the groups before.
    Inputs that the text never used are rounded to nearest. Lossless: no.
    """

    damping: float = 0.01
    act_order: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hessian_KK"})

    def __post_init__(self) -> None:
        number("gptq's damping", self.damping, 0.0, 1.0)

    def check(self, formats: Mapping[str, Format]) -> None:
        for name, format in formats.items():
            if not isinstance(format, GridFormat):
                raise InputError(
                    f"gptq chooses points of a grid, and {format.name} has none ({name}); use the method rtn or awq"
                )

    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        assert isinstance(format, GridFormat)
        return quantise(weight_NK, have(stats.hessian_KK, "hessian_KK"), format, self.damping, self.act_order)


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor `[K, K]` of the inverse of the damped Hessian: its rows say how errors are passed on.

    `InputError` for a Hessian that is not finite, or stays indefinite when it is damped 10^4 times more.
    """
    H = hessian_KK.clone()
    diagonal = H.diagonal()
    if not bool(torch.isfinite(H).all()):
        raise InputError("the Hessian of the calibration text is not finite; load the model in float32")
    unused = diagonal <= 0
    mean = float(diagonal[~unused].mean()) if bool((~unused).any()) else 1.0
    diagonal[unused] = mean
    diagonal += damping * mean
    for attempt in range(_RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(H)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper
        diagonal += mean * max(damping, 1e-4) * 9 * 10**attempt
    raise InputError(
        "the Hessian of the calibration text stays singular however it is damped; give more calibration text"
    )


def quantise(
    weight_NK: Tensor, hessian_KK: Tensor, format: GridFormat, damping: float = 0.01, act_order: bool = False
) -> dict[str, Tensor]:
    """The parts of `weight_NK` on the grid of `format` that keep `trace(D H D^T)` small, D the error of the weights."""
    N, K = weight_NK.shape
    format.parts(N, K)
    rest_NK = finite(working(weight_NK)).to(hessian_KK.dtype).clone()
    order = hessian_KK.diagonal().argsort(descending=True, stable=True) if act_order else None
    if order is not None:
        rest_NK, hessian_KK = rest_NK[:, order], hessian_KK[order][:, order]
    upper_KK = inverse_factor(hessian_KK, damping)
    grid = _Grid(format, N, K, weight_NK if act_order else None)
    points_NK = torch.empty_like(rest_NK)
    width = _width(format.group(K), K)
    for start in range(0, K, width):
        end = min(start + width, K)
        errors_NM = torch.empty_like(rest_NK[:, start:end])
        for column in range(start, end):
            place = column if order is None else int(order[column])
            fitted = grid.at(place, rest_NK)
            now_N = rest_NK[:, column]
            point_N = format.nearest(now_N[:, None], fitted)[:, 0].to(now_N)
            error_N = (now_N - point_N) / upper_KK[column, column]
            points_NK[:, column], errors_NM[:, column - start] = point_N, error_N
            rest_NK[:, column:end] -= error_N[:, None] * upper_KK[column, column:end]
        rest_NK[:, end:] -= errors_NM @ upper_KK[start:end, end:]
    if order is not None:
        points_NK = points_NK[:, order.argsort()]
    fitted = grid.all()
    return {"codes": format.encode(points_NK.to(working(weight_NK).dtype), fitted), **fitted}


def _width(group: int, K: int) -> int:
    """Columns of a block, such that groups begin where all errors before them have been passed on within a block."""
    if group in (1, K):
        return _BLOCK
    if group <= _BLOCK:
        return _BLOCK // group * group
    return next(size for size in range(_BLOCK, 0, -1) if group % size == 0)


class _Grid:
    """The scales of each group: all from `before`, or each when it is reached."""

    def __init__(self, format: GridFormat, N: int, K: int, before: Tensor | None):
        self.format, self.K, self.group = format, K, format.group(K)
        self.groups: dict[int, dict[str, Tensor]] = {}
        if before is not None:
            for first in range(0, K, self.group):
                self.at(first, working(before))

    def at(self, column: int, weight_NK: Tensor) -> dict[str, Tensor]:
        """Of the group that a column of the weight belongs to."""
        number = column // self.group
        if number not in self.groups:
            first = number * self.group
            columns = weight_NK[:, first : first + self.group].contiguous()
            self.groups[number] = self.format.fit(columns)
        return self.groups[number]

    def all(self) -> dict[str, Tensor]:
        """The fitted parts of the whole weight."""
        found = [self.groups[number] for number in sorted(self.groups)]
        if len(found) == 1:
            return found[0]
        for name, part in found[0].items():
            if part.ndim != 2 or part.shape[1] != 1:
                raise InputError(
                    f"'{name}' of {self.format.name} is {list(part.shape)} for one group, not [N, 1]: gptq cannot put "
                    f"groups together ({names_of(found[0])})"
                )
        return {name: torch.cat([fitted[name] for fitted in found], 1) for name in found[0]}


register_method("gptq", Gptq)
