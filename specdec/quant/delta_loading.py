"""Weights in delta-CSC while `transformers` reads a folder: streams in, the parts of a layer out.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from specdec.errors import InputError
from specdec.quant.delta_csc import expand, tensors_of
from specdec.quant.linear import PREFIX, PackedLinear


class Expanding:
    """How the layers `{name: gap width}` of a model are read. Made when its packed layers are in place.

    `InputError` for a name that is no packed layer.
    """

    def __init__(self, model: Any, gaps: Mapping[str, int]):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
        unknown = sorted(set(gaps) - set(layers))
        if unknown:
            raise InputError(f"the configuration has {unknown[0]} in delta-CSC, which its recipe does not store")
        self.failure: InputError | None = None
        self.operations = [Expand(self, name, layers[name], gap) for name, gap in gaps.items()]

    @property
    def converters(self) -> list[WeightConverter]:
        return [
            WeightConverter([_pattern(source) for source in operation.sources], list(operation.targets), [operation])
            for operation in self.operations
        ]

    @property
    def sources(self) -> set[str]:
        """Names of the tensors in the files."""
        return {name for operation in self.operations for name in operation.sources}

    @property
    def targets(self) -> set[str]:
        """Names of the tensors that are made of them."""
        return {name for operation in self.operations for name in operation.targets}

    def done(self, model: Any) -> None:
        """When all is read. Raises what went wrong; `transformers` makes a report of errors in between."""
        if self.failure is not None:
            raise self.failure
        # What is saved is what runs.
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:
            ours = set(map(id, self.operations))
            model._weight_conversions = [
                each for each in conversions if not ours & set(map(id, getattr(each, "operations", ())))
            ]


class Expand(ConversionOps):
    """The streams of one layer to its parts."""

    supports_many_to_many = True

    def __init__(self, owner: Expanding, name: str, layer: PackedLinear, gap: int):
        self.owner, self.name, self.gap = owner, name, gap
        self.format, self.N, self.K = layer.format, layer.out_features, layer.in_features
        streams = tensors_of(self.format, self.N, self.K)
        self.sources = {f"{name}.{PREFIX}{part}": dtype for part, dtype in streams.items()}
        parts = self.format.parts(self.N, self.K)
        self.targets = {f"{name}.{PREFIX}{part}": spec for part, spec in parts.items()}

    def __deepcopy__(self, memo: object) -> Expand:
        return self

    def convert(
        self, input_dict: Mapping[str, Any], source_patterns: Any = None, target_patterns: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tensors by the names of the parts; blank ones once something went wrong."""
        given = {pattern: value[0] if isinstance(value, list) else value for pattern, value in input_dict.items()}
        if self.owner.failure is None:
            try:
                return self._expanded(given)
            except InputError as error:
                self.owner.failure = error
        return {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in self.targets.items()}

    def _expanded(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors, prefix = {}, f"{self.name}.{PREFIX}"
        for source in self.sources:
            if _pattern(source) not in given:
                raise InputError(f"the files lack {source}, which the model's configuration says is stored")
            tensors[source.removeprefix(prefix)] = given[_pattern(source)]
        device = tensors["counts"].device
        parts = expand(self.format, tensors, self.N, self.K, self.gap, self.name)
        return {prefix + part: tensor.to(device) for part, tensor in parts.items()}


def _pattern(name: str) -> str:
    return f"^{re.escape(name)}$"
