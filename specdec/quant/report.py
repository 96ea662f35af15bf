"""What quantisation does to a model: bits and bytes of each layer and of the whole, and what was left as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from specdec.quant.linear import PackedLinear

#: Why a tensor is left as it is.
EMBEDDING = "embeddings"
VECTOR = "norms and biases"
BY_RECIPE = "kept by the recipe"
BY_SHAPE = "its shape does not fit the format"
OTHER = "not a linear layer"


@dataclass(frozen=True)
class Layer:
    """One quantised layer `[N, K]`. `before`: its stored bytes, 0 for a head that was tied to the embedding."""

    module: str
    shape: tuple[int, int]
    format: str
    before: int
    after: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.after / self.weights


@dataclass(frozen=True)
class Kept:
    """One tensor that stays as it is."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    why: str


@dataclass(frozen=True)
class Report:
    """Bytes are those of tensors, without the headers of files. `weight_bytes`: of one full-precision weight."""

    layers: tuple[Layer, ...]
    kept: tuple[Kept, ...]
    weight_bytes: int

    @property
    def before(self) -> int:
        return sum(layer.before for layer in self.layers) + sum(one.num_bytes for one in self.kept)

    @property
    def after(self) -> int:
        return sum(layer.after for layer in self.layers) + sum(one.num_bytes for one in self.kept)

    @property
    def ratio(self) -> float:
        """Of the whole model's bytes, before to after."""
        return self.before / self.after

    @property
    def linear_ratio(self) -> float:
        """Of the bytes that products with the quantised layers read, before to after."""
        return self.weight_bytes * sum(layer.weights for layer in self.layers) / sum(row.after for row in self.layers)

    @property
    def bits(self) -> float:
        """Stored bits per weight of the quantised layers."""
        return 8 * sum(layer.after for layer in self.layers) / sum(layer.weights for layer in self.layers)

    def kept_bytes(self) -> dict[str, int]:
        """By reason."""
        found: dict[str, int] = {}
        for one in self.kept:
            found[one.why] = found.get(one.why, 0) + one.num_bytes
        return found

    @classmethod
    def of_model(cls, model: nn.Module) -> Report:
        """Of a model in memory whose layers are `PackedLinear`; shared tensors count once.

        Bytes before are those of the dtype that the rest of the model has.
        """
        layers, kept, seen = [], [], set()
        size = next((t.element_size() for t in model.parameters() if t.is_floating_point()), 2)
        for name, module in model.named_modules():
            if isinstance(module, PackedLinear):
                N, K = module.out_features, module.in_features
                layers.append(Layer(name, (N, K), module.format.name, N * K * size, module.num_bytes))
            for own, tensor in module.named_parameters(recurse=False):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    kept.append(Kept(f"{name}.{own}", tuple(tensor.shape), tensor.nbytes, why(module, tensor.ndim)))
        return cls(tuple(layers), tuple(kept), size)

    def to_dict(self) -> dict[str, Any]:
        """JSON: every layer, and totals."""
        return {
            "layers": [{**asdict(layer), "shape": list(layer.shape), "bits": layer.bits} for layer in self.layers],
            "kept": [{**asdict(one), "shape": list(one.shape)} for one in self.kept],
            "bits_per_weight": self.bits,
            "bytes_before": self.before,
            "bytes_after": self.after,
            "ratio": self.ratio,
            "linear_ratio": self.linear_ratio,
        }


def why(module: nn.Module, ndim: int) -> str:
    """The reason for which a tensor of `module` is left as it is."""
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if ndim < 2:
        return VECTOR
    return BY_RECIPE if isinstance(module, nn.Linear) else OTHER


def grouped(layers: Iterable[Layer]) -> list[tuple[str, list[Layer]]]:
    """Layers that differ in the numbers of their names alone, under one name with `*` for what differs."""
    groups: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.module)
        groups.setdefault((name, layer.shape, layer.format, layer.before > 0), []).append(layer)
    return [(key[0] if len(group) > 1 else group[0].module, group) for key, group in groups.items()]
