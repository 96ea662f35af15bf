"""delta-CSC: pruned weights on disk, column by column, by the distances between those that are left.

Of x @ W, W `[K, N]`, a column is what makes one output: row n of the weight `[N, K]` as modules keep it. Columns follow
one another. For each stored value the stream of gaps has `gap` bits: how many zeros were skipped before it. A gap holds
at most 2^gap - 1, so after as many skipped zeros a zero is stored among the values, a dummy, and counting begins again.
Zeros behind the last value of a column are implied. A column's count is that of its values and dummies.

| tensor | content |
|---|---|
| `values` | bfloat16, float16 or int8 `[E]`; codes of 4 to 8 bits as one bit string, uint8 `[ceil(E * bits / 8)]` |
| `gaps` | one bit string, uint8 `[ceil(E * gap / 8)]`; gap i in bits `[gap * i, gap * i + gap)`, low bits first |
| `counts` | `[N]`: uint16 where K < 65536 (a count is at most K), else int32 |
| `scales` | of formats that have them, as the format stores them, for every weight |

It is for storage: weights run as what `expand` gives. Negative zeros come back as zeros, all else bit by bit.
(Described by Cerebras and Qualcomm for sparse models on Cloud AI 100.)

Shape suffixes: N outputs, K inputs, E stored values, dummies among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.dtypes import dtype_name
from specdec.errors import InputError
from specdec.quant.bits import pack_bits, unpack_bits
from specdec.quant.delta_streams import (
    DEFAULT_GAP,
    GAPS,
    check_gap,
    check_streams,
    checked_counts,
    count_dtype,
    decode,
    encode,
    pack_codes,
    unpack_codes,
)
from specdec.quant.format import Format, Part, Parts
from specdec.quant.integer import Int8
from specdec.quant.mx import MXFormat
from specdec.quant.sparse import Sparse


class Half(Format):
    """Weights as they are in 16 bits, part `weight`: for storing a pruned model as delta-CSC, not for running it.

    `dtype`: float16 or bfloat16. Lossless: yes, when the weights are of this dtype already.
    """

    def __init__(self, dtype: torch.dtype):
        if dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"16-bit weights are float16 or bfloat16, not {dtype}; convert them first")
        self.dtype = dtype

    @property
    def name(self) -> str:
        return dtype_name(self.dtype)

    def parts(self, N: int, K: int) -> dict[str, Part]:
        return {"weight": Part((N, K), self.dtype)}

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        parts = {"weight": weight_NK.detach().to(self.dtype)}
        self.check(parts, *weight_NK.shape)
        return parts

    def check(self, parts: Parts, N: int, K: int) -> None:
        """As the base class; and `InputError` for numbers that are not finite in this dtype."""
        super().check(parts, N, K)
        if not torch.isfinite(parts["weight"]).all():
            raise InputError(f"'weight' of {self.name} weights [{N}, {K}] has NaN, infinite or too large numbers")

    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        return parts["weight"].to(dtype)


@dataclass(frozen=True)
class Values:
    """How a format's values stand in the stream."""

    bits: int
    dtype: torch.dtype  # of a value before it is packed
    packed: bool = False  # into a bit string
    negative_zero: int | None = None  # a code


def values_of(format: Format) -> Values:
    """`InputError` for a format whose zeros have no code of their own."""
    if isinstance(format, Half):
        return Values(16, format.dtype)
    if isinstance(format, Sparse):
        return Values(16, torch.bfloat16)
    if isinstance(format, Int8):
        return Values(8, torch.int8)
    if isinstance(format, MXFormat):
        element = format.element
        return Values(element.bits, torch.uint8, True, None if element.integer else 1 << (element.bits - 1))
    raise InputError(
        f"delta-CSC stores float16, bfloat16, sparse, int8 and mx weights, not {format.name}; store that as it is"
    )


def tensors_of(format: Format, N: int, K: int) -> dict[str, torch.dtype]:
    """The names of the tensors that store a weight `[N, K]`, with their dtypes; lengths depend on the weight."""
    scales = {name: part.dtype for name, part in format.parts(N, K).items() if name == "scales"}
    return {"values": values_of(format).dtype, "gaps": torch.uint8, "counts": count_dtype(K), **scales}


def compress(format: Format, parts: Parts, N: int, K: int, gap: int = DEFAULT_GAP) -> dict[str, Tensor]:
    """What delta-CSC stores of the parts of a weight `[N, K]`, on the CPU. `InputError` for parts that do not fit."""
    values = values_of(format)
    check_gap(gap)
    format.check(parts, N, K)
    stored = encode(dense(format, parts), gap)
    if values.packed:
        stored["values"] = pack_codes(stored["values"].numpy(), values.bits)
    if "scales" in parts:
        stored["scales"] = parts["scales"].cpu()
    return stored


def expand(
    format: Format, tensors: Parts, N: int, K: int, gap: int = DEFAULT_GAP, name: str = "a weight"
) -> dict[str, Tensor]:
    """The format's parts again, on the CPU: the bits that `format.pack` made, but for negative zeros.

    All is checked, `tensors` being from a file: `InputError` that names `name` and the tensor for streams that are
    cut or too long, lead out of a column, or hold what the format does not.
    """
    where, tensors = _checked(format, tensors, N, K, name)
    found = _parts(format, decode(tensors, N, K, gap, where), where)
    if "scales" in tensors:
        found["scales"] = tensors["scales"]
    try:
        format.check(found, N, K)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    return found


