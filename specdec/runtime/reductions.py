"""Sums inside a model's own layers, computed row by row.

Stock sums on a GPU cut a row into pieces by the number of rows beside it, so that a norm changes a row's last bits.
Where a model's step runs under `RowSums`, the sums and means of its norms go through a kernel of ours instead; products
and sums that are not known are left as they are, and noted. Under a captured graph that costs nothing: the graph holds
what ran.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Products, and sums that nobody has replaced: their last bits may follow the number of rows.
_STOCK = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm, aten.convolution, aten.var, aten.var_mean,
    aten.mean, aten.sum, aten.prod, aten.cumsum, aten.linalg_vector_norm, aten.native_group_norm, aten.logsumexp,
    aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}  # fmt: skip


def _is_last(x: Tensor, dims: Any) -> bool:
    return x.is_floating_point() and dims is not None and [d % x.ndim for d in dims] == [x.ndim - 1]


class RowSums(TorchDispatchMode):
    """Within it, means and sums over the last axis and layer norms come from `row_sum`, rows each on their own.

    `stock` collects the names of products and sums that ran as they are.
    """

    def __init__(self, row_sum: Callable[[Tensor], Tensor]):
        super().__init__()
        self._row_sum = row_sum
        self.stock: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func in (aten.mean.dim, aten.sum.dim_IntList) and _is_last(args[0], args[1]):
            return self._sum(packet is aten.mean, *args, **kwargs)
        if func is aten.native_layer_norm.default and len(args[1]) == 1:
            return self._layer_norm(*args)
        if func is aten._fused_rms_norm.default and len(args[1]) == 1:
            return self._rms_norm(*args)
        if func is aten.bmm.default and args[0].shape[-1] == 1:  # outer products, as in rotary positions: no sum
            return args[0] * args[1]
        if packet in _STOCK and not (args[0].numel() == 0 or args[0].dtype in (torch.bool, torch.int64)):
            self.stock.add(packet.__name__.removeprefix("_"))
        return func(*args, **kwargs)

    def _sum(self, is_mean: bool, x: Tensor, dims: Any, keep: bool = False, *, dtype: Any = None) -> Tensor:
        x = x.to(dtype) if dtype is not None else x
        out = self._row_sum(x)
        out = out / x.shape[-1] if is_mean else out
        return out[..., None] if keep else out

    def _layer_norm(self, x: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        mean = self._sum(True, wide, (-1,), True)
        apart = wide - mean
        scale = torch.rsqrt(self._sum(True, apart * apart, (-1,), True) + eps)
        out = apart * scale
        out = out if weight is None else out * weight
        out = out if bias is None else out + bias
        return out.to(x.dtype), mean, scale

    def _rms_norm(self, x: Tensor, shape: Any, weight: Any, eps: float | None) -> tuple[Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(
            self._sum(True, wide * wide, (-1,), True) + (torch.finfo(x.dtype).eps if eps is None else eps)
        )
        out = wide * scale
        return (out if weight is None else out * weight).to(x.dtype), scale
