"""A linear layer on stored weights.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.kernels import packed
from specdec.quant.format import Format, Parts

PREFIX = "weight_"  # of the names of stored tensors, in modules and in files


class PackedLinear(nn.Module):
    """`x [..., K]` to `[..., N]` on weights stored as `format` says, each part a buffer `weight_<part>`.

    On the meta device until weights are given, when `parts` is None. Products run on our kernels where those are
    available (CPU: the compiled extension; CUDA: Triton), else in torch, which is slower and gives the same numbers up
    to the order of its sums.

    Lossless: the weights are rounded, once; speculative and plain decoding of the same layer agree to the bit where
    the kernels run.
    """

    def __init__(
        self,
        format: Format,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        parts: Parts | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.format, self.in_features, self.out_features = format, in_features, out_features
        wanted = format.parts(out_features, in_features)
        if parts is not None:
            format.check(parts, out_features, in_features)
        for name, part in wanted.items():
            stored = (
                torch.empty(part.shape, dtype=part.dtype, device=device or "meta") if parts is None else parts[name]
            )
            self.register_buffer(PREFIX + name, stored)
        self.names = tuple(wanted)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, weight_NK: Tensor, bias_N: Tensor | None, format: Format) -> PackedLinear:
        """Of a float weight, rounded now. `InputError` when the format cannot take it."""
        N, K = weight_NK.shape
        return cls(format, K, N, bias_N, format.pack(weight_NK.detach()))

    @property
    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, PREFIX + name) for name in self.names}

    @property
    def num_bytes(self) -> int:
        return self.format.num_bytes(self.out_features, self.in_features)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weights `[N, K]` that this layer multiplies with."""
        return self.format.unpack(self.parts, dtype)

    def rows(self, ids_R: Tensor) -> PackedLinear:
        """A layer of these outputs alone, in this order: every format keeps an output's weights in a row of its own."""
        ids_R = ids_R.to(next(self.buffers()).device)
        bias = None if self.bias is None else self.bias.detach()[ids_R]
        return PackedLinear(
            self.format, self.in_features, len(ids_R), bias, {n: t[ids_R] for n, t in self.parts.items()}
        )

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        """What `to` and its kind do: stored tensors move along, and keep the dtype that their format gives them."""
        before = self.parts
        super()._apply(fn, recurse)
        for name, stored in before.items():
            moved = getattr(self, PREFIX + name)
            if moved.dtype != stored.dtype:
                setattr(self, PREFIX + name, stored.to(moved.device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return packed.linear(x, self.format, self.parts, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, format={self.format.name!r}"


def num_parameters(model: nn.Module) -> int:
    """Weights of a model, those that are stored in fewer bits included."""
    exported: int | None = getattr(model, "exported_parameters", None)
    if exported is not None:  # graphs of a model, which hold its weights where nobody sees them
        return exported
    stored = (module for module in model.modules() if isinstance(module, PackedLinear))
    return sum(p.numel() for p in model.parameters()) + sum(m.in_features * m.out_features for m in stored)


def num_weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model, however they are stored."""
    stored = (module for module in model.modules() if isinstance(module, PackedLinear))
    return sum(p.nbytes for p in model.parameters()) + sum(module.num_bytes for module in stored)


def stored_as(model: nn.Module) -> str | None:
    """Formats of a model's packed layers, that of the most weights first: "int4, mxint8". None when it has none."""
    weights: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear):
            name = module.format.name
            weights[name] = weights.get(name, 0) + module.in_features * module.out_features
    return ", ".join(sorted(weights, key=lambda name: -weights[name])) or None


def named_packed(module: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by name; `InputError` when it has none."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, PackedLinear)}
    if not found:
        raise InputError(f"{type(module).__name__} has no layers with stored weights; load it with quantize=...")
    return found
