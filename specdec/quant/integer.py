"""Integer weights: int8 with a scale for each output, int4 with one for each group of inputs.

Shape suffixes: N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.kernels.packed import SMALLEST
from specdec.quant.bits import pack_bits, row_chunks, unpack_bits
from specdec.quant.format import GridFormat, Part, Parts, finite, register_format

GROUPS = (32, 64, 128)
# More than these would make the far end of the grid infinite, in bfloat16 too. Weights beyond saturate.
_MOST_INT8 = torch.finfo(torch.bfloat16).max
_MOST, _MOST_ASYMMETRIC = 2.0**125 - 2.0**117, 2.0**124 + 2.0**120
# Positive scales that are tried, as shares of the one that reaches both ends: what is cut off there may cost less than
# coarser steps.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


class Int8(GridFormat):
    """Parts `codes` int8 `[N, K]` and `scales` float32 `[N]`: symmetric, -127 to 127; products round activations too.

    Lossless: no, weights and activations are rounded; each row of activations by its own scale, so no row depends on
    another.
    """

    name = "int8"
    rounds_rows = True

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return {"codes": Part((N, K), torch.int8), "scales": Part((N,), torch.float32)}

    def group(self, K: int) -> int:
        return K

    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        scales = torch.empty(weight_NK.shape[0], dtype=torch.float32, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            scales[rows] = _divided(weight_NK[rows].abs().amax(1).float().clamp_(SMALLEST, _MOST_INT8), 127)
        return {"scales": scales}

    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        codes = torch.empty(weight_NK.shape, dtype=torch.int8, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            points = (finite(weight_NK[rows]).float() / fitted["scales"][rows, None]).round_()
            codes[rows] = points.clamp_(-127, 127).to(torch.int8)
        return codes

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        codes = parts["codes"]
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for rows in row_chunks(out):
            out[rows] = codes[rows].float() * parts["scales"][rows, None]
        return out

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` for scales that are not finite."""
        super().check(parts, N, K)
        _check_grid(self, parts, N, K)


