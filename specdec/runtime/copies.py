"""Copies of models that share their tensors: modules of their own, so that a copy may have other layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from specdec.errors import UnsupportedModelError


class StandIn(nn.Module):
    """Stands in a model's place; `inner` does the work, on the same parameters."""

    inner: Any

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.inner.dtype
        return dtype

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()


def is_spread(model: Any) -> bool:
    """Whether accelerate hooks move what its layers work on: a copy, or a part of it, would not obey them."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def shared_copy(model: Any, *, frozen: bool = False) -> Any:
    """A copy of a model that shares every tensor with it. `frozen`: its parameters take no gradients.

    `UnsupportedModelError` for a model that accelerate has spread out.
    """
    if is_spread(model):
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} are spread out by accelerate hooks, which a copy would not obey; "
            "load it on one device"
        )
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    if frozen:
        shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def with_layers(model: Any, make: Callable[[str, nn.Module], nn.Module | None], *, frozen: bool = False) -> Any:
    """Such a copy with `make(name, layer)` in place of each layer for which that is not None."""
    twin = shared_copy(model, frozen=frozen)
    for name, layer in list(twin.named_modules()):
        made = make(name, layer) if name else None
        if made is not None:
            twin.set_submodule(name, made)
    return twin
