"""Pruned weights: a bit for each weight, and the numbers of those that are left.

Shape suffixes: N outputs, K inputs, S stored weights of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import row_chunks
from specdec.quant.format import Format, Part, Parts, finite, register_format

DEFAULT_PERCENT = 80
PERCENTS = range(10, 96)
PAIRS = "2x4"  # two of each four consecutive inputs
_WORD = 32  # inputs to a word of the mask, so that kernels read whole ones


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Where the `count` largest of each row `[..., K]` are, as bool `[..., K]`; of equal scores the first are kept.

    Scores are real numbers without NaN, `1 <= count <= K`.
    """
    scores = scores if scores.dtype.itemsize >= 4 else scores.float()
    least = scores.kthvalue(scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
    kept, ties = scores > least, scores == least
    room = count - kept.sum(-1, keepdim=True)
    return kept.logical_or_(ties.logical_and_(ties.cumsum(-1, dtype=torch.int32) <= room))


def pack_mask(mask_NK: Tensor) -> Tensor:
    """bool `[N, K]` as bytes `[N, K / 8]`: weight i is bit i of the row's bytes, low bits first. K % 8 == 0."""
    bits = mask_NK.to(torch.uint8).unflatten(-1, (-1, 8))
    placed: Tensor = bits << torch.arange(8, dtype=torch.uint8, device=bits.device)
    return placed.sum(-1, dtype=torch.uint8)


def unpack_mask(bytes_NK8: Tensor) -> Tensor:
    """The bool `[N, 8 * bytes]` that `pack_mask` packed."""
    bits = bytes_NK8.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=bytes_NK8.device)
    return (bits & 1).flatten(-2).bool()


class Sparse(Format):
    """The largest weights of each row in bfloat16, the others zero: parts `mask` (a bit string) and `values`.

    `percent` of a row's K weights are dropped, rounded down; or two of each four (`percent` None). Every row stores as
    many. A weight with more zeros than that stores some of its zeros, the first ones. Weights that were pruned before
    (`specdec.quant.pruning`) keep what pruning left, since nothing that is dropped is larger. Values are compared
    before they are rounded. Lossless: no, weights are dropped and rounded.
    """

    def __init__(self, percent: int | None = DEFAULT_PERCENT):
        self.percent = percent

    @property
    def name(self) -> str:
        if self.percent is None:
            return f"sparse-{PAIRS}"
        return "sparse" + (f"-{self.percent}" if self.percent != DEFAULT_PERCENT else "")

    def stored(self, K: int) -> int:
        """Weights stored of a row."""
        return K // 2 if self.percent is None else K - K * self.percent // 100

    def parts(self, N: int, K: int) -> dict[str, Part]:
        if K % _WORD or K == 0:
            raise InputError(
                f"{self.name} stores masks of {_WORD} inputs; a weight [{N}, {K}] has {K}. "
                "Keep this module in its dtype, or quantise it as int8"
            )
        return {"mask": Part((N, K // 8), torch.uint8), "values": Part((N, self.stored(K)), torch.bfloat16)}

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        weight_NK, wanted = weight_NK.detach(), self.parts(*weight_NK.shape)
        made = {name: torch.empty(p.shape, dtype=p.dtype, device=weight_NK.device) for name, p in wanted.items()}
        for rows in row_chunks(weight_NK):
            weight = finite(weight_NK[rows])
            # Plus zero makes a negative zero positive, so that there is one way of storing a zero.
            values = weight.to(torch.bfloat16) + 0
            if not torch.isfinite(values).all():
                raise InputError(
                    f"a weight of magnitude {float(weight.abs().max()):.3g} is too large for bfloat16, in which "
                    f"{self.name} stores values; keep this module in its dtype"
                )
            kept = self._kept(weight.abs().masked_fill(values == 0, 0))
            made["mask"][rows] = pack_mask(kept)
            made["values"][rows] = values[kept].view(len(weight), -1)
        return made

    def _kept(self, magnitude_NK: Tensor) -> Tensor:
        if self.percent is None:
            return keep_largest(magnitude_NK.unflatten(-1, (-1, 4)), 2).flatten(-2)
        return keep_largest(magnitude_NK, self.stored(magnitude_NK.shape[-1]))

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        mask, values = parts["mask"], parts["values"].to(dtype)
        out = torch.zeros(mask.shape[0], mask.shape[1] * 8, dtype=dtype, device=mask.device)
        for rows in row_chunks(out):
            out[rows].masked_scatter_(unpack_mask(mask[rows]), values[rows])
        return out

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` when a mask marks other than as many weights as are stored, or a stored
        value is NaN or infinite.
        """
        super().check(parts, N, K)
        mask, values = parts["mask"], parts["values"]
        if mask.is_meta:
            return
        where = f"of {self.name} weights [{N}, {K}]"
        for rows in row_chunks(values):
            marked = unpack_mask(mask[rows])
            counts = marked.sum(-1) if self.percent is not None else marked.unflatten(-1, (-1, 4)).sum(-1).flatten()
            expected = self.stored(K) if self.percent is not None else 2
            if bool((counts != expected).any()):
                wrong = int(counts[counts != expected][0])
                group = "a row" if self.percent is not None else "a group of four"
                raise InputError(
                    f"'mask' {where} marks {wrong} weights in {group} where {expected} are stored; the file is damaged"
                )
            if not torch.isfinite(values[rows]).all():
                raise InputError(f"'values' {where} hold NaN or infinite numbers; the file is damaged")


def _make(options: tuple[str, ...]) -> Sparse:
    if not options:
        return Sparse()
    if options == (PAIRS,):
        return Sparse(None)
    if len(options) == 1 and options[0].isascii() and options[0].isdigit() and int(options[0]) in PERCENTS:
        return Sparse(int(options[0]))
    raise InputError(
        f"{'-'.join(('sparse', *options))!r} is no weight format: sparse takes the percentage of weights to drop, "
        f"{PERCENTS[0]} to {PERCENTS[-1]}, or {PAIRS}"
    )


register_format("sparse", _make)
