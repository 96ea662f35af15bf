"""Which layers of a model can be stored in fewer bits: its linear layers. Never embeddings, norms or convolutions.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdec.errors import UnsupportedModelError
from specdec.quant.linear import PackedLinear

# What the last layer is called where a model does not say.
HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
# Subclasses of `nn.Linear` in transformers with a forward of their own that computes the same.
_SAME_PRODUCT = ("FalconLinear",)


@dataclass(frozen=True)
class Candidates:
    """The linear layers of a model by module name, with `(N, K)` each; works on the meta device.

    `head`: the name of the output layer, None where the model has none. `tied`: the head's weights are the input
    embedding's. A tied head that is quantised is stored apart, and the embedding stays as it is: rows are looked up
    there one at a time, while the head is read whole for every token.
    """

    shapes: dict[str, tuple[int, int]]
    head: str | None = None
    tied: bool = False


def is_head(name: str) -> bool:
    """By its name alone."""
    return name.rpartition(".")[2] in HEAD_NAMES


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(N, K)` of a layer that can be quantised, else None.

    `Conv1D` of transformers is a linear layer that stores the transpose `[K, N]`. A subclass that computes something
    else with its weight, as some routers of experts do, is none.
    """
    kind = type(module)
    if isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ in _SAME_PRODUCT):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return None


def weight_of(module: nn.Module) -> Tensor:
    """The weight `[N, K]` of such a layer, a view."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def candidates(model: Any) -> Candidates:
    """Of a causal LM. `UnsupportedModelError` for a model that is quantised already, or has no linear layers."""
    modules = dict(model.named_modules())
    packed = next((name for name, module in modules.items() if isinstance(module, PackedLinear)), None)
    if packed is not None:
        raise UnsupportedModelError(f"{packed} is quantised already; start from the full-precision model")
    shapes = {name: shape for name, module in modules.items() if (shape := linear_shape(module)) is not None}
    if not shapes:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers to quantise")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = next((name for name in shapes if modules[name] is output), None)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    tied = head is not None and embedding is not None and _tied(model, modules[head], embedding)
    return Candidates(shapes, head, tied)


def _tied(model: Any, head: nn.Module, embedding: nn.Module) -> bool:
    """On the meta device weights may not be tied yet: there the configuration tells."""
    if getattr(head, "weight", None) is getattr(embedding, "weight", None):
        return True
    config = getattr(model, "config", None)
    meta = getattr(getattr(head, "weight", None), "is_meta", False)
    return bool(meta and config is not None and config.get_text_config(decoder=True).tie_word_embeddings)
