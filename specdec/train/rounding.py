"""Linear layers that are trained while rounded: forward with the weights as they will be stored, backward as if not.

The gradient passes the rounding as if that were the identity (straight-through estimate: Bengio et al., arXiv
1308.3432), so float32 weights gather small changes until one tips a weight over to the next point of its grid.

Shape suffixes: M rows of activations, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.kernels.packed import rounded_rows
from specdec.loading import stored_dtype
from specdec.quant.format import Format
from specdec.quant.hf import QuantConfig
from specdec.quant.layers import candidates, weight_of
from specdec.quant.linear import PackedLinear
from specdec.quant.recipe import Recipe
from specdec.quant.sparse import Sparse, unpack_mask
from specdec.runtime.copies import with_layers


class _Rounded(torch.autograd.Function):
    """Of a weight `[N, K]`; with a mask, dropped weights are zero and get no gradient."""

    @staticmethod
    def forward(ctx: Any, weight_NK: Tensor, format: Format, mask_NK: Tensor | None) -> Tensor:
        ctx.mask_NK = mask_NK
        return rounded(weight_NK, format, mask_NK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0]
        return gradient if ctx.mask_NK is None else gradient * ctx.mask_NK, None, None


class _RoundedRows(torch.autograd.Function):
    """Of activations `[..., K]`, each row to int8 by a scale of its own, as the product of int8 weights does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        codes_MK, scales_M1 = rounded_rows(x.reshape(-1, x.shape[-1]))
        return (codes_MK.float() * scales_M1).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def rounded(weight_NK: Tensor, format: Format, mask_NK: Tensor | None = None) -> Tensor:
    """`unpack(pack(weight))` in float32 `[N, K]`; of a sparse format with the weights left that `mask_NK` (bool) marks.

    `InputError` for weights that the format cannot store.
    """
    if mask_NK is None:
        return format.unpack(format.pack(weight_NK))
    # What is left is known: to search the largest of each row again would take longer than the product.
    values_NK = torch.where(mask_NK, weight_NK.to(torch.bfloat16).float(), 0.0)
    if not torch.isfinite(values_NK).all():
        raise InputError(f"weights are NaN, infinite or too large for the bfloat16 in which {format.name} stores them")
    return values_NK


class RoundedLinear(nn.Module):
    """`x [..., K]` to `[..., N]` with the weights that `format` would store of a float32 weight, which is trained.

    `bias_N` stays as it is, and is no part of the state. Sparse formats have a `mask` (bool `[N, K]`): at first what
    the format itself would keep, then what `prune` says, and no step brings the others back. `stage` counts prunings.
    """

    bias: Tensor | None
    mask: Tensor | None
    stage: Tensor

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, format: Format):
        super().__init__()
        self.format = format
        self.weight = nn.Parameter(weight_NK.detach().to(torch.float32, copy=True).contiguous())
        self.register_buffer("bias", None if bias_N is None else bias_N.detach(), persistent=False)
        parts = format.pack(self.weight.detach())  # for dense formats, only to see that it can be stored
        self.register_buffer("mask", unpack_mask(parts["mask"]) if isinstance(format, Sparse) else None)
        if isinstance(format, Sparse):
            self.register_buffer("stage", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        weight_NK = _Rounded.apply(self.weight, self.format, self.mask)  # type: ignore[no-untyped-call]
        if self.format.rounds_rows:
            x = _RoundedRows.apply(x)  # type: ignore[no-untyped-call]
        return F.linear(x, weight_NK.to(x.dtype), self.bias)

    @torch.no_grad()
    def prune(self, mask_NK: Tensor, stage: int) -> None:
        assert self.mask is not None
        self.mask.copy_(mask_NK)
        self.weight.mul_(self.mask)
        self.stage.fill_(stage)

    @torch.no_grad()
    def masters(self) -> Tensor:
        """The float32 weight, without what was pruned: a step's momentum may have moved that."""
        return self.weight.detach() if self.mask is None else self.weight * self.mask

    def packed(self) -> dict[str, Tensor]:
        """What the format stores: it unpacks to the very weights of this layer's products."""
        return self.format.pack(self.masters())


def rounded_layers(model: Any, formats: Mapping[str, Format]) -> dict[str, RoundedLinear]:
    """Of the named linear layers of a model. `InputError` that names the layer whose weights cannot be stored."""
    found = {}
    for name, format in formats.items():
        module = model.get_submodule(name)
        try:
            found[name] = RoundedLinear(weight_of(module), module.bias, format)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
    return found


@torch.no_grad()
def packed_model(target: Any, layers: Mapping[str, RoundedLinear], recipe: Recipe) -> Any:
    """The target with those layers stored as they are rounded, and all else as it is; ready for `save_pretrained`.

    What is not quantised is in the dtype of the target's own file, where that holds it exactly.
    """
    stored = {}
    for name, layer in layers.items():
        N, K = layer.weight.shape
        stored[name] = PackedLinear(layer.format, K, N, layer.bias, layer.packed())
    model = with_layers(target, lambda name, _: stored.get(name), frozen=True)
    own = _file_dtype(target)
    parameters = list(model.parameters())
    if all(torch.equal(parameter.to(own).to(parameter.dtype), parameter) for parameter in parameters):
        for parameter in parameters:
            parameter.data = parameter.data.to(own)
    found = candidates(target)
    if found.tied and found.head in layers:  # it has weights of its own now
        model.all_tied_weights_keys.pop(f"{found.head}.weight", None)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    model.config.quantization_config = QuantConfig(recipe).to_dict()
    return model


def _file_dtype(target: Any) -> torch.dtype:
    """What a folder's configuration says, and else the dtype that the target runs in."""
    folder = Path(str(getattr(target, "name_or_path", "")))
    found: torch.dtype = stored_dtype(folder) if (folder / "config.json").is_file() else target.dtype
    return found
