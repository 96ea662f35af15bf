"""Products with stored weights on GPUs, in Triton: codes go from memory to registers as they are stored.

One order of sums for each weight shape, whatever the number of rows: K is walked in tiles by one program, or, for
weights with few outputs, in four strips side by side that are added at the end, always in the same order. Tensor cores
take all rows, one as well as many, since a second kernel for single rows would sum in another order.

Shape suffixes: M rows, K inputs, N outputs, S strips of K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.dtypes import dtype_name
from specdec.errors import InputError
from specdec.kernels import tuning
from specdec.kernels.packed import SMALLEST, reference
from specdec.kernels.triton_ops import INTERPRETED
from specdec.kernels.triton_products import int8, product, round_rows, sparse
from specdec.kernels.tuning import Schedule
from specdec.quant.format import Format, Parts

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STRIPS = 4
# Below so many outputs there are fewer warps, at eight outputs each, than a large GPU needs to decode at full speed.
_FEW_OUTPUTS = 8192
_STRIPS_FROM = 1024  # inputs: shorter sums are not worth a second addition


@dataclass(frozen=True)
class Code:
    """How a format's codes are read: see `specdec.kernels.triton_decode.decoded`."""

    kind: str
    bits: int
    mantissa: int = 0
    fix: float = 1.0

    @property
    def unit(self) -> int:
        """Codes that fill whole words of 32 bits."""
        return 16 if self.bits == 6 else 32 // self.bits


#: Of families of formats: the part of a name before the first "-".
CODES = {
    "mxfp8_e4m3": Code("float", 8, 3, 2.0**120),
    "mxfp8_e5m2": Code("float", 8, 2, 2.0**112),
    "mxfp6_e2m3": Code("float", 6, 3, 2.0**126),
    "mxfp6_e3m2": Code("float", 6, 2, 2.0**124),
    "mxfp4": Code("float", 4, 1, 2.0**126),
    "mxint8": Code("integer", 8, 0, 1 / 64),
    "int4": Code("int4", 4),
}


@lru_cache(maxsize=256)
def family(format: Format) -> str | None:
    """The family of formats whose kernel multiplies with this one's weights; None where there is no kernel."""
    name = format.name.split("-")[0]
    known = name == "int8" if format.rounds_rows else name in CODES or name == "sparse"
    return name if known else None


def strips(N: int, K: int, dtype: torch.dtype) -> int:
    """Strips of K that are summed side by side: part of the order of sums, and so from shape and dtype alone."""
    return STRIPS if N < _FEW_OUTPUTS and K >= _STRIPS_FROM and dtype.itemsize == 2 else 1


def depth(code: Code, num_strips: int, dtype: torch.dtype) -> int:
    """Inputs of one tile of a strip: part of the order of sums too."""
    return 256 if num_strips == 1 and dtype.itemsize == 2 and code.bits < 8 else 128


def fixed(code: Code, parts: Parts, N: int, K: int, dtype: torch.dtype) -> dict[str, Any]:
    """What of a product's kernel follows from the weight and the dtype alone, as the kernel's constants."""
    num_strips = strips(N, K, dtype)
    BK = depth(code, num_strips, dtype)
    exact = tl.float64 if dtype == torch.float64 else tl.float32
    # Two bfloat16 are multiplied at once, exactly for MX and rounded once for int4, as float32 would be.
    carry = tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
    return {
        "KIND": code.kind, "BITS": code.bits, "MANTISSA": code.mantissa, "FIX": code.fix, "UNIT": code.unit,
        "GROUP": K // parts["scales"].shape[1], "ZEROS": "zeros" in parts, "EVEN": K % (num_strips * BK) == 0,
        "WIDE": INTERPRETED, "CARRY": carry, "ACC": exact, "S": num_strips, "BK": BK,
    }  # fmt: skip


