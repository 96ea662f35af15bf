"""Products with stored weights: our kernels where they run, the same sums in torch elsewhere.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.kernels import ops

if TYPE_CHECKING:
    from specdec.quant.format import Format, Parts

# Smaller rows are divided by this, so that nothing overflows: such a row is zero for every purpose.
SMALLEST = 1e-30
# Up to so many rows, torch's products of one row each are faster than its one product, which packs the weight anew.
_ROWS_ALONE = 4


# Groups that are summed side by side where rows are rounded and weights have scales by groups.
_LANES = 16

# Kinds of stored weights, as the compiled kernels number them: by what stands before the options of a format's name.
_KINDS = {
    "mxfp4": 0,
    "mxfp6_e2m3": 1,
    "mxfp6_e3m2": 2,
    "mxfp8_e4m3": 3,
    "mxfp8_e5m2": 4,
    "mxint8": 5,
    "int4": 6,
    "sparse": 7,
}


def linear(x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times the stored weight `[N, K]` transposed, plus `bias [N]`: `[..., N]` in the dtype of `x`.

    A row's bits do not depend on the other rows where `invariant` says so: our kernels decode the weights once for all
    rows, and give what `ops.linear` gives of the decoded matrix.
    """
    if _on_triton(x.device):
        from specdec.kernels import triton_packed

        return triton_packed.linear(x, format, parts, bias)
    if _is_compiled(x.device, format) and x.dtype in ops.DTYPES:
        return _compiled(x, format, parts, bias)
    return reference(x, format, parts, bias)


def _compiled(x: Tensor, format: Format, parts: Parts, bias: Tensor | None) -> Tensor:
    family = _family(format)
    out: Tensor
    if family == "int8":
        out = torch.ops.specdec.int8_linear.default(x, parts["codes"], parts["scales"], bias)
        return out
    product = torch.ops.specdec.a8_linear if format.rounds_rows else torch.ops.specdec.packed_linear
    codes, scales = (parts["mask"], parts["values"]) if family == "sparse" else (parts["codes"], parts["scales"])
    group = x.shape[-1] // scales.shape[1] if family == "int4" else 32
    out = product.default(x, codes, scales, parts.get("zeros"), _KINDS[family], group, bias)
    return out


def reference(x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """The same in torch alone, on any device: weights are unpacked for each call."""
    if format.name == "int8":
        return int8_reference(x, parts["codes"], parts["scales"], bias)
    if format.rounds_rows:
        from specdec.quant.rows import RowsRounded

        assert isinstance(format, RowsRounded), f"{format.name}: rounds rows in a way of its own"
        return a8_reference(x, *format.whole_numbers(parts), bias)
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not ops.available():
        _warn_once(format.name, ops.why_not())
    return F.linear(x, format.unpack(parts, x.dtype), bias)


@lru_cache(maxsize=1)
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(
        f"{name} weights are unpacked for every product, which is slow: no compiled kernels here ({reason}). int8 is "
        "fast without them",
        stacklevel=4,
    )


def invariant(device: torch.device, format: Format) -> bool:
    """Whether a row's bits do not depend on the rows beside it here: by exact sums, or by our kernels' fixed order."""
    if _on_triton(device):
        from specdec.kernels import triton_packed

        return triton_packed.family(format) is not None
    return format.rounds_rows or _is_compiled(device, format)


def _family(format: Format) -> str:
    return format.name.partition("-")[0]


def _is_compiled(device: torch.device, format: Format) -> bool:
    known = device.type == "cpu" and (format.name == "int8" or _family(format) in _KINDS)
    return known and (ops.loaded or (not torch.compiler.is_compiling() and ops.available()))


def _on_triton(device: torch.device) -> bool:
    return device.type == "cuda" and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def rounded_rows(rows_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as int8 `[M, K]` and one float32 scale each `[M, 1]`: the largest magnitude becomes 127."""
    rows = rows_MK.float()
    largest_M1 = rows.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    factor_M1 = torch.full_like(largest_M1, 127).div(largest_M1)  # `127 / x` would be 127 times a rounded inverse
    return (rows * factor_M1).round().to(torch.int8), largest_M1 / 127


def int8_product(rows_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Rows times the transpose of the weight, both int8: int32 `[M, N]`, exact."""
    weight_KN = weight_NK.t()
    if torch.compiler.is_compiling() or not 1 < len(rows_MK) <= _ROWS_ALONE:
        return torch._int_mm(rows_MK, weight_KN)
    return torch.cat([torch._int_mm(row[None], weight_KN) for row in rows_MK])


def int8_reference(x: Tensor, codes_NK: Tensor, scales_N: Tensor, bias: Tensor | None = None) -> Tensor:
    """Activations rounded to int8 row by row, products summed exactly in int32, then scaled in float32."""
    codes_MK, scales_M1 = rounded_rows(x.reshape(-1, x.shape[-1]))
    out = int8_product(codes_MK, codes_NK).float() * scales_M1 * scales_N
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def a8_reference(x: Tensor, weight_NK: Tensor, scales_NG: Tensor, unit: float, bias: Tensor | None = None) -> Tensor:
    """Activations rounded to int8 row by row, times whole numbers with a scale for each 32 inputs, as the kernels do.

    The sum over a group is exact. Lane g of sixteen adds up those of the groups g, g + 16, ... times their scales, in
    order; lanes are added in halves: so the bits are the kernels'.
    """
    codes_MK, scales_M1 = rounded_rows(x.reshape(-1, x.shape[-1]))
    rows_GMk = codes_MK.float().unflatten(1, (-1, 32)).transpose(0, 1)
    weight_GNk = weight_NK.float().unflatten(1, (-1, 32)).transpose(0, 1)
    lanes = torch.zeros(_LANES, len(codes_MK), len(weight_NK), device=x.device)
    for first in range(0, len(rows_GMk), _LANES):
        some = slice(first, first + _LANES)
        sums_gMN = torch.bmm(rows_GMk[some], weight_GNk[some].transpose(1, 2))  # whole numbers below 2^24
        lanes[: len(sums_gMN)] += sums_gMN * scales_NG.t()[some].unsqueeze(1)
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    out = lanes[0] * (scales_M1 * unit)
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], -1)
