"""Packed layers in place of a model's linear layers, while `transformers` reads its weights.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from specdec.errors import InputError
from specdec.quant.delta_loading import Expanding
from specdec.quant.format import Part
from specdec.quant.layers import candidates
from specdec.quant.linear import PREFIX, PackedLinear
from specdec.quant.recipe import Recipe

# Of safetensors' headers.
_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "BOOL": torch.bool,
}  # fmt: skip


@dataclass
class Swapped:
    """Layers that were swapped, and what their weights come from, by parameter name."""

    stored: dict[str, Part]  # tensors that packed layers hold
    weights: dict[str, str] = field(default_factory=dict)  # full-precision weight -> the layer that rounds it
    transposed: set[str] = field(default_factory=set)  # of those, as `Conv1D` stores them
    tied: dict[str, str] = field(
        default_factory=dict
    )  # embedding -> head's weight and back: either may be in the files
    seen: set[str] = field(default_factory=set)
    exact: set[str] = field(default_factory=set)  # patterns of tensors to be read in float32

    @property
    def sources(self) -> set[str]:
        return {*self.weights, *self.tied}

    def made_of(self, model: Any, name: str, value: Tensor) -> dict[str, Tensor]:
        """Tensors by name that stand for a full-precision tensor from the files. `InputError` names it.

        Of a tied pair the files may hold one or both: a first one stands for both, and a second one for itself.
        """
        names = [name] if self.tied.get(name, name) in {name, *self.seen} else [name, self.tied[name]]
        self.seen.add(name)
        made: dict[str, Tensor] = {}
        for each in names:
            made.update(self._one(model, each, name, value))
        return made

    def blank(self, model: Any, name: str, value: Tensor) -> dict[str, Tensor]:
        """The same names with nothing in them: for a model that will not be used."""
        if name not in self.weights:
            return {name: value}
        layer = model.get_submodule(self.weights[name])
        _put_aside(layer)
        return {
            f"{self.weights[name]}.{PREFIX}{part}": torch.empty_like(t, device=value.device)
            for part, t in layer.parts.items()
        }

    def _one(self, model: Any, name: str, source: str, value: Tensor) -> dict[str, Tensor]:
        if name not in self.weights:  # the embedding, as it is
            table = model.get_parameter(name)
            _check_shape(source, value, table.shape)
            return {name: value.to(table.dtype)}
        layer = model.get_submodule(self.weights[name])
        weight = value.T if name in self.transposed else value
        _check_shape(source, weight, (layer.out_features, layer.in_features))
        try:
            parts = layer.format.pack(weight)
        except InputError as error:
            raise InputError(f"{source} cannot be stored as {layer.format.name}: {error}") from error
        _put_aside(layer)
        return {f"{self.weights[name]}.{PREFIX}{part}": tensor for part, tensor in parts.items()}


def _check_shape(name: str, value: Tensor, wanted: Iterable[int]) -> None:
    if tuple(value.shape) != tuple(wanted):
        raise InputError(f"{name} in the files is {list(value.shape)}, and the model's is {list(wanted)}")


def _put_aside(layer: PackedLinear) -> None:
    """The weight is no parameter any more. Until loading ends a mark stays, for `transformers` may set initial values
    by looking at `weight`, and passes over what is marked."""
    weight = layer._parameters.pop("weight", None)
    if weight is None:
        return
    mark = weight.detach()
    mark._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.__dict__["weight"] = mark


def swap(model: Any, recipe: Recipe, waiting: bool) -> Swapped:
    """Put packed layers on the meta device into a model that is there, as the recipe says; a tied head is untied.

    `waiting`: each of them holds, beside its empty parts, the weight that it will be made of.
    """
    found = candidates(model)
    formats = recipe.assign(found)
    swapped = Swapped(stored={})
    for name, format in formats.items():
        layer = model.get_submodule(name)
        N, K = found.shapes[name]
        packed = PackedLinear(format, K, N, layer.bias)
        packed.register_parameter("weight", nn.Parameter(layer.weight.detach(), requires_grad=False))
        swapped.stored.update({f"{name}.{PREFIX}{part}": spec for part, spec in format.parts(N, K).items()})
        swapped.weights[f"{name}.weight"] = name
        if isinstance(layer, Conv1D):
            swapped.transposed.add(f"{name}.weight")
        if not waiting:
            _put_aside(packed)
        model.set_submodule(name, packed)
    if found.tied and found.head in formats:
        _untie(model, f"{found.head}.weight", swapped)
    for pair in model.all_tied_weights_keys.items():
        packed_one = next((name for name in pair if name in swapped.weights), None)
        if packed_one is not None:
            raise InputError(
                f"{pair[0]} and {pair[1]} are one weight, which cannot be stored twice: keep both by a rule"
            )
    # Weights are rounded from what the files hold, not from what the model's dtype makes of it.
    swapped.exact = {f"^{re.escape(name)}$" for name in swapped.sources} if waiting else set()
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *swapped.exact}
    return swapped


def _untie(model: Any, head: str, swapped: Swapped) -> None:
    """The head has stored weights of its own; the embedding stays, and may be what they are made of."""
    embedding = model.get_input_embeddings()
    table = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    model.all_tied_weights_keys.pop(head, None)
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False
    swapped.tied = {table: head, head: table}


def finish(model: Any, swapped: Swapped) -> None:
    """Clear away what only loading needed. `InputError` for weights that were not in the files."""
    model._keep_in_fp32_modules_strict -= swapped.exact
    missing = []
    for weight, name in swapped.weights.items():
        layer = model.get_submodule(name)
        if "weight" in layer._parameters:
            missing.append(weight)
        layer.__dict__.pop("weight", None)
    if missing:
        raise InputError(f"the files lack {len(missing)} weights that are to be quantised, for example {missing[0]}")


def check_files(model: Any, files: Sequence[str] | None, swapped: Swapped, expanding: Expanding) -> None:
    """`InputError` unless the files hold every tensor of the packed layers, of the right shape and dtype, or those
    that one is expanded from.

    Only headers are read, and files that are cut off are found out.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        raise InputError("a model with stored weights is read from safetensors files, and from nothing else")
    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    known, prefix = model.state_dict(), model.base_model_prefix
    held: dict[str, tuple[str, tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(str(file), "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    name, _ = rename_source_key(key, renamings, [], prefix, known)
                    part = opened.get_slice(key)
                    held[name] = (key, tuple(part.get_shape()), part.get_dtype())
        except SafetensorError as error:
            raise InputError(f"{file} is damaged or cut off: {error}; fetch or make it again") from error
    lacking = sorted(expanding.sources - held.keys())
    if lacking:
        raise InputError(f"the files lack {lacking[0]}, which the model's configuration says is stored")
    targets = expanding.targets
    for name, wanted in swapped.stored.items():
        if name in targets:
            continue
        if name not in held:
            advice = " (it was saved with full weights there)" if f"{name.rpartition('.')[0]}.weight" in held else ""
            raise InputError(f"the files lack {name}, which the model's recipe says is stored{advice}")
        key, shape, dtype = held[name]
        if shape != wanted.shape or _DTYPES.get(dtype) != wanted.dtype:
            raise InputError(
                f"{key} is {_DTYPES.get(dtype, dtype)} {list(shape)} in the files; "
                f"the model's recipe says {wanted.dtype} {list(wanted.shape)}"
            )