def _grid(M: int, N: int, plan: Schedule) -> tuple[int, int]:
    # Row tiles vary fastest: those that read the same weights run side by side, and the cache serves all but one.
    return triton.cdiv(M, plan.rows), triton.cdiv(N, plan.outputs)


def _tiles(plan: Schedule) -> dict[str, Any]:
    # A product and a sum are fused where a kernel says so (`tl.dot`) and nowhere else, in every version of Triton.
    tile = {"BM": plan.rows, "BN": plan.outputs}
    return {**tile, "num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": False}


def _words(codes: Tensor) -> Tensor:
    """Stored bytes as words of 32 bits; a copy only where a view of a file begins within a word."""
    codes = codes.contiguous()
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)


def _coded(code: Code, rows: Tensor, parts: Parts, bias: Tensor | None, out: Tensor, plan: Schedule) -> None:
    M, K = rows.shape
    N = out.shape[1]
    codes, scales = _words(parts["codes"]), parts["scales"].contiguous()
    zeros = parts["zeros"].contiguous() if "zeros" in parts else scales
    product[_grid(M, N, plan)](
        rows, codes, scales, zeros, scales if bias is None else bias, out, M, N, K,
        BIAS=bias is not None, **fixed(code, parts, N, K, rows.dtype), **_tiles(plan),
    )  # fmt: skip


