"""A model with quantised weights, for drafts: a copy of a loaded one that shares all but its products.

Shape suffixes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.runtime.native import is_spread, with_products
from specdec.runtime.shared import DerivedModel

# Up to so many rows a product of one row each is faster than one that packs the weights anew for all.
_ROWS_ALONE = 4


class Scheme(ABC):
    """How a draft's weights are stored and multiplied."""

    @abstractmethod
    def obstacle(self, device: torch.device) -> str | None:
        """Why its products do not run on this device, in one line; None when they do."""

    @abstractmethod
    def product(self, weight_NK: Tensor, bias_N: Tensor | None) -> nn.Module:
        """What stands in for a linear layer: `[..., K]` to `[..., N]`, in the dtype of its input."""


def int8_product(rows_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """`rows [M, K]` times the transpose of `weight [N, K]`, both int8: int32 `[M, N]`, exact."""
    weight_KN = weight_NK.t()
    if torch.compiler.is_compiling() or not 1 < len(rows_MK) <= _ROWS_ALONE:
        return torch._int_mm(rows_MK, weight_KN)
    return torch.cat([torch._int_mm(row[None], weight_KN) for row in rows_MK])


class Int8Linear(nn.Module):
    """int8 weights with one scale per output; activations are rounded to int8 with one scale per row."""

    weight: Tensor  # int8 [N, K]
    scale_N: Tensor  # float32

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None):
        super().__init__()
        scale = (weight_NK.detach().abs().amax(1).float() / 127).clamp_min(1e-12)
        rounded = (weight_NK.detach().float() / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", rounded)
        self.register_buffer("scale_N", scale)
        self.bias = bias_N

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale_M1 = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        product = int8_product((rows / scale_M1).round().to(torch.int8), self.weight)
        out = (product * scale_M1 * self.scale_N).to(x.dtype).reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class _Int8(Scheme):
    def obstacle(self, device: torch.device) -> str | None:
        rows = torch.arange(-16, 16, device=device).reshape(1, 32).to(torch.int8)
        try:
            found = int8_product(rows, rows.expand(16, 32).contiguous())
        except (RuntimeError, NotImplementedError) as error:
            return f"torch has no int8 product of a few rows on {device.type} ({str(error).splitlines()[0]})"
        exact = int((rows.long() ** 2).sum())
        return None if bool((found == exact).all()) else f"torch's int8 product on {device.type} is wrong"

    def product(self, weight_NK: Tensor, bias_N: Tensor | None) -> nn.Module:
        return Int8Linear(weight_NK, bias_N)


#: Schemes by name, for `scheme=`.
SCHEMES: dict[str, Scheme] = {"int8": _Int8()}


def register_scheme(name: str, scheme: Scheme) -> None:
    """Make `scheme=name` known. `InputError` when the name is taken."""
    if SCHEMES.setdefault(name, scheme) is not scheme:
        raise InputError(f"there is a scheme {name!r} already; choose another name")


class QuantisedModel(DerivedModel):
    """A copy of a model with other products in its linear layers and its head.

    Embeddings, norms, biases and layers that are no linear layers (such as experts in one tensor) are shared with it.
    """

    def __init__(self, model: Any, scheme: str):
        inner, count = with_products(model, SCHEMES[scheme].product)
        if not count:
            raise UnsupportedModelError(f"{type(model).__name__} has no linear layers whose weights could be quantised")
        super().__init__(model, inner, {"scheme": scheme})

    @classmethod
    def derive(cls, model: Any, **options: Any) -> Self:
        return cls(model, **options)

    def forward(self, *, logits_to_keep: int | Tensor = 0, output_hidden_states: bool = False, **given: Any) -> Any:
        return self.inner(logits_to_keep=logits_to_keep, **given)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes that a step of one row reads of the replaced layers."""
        return sum(b.nbytes for m in self.inner.modules() if isinstance(m, Int8Linear) for b in m.buffers())


def quantised(model: Any, scheme: str) -> QuantisedModel:
    """`InputError` for an unknown scheme, `UnsupportedModelError` where it cannot run, with the reason."""
    if scheme not in SCHEMES:
        raise InputError(f"no scheme is called {scheme!r}; there are: {', '.join(sorted(SCHEMES))}")
    name = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"the weights of {name} are quantised already: a second rounding would draft no faster; use another drafter"
        )
    if is_spread(model):
        raise UnsupportedModelError(
            f"the layers of {name} are spread out by accelerate hooks, which a copy would not obey; load it on one "
            "device, or use another drafter"
        )
    reason = SCHEMES[scheme].obstacle(next(model.parameters()).device)
    if reason:
        raise UnsupportedModelError(f"{name} cannot draft with {scheme} weights here: {reason}; use another drafter")
    return QuantisedModel(model, scheme)