class Int4(GridFormat):
    """Parts `codes` uint8 `[N, K / 2]` (low nibble first), `scales` bfloat16 `[N, G]`, asymmetric also `zeros` uint8.

    A nibble q stands for (q - 8) * scale, with scales of either sign, or for (q - zero) * scale. Codes are chosen for
    the scale as it is stored. `positive`: without negative scales, which the kernels of other runtimes do not take; the
    scale of each group is the one of several that leaves the least squared error.
    Lossless: no, weights are rounded.
    """

    def __init__(self, group: int = 32, asymmetric: bool = False, positive: bool = False):
        self.size, self.asymmetric, self.positive = group, asymmetric, positive

    @property
    def name(self) -> str:
        options = (f"-g{self.size}" if self.size != GROUPS[0] else "") + ("-asym" if self.asymmetric else "")
        return f"int4{options}" + ("-pos" if self.positive else "")

    def parts(self, N: int, K: int) -> dict[str, Part]:
        if K % self.size or K == 0:
            fits = [f"int4-g{size}" for size in GROUPS if K and K % size == 0]
            advice = f"choose {' or '.join(fits)}" if fits else "keep this module in its dtype, or quantise it as int8"
            raise InputError(f"{self.name} stores groups of {self.size} inputs; a weight [{N}, {K}] has {K}: {advice}")
        found = {"codes": Part((N, K // 2), torch.uint8), "scales": Part((N, K // self.size), torch.bfloat16)}
        if self.asymmetric:
            found["zeros"] = Part((N, K // self.size), torch.uint8)
        return found

    def group(self, K: int) -> int:
        return self.size

    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        wanted = {name: part for name, part in self.parts(*weight_NK.shape).items() if name != "codes"}
        fitted = {name: torch.empty(p.shape, dtype=p.dtype, device=weight_NK.device) for name, p in wanted.items()}
        for rows in row_chunks(weight_NK):
            groups = weight_NK[rows].float().unflatten(-1, (-1, self.size))
            low, high = groups.amin(-1), groups.amax(-1)
            if self.positive:
                fitted["scales"][rows] = _best(groups, torch.maximum(_divided(high, 7), _divided(low, -8)))
                continue
            if not self.asymmetric:
                # The codes reach one step further down than up, so the larger end goes down: by a negative scale if
                # it is positive. That is a seventh finer than steps that reach both ends.
                fitted["scales"][rows] = _stored(torch.where(high >= -low, high, low) / -8, _MOST)
                continue
            # Zero is always on the grid. Divided first: the difference could overflow.
            low, high = _divided(low.clamp_max(0), 15), _divided(high.clamp_min(0), 15)
            fitted["scales"][rows] = scales = _stored(high - low, _MOST_ASYMMETRIC)
            fitted["zeros"][rows] = (low / scales.float() * -15).round_().clamp_(0, 15).to(torch.uint8)
        return fitted

    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        N, K = weight_NK.shape
        codes = torch.empty(N, K // 2, dtype=torch.uint8, device=weight_NK.device)
        for rows in row_chunks(weight_NK):
            groups = finite(weight_NK[rows]).float().unflatten(-1, (-1, self.size))
            nibbles = (groups / fitted["scales"][rows].float().unsqueeze(-1)).round_()
            nibbles = nibbles.add_(self._zeros(fitted, rows)).clamp_(0, 15).to(torch.uint8)
            codes[rows] = pack_bits(nibbles.flatten(-2), 4)
        return codes

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        N, K = parts["codes"].shape[0], parts["codes"].shape[1] * 2
        out = torch.empty(N, K, dtype=dtype, device=parts["codes"].device)
        for rows in row_chunks(out):
            nibbles = unpack_bits(parts["codes"][rows], 4, K).float().unflatten(-1, (-1, self.size))
            exact = nibbles.sub_(self._zeros(parts, rows)).mul_(parts["scales"][rows].float().unsqueeze(-1))
            out[rows] = exact.flatten(-2)
        return out

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` for scales that are not finite, or zeros that are no nibble."""
        super().check(parts, N, K)
        _check_grid(self, parts, N, K)

    def nearest(self, columns_NM: Tensor, fitted: Parts) -> Tensor:
        scales, zeros = fitted["scales"].float(), fitted["zeros"].float() if self.asymmetric else 8.0
        return ((columns_NM.float() / scales).round_() + zeros).clamp_(0, 15).sub_(zeros).mul_(scales)

    def _zeros(self, parts: Parts, rows: slice) -> Tensor | float:
        return parts["zeros"][rows].float().unsqueeze(-1) if self.asymmetric else 8.0


def _divided(x: Tensor, by: float) -> Tensor:
    """The same bits on every device: CUDA multiplies by the reciprocal of a number that is no tensor there."""
    return x / x.new_tensor(by)


def _stored(scales: Tensor, most: float) -> Tensor:
    """Scales of either sign as bfloat16, of magnitudes that neither divide to infinity nor multiply to it."""
    return torch.copysign(scales.abs().clamp_(SMALLEST, most), scales).to(torch.bfloat16)


def _best(groups: Tensor, widest: Tensor) -> Tensor:
    """Of shares of the `widest` scales `[n, G]`, for groups `[n, G, size]`: those of the least squared error."""
    chosen, least = _stored(widest, _MOST), torch.full_like(widest, torch.inf)
    for share in _SHARES:
        scales = _stored(widest * share, _MOST)
        wide = scales.float().unsqueeze(-1)
        # Overflow is no reason to choose another scale than the widest.
        error = ((groups / wide).round_().clamp_(-8, 7).mul_(wide) - groups).square_().sum(-1)
        better = error < least
        chosen, least = torch.where(better, scales, chosen), torch.where(better, error, least)
    return chosen


def _check_grid(format: GridFormat, parts: Parts, N: int, K: int) -> None:
    """`InputError` for scales and zeros that this library never writes."""
    scales, zeros = parts["scales"], parts.get("zeros")
    if scales.is_meta:
        return
    bad = int((~torch.isfinite(scales)).sum())
    outside = int((zeros > 15).sum()) if zeros is not None else 0
    if bad or outside:
        found = f"{bad} NaN or infinite 'scales'" if bad else f"{outside} 'zeros' beyond 15"
        raise InputError(
            f"{format.name} weights [{N}, {K}] hold {found}, which this library never writes: the file is damaged, "
            "or was made from a model that is"
        )


def _int8(options: tuple[str, ...]) -> Int8:
    if options:
        raise InputError(f"{'-'.join(('int8', *options))!r} is no weight format: int8 takes no options")
    return Int8()


def _int4(options: tuple[str, ...]) -> Int4:
    groups = {f"g{size}": size for size in GROUPS}
    sizes = [groups[option] for option in options if option in groups]
    kinds = [option for option in options if option not in groups]
    if len(sizes) > 1 or kinds not in ([], ["asym"], ["pos"]):
        raise InputError(
            f"{'-'.join(('int4', *options))!r} is no weight format: int4 takes one group size of {', '.join(groups)}, "
            "and asym or pos"
        )
    return Int4(sizes[0] if sizes else GROUPS[0], "asym" in kinds, "pos" in kinds)


register_format("int8", _int8)
register_format("int4", _int4)