def check(format: Format, tensors: Parts, N: int, K: int, gap: int = DEFAULT_GAP, name: str = "a weight") -> None:
    """What `expand` checks of the streams, without making the weight. Raises as it does."""
    where, tensors = _checked(format, tensors, N, K, name)
    check_streams(tensors, N, K, gap, where)


def _checked(format: Format, tensors: Parts, N: int, K: int, name: str) -> tuple[str, dict[str, Tensor]]:
    """How errors call the weight; and the tensors on the CPU, of the right dtypes, codes unpacked."""
    where, values = f"of {name} [{N}, {K}] as {format.name} in delta-CSC", values_of(format)
    for part, dtype in tensors_of(format, N, K).items():
        if part not in tensors:
            raise InputError(f"'{part}' {where} is missing")
        if tensors[part].dtype != dtype:
            raise InputError(f"'{part}' {where} is {dtype}; found {tensors[part].dtype}")
    found = {part: tensor.cpu() for part, tensor in tensors.items()}
    if values.packed:
        num_stored = int(checked_counts(found["counts"], N, K, where).sum())
        codes = unpack_codes(found["values"], values.bits, num_stored, f"'values' {where}")
        found["values"] = torch.from_numpy(codes)
    return where, found


def dense(format: Format, parts: Parts) -> Tensor:
    """The values `[N, K]` on the CPU, zeros among them; negative zeros made zero where they are codes."""
    if isinstance(format, Half):
        return parts["weight"].cpu()
    if isinstance(format, Sparse):
        return format.unpack(parts, torch.bfloat16).cpu()
    if not isinstance(format, MXFormat):
        return parts["codes"].cpu()
    values, codes = values_of(format), parts["codes"].cpu()
    codes_NK = unpack_bits(codes, values.bits, codes.shape[1] * 8 // values.bits)
    return codes_NK if values.negative_zero is None else codes_NK.masked_fill(codes_NK == values.negative_zero, 0)


def _parts(format: Format, dense_NK: Tensor, where: str) -> dict[str, Tensor]:
    """The other way."""
    if isinstance(format, Half):
        return {"weight": dense_NK}
    if isinstance(format, MXFormat):
        return {"codes": pack_bits(dense_NK, format.element.bits)}
    if not isinstance(format, Sparse):
        return {"codes": dense_NK}
    parts = format.pack(dense_NK)
    if not torch.equal(format.unpack(parts, dense_NK.dtype), dense_NK):
        raise InputError(f"'values' {where} are more than the format keeps of some row; the file is damaged")
    return parts


# ---------------------------------------------------------------- sizes


def expected_bits(
    sparsity: float, value_bits: float = 16, gap: int = DEFAULT_GAP, K: int = 4096, scale_bits: float = 0.0
) -> float:
    """Expected bits for each weight of columns of K weights, each zero with probability `sparsity` by itself.

    Density (1 + e) (value_bits + gap) + count bits / K + scale_bits. Of dummies there are e for each value: one for
    every 2^gap zeros in a row that a value follows. In long columns that is q / (1 - q), q = sparsity^(2^gap); here
    the end of the column is counted exactly. `scale_bits`: those of scales, for each weight.
    """
    check_gap(gap)
    if not 0 <= sparsity <= 1 or K < 1:
        raise InputError(f"a sparsity is a number from 0 to 1, of columns of at least 1; found {sparsity} of {K}")
    width = 1 << gap
    dummies = sum(sparsity**run * (K - run) / K for run in range(width, K, width))
    count_bits = 8 * count_dtype(K).itemsize
    return (1 - sparsity) * (1 + dummies) * (value_bits + gap) + count_bits / K + scale_bits


def expected_bytes(format: Format, sparsity: float, N: int, K: int, gap: int = DEFAULT_GAP) -> float:
    """Of a weight `[N, K]` whose zeros are anywhere, scales included."""
    scale_bytes = sum(part.num_bytes for name, part in format.parts(N, K).items() if name == "scales")
    return N * K * expected_bits(sparsity, values_of(format).bits, gap, K) / 8 + scale_bytes


def best_gap(sparsity: float, value_bits: float = 16, K: int = 4096) -> int:
    """The width of gaps that makes such a matrix smallest: the more zeros, the wider."""
    return min(GAPS, key=lambda gap: expected_bits(sparsity, value_bits, gap, K))


def bitmask_bits(sparsity: float, value_bits: float = 16) -> float:
    """Bits for each weight of what a sparse format runs on: a bit each, and the values that are left."""
    return 1 + (1 - sparsity) * value_bits


def smaller_storage(sparsity: float, value_bits: float = 16, K: int = 4096) -> str:
    """ "bitmask" or "delta-csc", whichever needs fewer bits; of 16-bit values delta-CSC does from 78 % of zeros on."""
    least = expected_bits(sparsity, value_bits, best_gap(sparsity, value_bits, K), K)
    return "bitmask" if bitmask_bits(sparsity, value_bits) <= least else "delta-csc"
