"""A model whose weights are stored in fewer bits, to draft with: a copy of a loaded one that shares all but those."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.format import Format
from specdec.quant.hf import is_ours, packed_layers
from specdec.quant.layers import candidates, linear_shape, weight_of
from specdec.quant.linear import PackedLinear
from specdec.quant.recipe import Recipe
from specdec.runtime.copies import is_spread, with_layers
from specdec.runtime.shared import DerivedModel


def _formats(model: Any, recipe: Recipe) -> dict[str, Format]:
    """Of each layer that the recipe stores; layers that are stored already count as what they stand for."""
    stored = dict(packed_layers(model))
    if not stored:
        return recipe.assign(candidates(model))
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in stored.items()}
    shapes.update({n: shape for n, m in model.named_modules() if (shape := linear_shape(m)) is not None})
    output = model.get_output_embeddings()
    return recipe.assign(shapes, next((name for name in shapes if model.get_submodule(name) is output), None))


def _rounded(name: str, layer: Any, format: Format) -> PackedLinear:
    weight = layer.weight_in(torch.float32) if isinstance(layer, PackedLinear) else weight_of(layer)
    try:
        return PackedLinear.of(weight, layer.bias, format)
    except InputError as error:
        raise InputError(f"{name}.weight cannot be stored as {format.name}: {error}") from error


def _empty(layer: Any, format: Format) -> PackedLinear:
    if isinstance(layer, PackedLinear):
        N, K, device = layer.out_features, layer.in_features, next(layer.buffers()).device
    else:
        (N, K), device = weight_of(layer).shape, layer.weight.device
    return PackedLinear(format, K, N, layer.bias, device=device)


class QuantisedModel(DerivedModel):
    """A copy of a model whose linear layers are stored as a recipe says; all else is shared with it.

    Embeddings, norms, biases and layers that are no linear layers (such as experts in one tensor) stay as they are.
    `empty`: nothing is rounded, and nothing is in the layers.
    """

    def __init__(self, model: Any, recipe: Recipe, empty: bool = False):
        formats = _formats(model, recipe)

        def made(name: str, layer: nn.Module) -> nn.Module | None:
            if name not in formats:
                return None
            return _empty(layer, formats[name]) if empty else _rounded(name, layer, formats[name])

        super().__init__(model, with_layers(model, made), {"scheme": recipe.to_dict()})

    @classmethod
    def derive(cls, model: Any, **options: Any) -> Self:
        return cls(model, Recipe.of(options["scheme"]), empty=True)

    def forward(self, *, logits_to_keep: int | Tensor = 0, output_hidden_states: bool = False, **given: Any) -> Any:
        return self.inner(logits_to_keep=logits_to_keep, **given)

    @property
    def num_weight_bytes(self) -> int:
        """Bytes that a step of one row reads of the replaced layers."""
        return sum(layer.num_bytes for _, layer in packed_layers(self.inner))


def quantised(model: Any, scheme: Any) -> QuantisedModel:
    """`scheme`: a format, or whatever `Recipe.of` takes; weights are rounded to nearest.

    `InputError` for an unknown scheme, `UnsupportedModelError` where it cannot draft, with the reason.
    """
    recipe, name = Recipe.of(scheme), type(model).__name__
    if recipe.method != "rtn":
        raise InputError(
            f"{recipe.method} looks at activations on a text, and a scheme rounds to nearest: make the draft with "
            "specdec quantize, and let its folder draft"
        )
    if getattr(model, "hf_quantizer", None) is not None and not is_ours(model):
        raise UnsupportedModelError(
            f"the weights of {name} are stored by another library, in a way that is not known here: use another drafter"
        )
    if is_spread(model):
        raise UnsupportedModelError(
            f"the layers of {name} are spread out by accelerate hooks, which a copy would not obey; load it on one "
            "device, or use another drafter"
        )
    draft = QuantisedModel(model, recipe)
    before = _bytes(model)
    if packed_layers(model) and _bytes(draft.inner) >= before:
        raise UnsupportedModelError(
            f"the weights of {name} take {before:,} bytes as they are, and would take no fewer as "
            f"{recipe.name or 'the scheme'} says: such a draft costs as much as the target; choose a smaller format"
        )
    return draft


def _bytes(model: Any) -> int:
    """Of linear layers, stored or not."""
    plain = [m for m in model.modules() if linear_shape(m) is not None]
    return sum(layer.num_bytes for _, layer in packed_layers(model)) + sum(weight_of(m).nbytes for m in plain)