def _sparse(rows: Tensor, parts: Parts, bias: Tensor | None, out: Tensor, plan: Schedule) -> None:
    M, K = rows.shape
    N = out.shape[1]
    mask, values = _words(parts["mask"]), parts["values"].contiguous()
    sparse[_grid(M, N, plan)](
        rows, mask, values, values if bias is None else bias, out, M, N, K, values.shape[1],
        BIAS=bias is not None, WIDE=INTERPRETED, ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        BK=128 if rows.dtype.itemsize > 2 else 512, **_tiles(plan),
    )  # fmt: skip


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes `[M, K]` and float32 scales `[M]`, as `specdec.kernels.packed.rounded_rows` makes them."""
    M, K = rows.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=rows.device)
    scales = torch.empty(M, dtype=torch.float32, device=rows.device)
    block = min(2048, triton.next_power_of_2(K))
    round_rows[(M,)](rows, codes, scales, K, SMALLEST=SMALLEST, BLOCK=block, num_warps=4, enable_fp_fusion=False)
    return codes, scales


def _int8(rows: Tensor, parts: Parts, bias: Tensor | None, out: Tensor, plan: Schedule) -> None:
    M, K = rows.shape
    N = out.shape[1]
    codes, scales = parts["codes"].contiguous(), parts["scales"].contiguous()
    row_codes, row_scales = _rounded(rows)
    int8[_grid(M, N, plan)](
        row_codes, row_scales, codes, scales, scales if bias is None else bias, out, M, N, K,
        BIAS=bias is not None, WIDE=INTERPRETED, BK=256, **_tiles(plan),
    )  # fmt: skip


def _kernel(name: str) -> Callable[[Tensor, Parts, Tensor | None, Tensor, Schedule], None]:
    return _int8 if name == "int8" else _sparse if name == "sparse" else partial(_coded, CODES[name])


def _sizes(format: Format, parts: Parts, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """N, K, strips, and bytes of what is multiplied."""
    stored = parts["mask"] if "mask" in parts else parts["codes"]
    name = family(format)
    bits = 1 if name == "sparse" else 8 if name is None or name == "int8" else CODES[name].bits
    N, K = stored.shape[0], stored.shape[1] * 8 // bits
    return N, K, strips(N, K, dtype) if name in CODES else 1, 1 if name == "int8" else dtype.itemsize


def _check(x: Tensor, format: Format, parts: Parts, bias: Tensor | None, K: int) -> None:
    if x.shape[-1] != K or x.dtype not in DTYPES:
        raise InputError(
            f"{format.name} weights with {K} inputs multiply float16, bfloat16, float32 or float64 rows of that size; "
            f"found {dtype_name(x.dtype)} {list(x.shape)}"
        )
    tensors: Mapping[str, Tensor] = {**parts, **({} if bias is None else {"bias": bias})}
    for name, tensor in tensors.items():
        if tensor.device != x.device:
            raise InputError(f"'{name}' of {format.name} weights is on {tensor.device}, and the rows are on {x.device}")


def linear(x: Tensor, format: Format, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """`x [..., K]` times the stored weight `[N, K]` transposed, plus `bias [N]`: `[..., N]` in the dtype of `x`.

    float16, bfloat16, float32 or float64, accumulated in float32 (float64) and rounded once, on one CUDA device. Equals
    rows times `format.unpack(parts, x.dtype)` up to the order of sums; int8 equals `packed.int8_reference` to the bit.
    A row's bits do not depend on the number of rows. Formats without a kernel are unpacked for each call. Nothing is
    read back to the host, and all memory comes from torch, so calls can be captured in a CUDA graph.

    `InputError` when sizes, dtypes or devices do not fit.

    Lossless: yes, for the weight that is stored.
    """
    name = family(format)
    if name is None:
        return reference(x, format, parts, bias)
    N, K, num_strips, itemsize = _sizes(format, parts, x.dtype)
    _check(x, format, parts, bias, K)
    rows = x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M:
        what = f"{format.name} {dtype_name(x.dtype)}"
        with torch.cuda.device_of(x):
            plan = tuning.schedule(what, N, K, M > tuning.NARROW, num_strips, itemsize, x.device)
            _kernel(name)(rows, parts, bias, out, plan)
    return out.view(*x.shape[:-1], N)


def tune(
    format: Format,
    N: int,
    K: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    num_rows: tuple[int, ...] = (1, 64),
    seconds: Callable[[list[Callable[[], object]]], float] = tuning.graph_seconds,
) -> dict[int, Schedule]:
    """Measures schedules of products with weights `[N, K]` on this device, and keeps the fastest in the user's cache.

    `num_rows`: up to 16 rows share one schedule, more rows another. Takes some seconds per schedule, most of them to
    compile it; a schedule that changes a bit of the result is never taken. `InputError` for formats without a kernel.
    """
    name = family(format)
    if name is None:
        raise InputError(f"{format.name} has no kernel to tune: its weights are unpacked for each product")
    device = torch.device(device)
    noise = torch.Generator(device).manual_seed(0)
    parts = format.pack(torch.randn(N, K, device=device, generator=noise) / K**0.5)
    copies = max(1, min(64, -(-_cold_bytes(device) // format.num_bytes(N, K))))
    weights = [parts, *({part: t.clone() for part, t in parts.items()} for _ in range(copies - 1))]
    kernel, found = _kernel(name), {}
    _, _, num_strips, itemsize = _sizes(format, parts, dtype)
    for M in num_rows:
        rows = torch.randn(M, K, device=device, generator=noise).to(dtype)
        # Bits are compared over several tiles of rows, whatever their number in use.
        many = torch.randn(64, K, device=device, generator=noise).to(dtype)

        def run(plan: Schedule, rows: Tensor, parts: Parts) -> Tensor:
            out = torch.empty(rows.shape[0], N, dtype=dtype, device=device)
            kernel(rows, parts, None, out, plan)
            return out

        def timed(plan: Schedule, rows: Tensor = rows) -> float:
            return seconds([partial(run, plan, rows, weight) for weight in weights])

        wide = M > tuning.NARROW
        options = tuning.candidates(N, wide, num_strips, itemsize)
        key = tuning.key(f"{format.name} {dtype_name(dtype)}", N, K, wide)
        with torch.cuda.device_of(rows):
            found[M] = tuning.fastest(key, options, partial(run, rows=many, parts=parts), timed, device)
    return found


def _cold_bytes(device: torch.device) -> int:
    """More than the cache of the device holds."""
    return 2 * torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
