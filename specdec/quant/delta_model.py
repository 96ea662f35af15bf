"""Whole models on disk in delta-CSC: a folder with stored weights, written again with less where weights were pruned.

`config.json` says so beside the recipe: `quantization_config["storage"] = {"layout": "delta-csc", "version": 1,
"gaps": {layer: gap width}}`. Of the layers named there the files hold `<layer>.weight_values`, `.weight_gaps` and
`.weight_counts` (see `specdec.quant.delta_csc`); all other tensors are as they were, to the bit.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from specdec.errors import InputError, UnsupportedModelError
from specdec.formats.files import read_config
from specdec.quant.delta_csc import expand, tensors_of, values_of
from specdec.quant.delta_files import Matrix
from specdec.quant.delta_layout import LAYOUT, VERSION, gaps_of
from specdec.quant.format import Format
from specdec.quant.layers import candidates
from specdec.quant.linear import PREFIX
from specdec.quant.recipe import Recipe
from specdec.quant.shards import ShardWriter, copy_companions, whole_folder
from specdec.quant.source import Checkpoint, check_output, local_folder
from specdec.train.provenance import PROVENANCE, write_json

SHARD = 1 << 30  # bytes

#: Told before each tensor: bytes of the source that are done, of all, the tensor's name.
Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Layer:
    """A linear layer of a model as its recipe says it is stored."""

    name: str
    format: Format
    N: int
    K: int

    def key(self, part: str) -> str:
        return f"{self.name}.{PREFIX}{part}"


@dataclass(frozen=True)
class Sizes:
    """Bytes of all tensors, before and after, and the gap width of each layer that is stored in delta-CSC."""

    before: int
    after: int
    gaps: Mapping[str, int]


def compress_folder(
    source: str | Path,
    out: str | Path,
    *,
    gap: int | None = None,
    overwrite: bool = False,
    max_shard: int = SHARD,
    told: Told = lambda done, of, name: None,
) -> Sizes:
    """Write a folder of stored weights, such as `specdec quantize` makes, with delta-CSC where that is smaller.

    `gap`: one width for all layers; None for the best of each. In memory are one layer and one shard.
    Lossless: yes, `expand_folder` gives back every weight (negative zeros as zeros).
    Raises `InputError` for folders whose weights are not stored by this library, or lie in delta-CSC already, and
    where no layer becomes smaller; `UnsupportedModelError` for files that are missing, damaged or pickled.
    """
    folder = local_folder(source)
    config = _config(folder)
    if gaps_of(config["quantization_config"]):
        raise InputError(f"{source} lies in {LAYOUT} already")
    layers, gaps = _layers(folder, config), dict[str, int]()

    def layer_tensors(checkpoint: Checkpoint, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        parts = {part: checkpoint.read(layer.key(part)) for part in layer.format.parts(layer.N, layer.K)}
        try:
            matrix = Matrix.of(layer.format, parts, layer.N, layer.K, gap) if _takes(layer.format) else None
        except InputError as error:
            raise InputError(f"{layer.name} in {folder}: {error}") from error
        if matrix is not None and matrix.num_bytes < layer.format.num_bytes(layer.N, layer.K):
            gaps[layer.name] = matrix.gap
            parts = dict(matrix.tensors)
        yield from ((layer.key(part), tensor) for part, tensor in parts.items())

    def finish() -> None:
        if not gaps:
            raise InputError(
                f"no layer of {source} is smaller in {LAYOUT}: it pays from 78 % of zeros on, or for pruned weights in "
                "int8 and mx formats"
            )
        config["quantization_config"]["storage"] = {"layout": LAYOUT, "version": VERSION, "gaps": gaps}

    wanted = {name: tuple(layer.format.parts(layer.N, layer.K)) for name, layer in layers.items()}
    work = _Work(folder, Path(out), config, layers, wanted, overwrite, max_shard, told)
    before, after = work.rewrite(layer_tensors, finish)
    return Sizes(before, after, gaps)


def expand_folder(
    source: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard: int = SHARD,
    told: Told = lambda done, of, name: None,
) -> Sizes:
    """Write a folder in delta-CSC with the weights as they run, as `specdec quantize` would have.

    Raises as `compress_folder`; `InputError` that names the tensor for streams that are damaged.
    """
    folder = local_folder(source)
    config = _config(folder)
    gaps = gaps_of(config["quantization_config"])
    layers = _layers(folder, config)
    if not gaps:
        raise InputError(f"{source} does not lie in {LAYOUT}; it can be loaded as it is")
    unknown = sorted(set(gaps) - set(layers))
    if unknown:
        raise InputError(f"{source} has {unknown[0]} in {LAYOUT}, which its recipe does not store")

    def layer_tensors(checkpoint: Checkpoint, layer: Layer) -> Iterator[tuple[str, Tensor]]:
        tensors = {part: checkpoint.read(layer.key(part)) for part in tensors_of(layer.format, layer.N, layer.K)}
        parts = expand(layer.format, tensors, layer.N, layer.K, gaps[layer.name], layer.name)
        yield from ((layer.key(part), tensor) for part, tensor in parts.items())

    wanted = {name: tuple(tensors_of(layers[name].format, layers[name].N, layers[name].K)) for name in gaps}
    del config["quantization_config"]["storage"]
    work = _Work(folder, Path(out), config, layers, wanted, overwrite, max_shard, told)
    before, after = work.rewrite(layer_tensors)
    return Sizes(before, after, gaps)


@dataclass(frozen=True)
class _Work:
    """Copying a folder, with other tensors in place of those `wanted` of layers."""

    folder: Path
    out: Path
    config: dict[str, Any]
    layers: Mapping[str, Layer]
    wanted: Mapping[str, tuple[str, ...]]
    overwrite: bool
    max_shard: int
    told: Told

    def rewrite(
        self,
        layer_tensors: Callable[[Checkpoint, Layer], Iterator[tuple[str, Tensor]]],
        finish: Callable[[], None] = lambda: None,
    ) -> tuple[int, int]:
        """Bytes of tensors before and after. `finish` is called before the configuration is written."""
        check_output(self.out, self.folder, self.overwrite)
        checkpoint = Checkpoint(self.folder)
        owner = {self.layers[name].key(part): name for name, parts in self.wanted.items() for part in parts}
        missing = sorted(set(owner) - set(checkpoint.tensors))
        if missing:
            raise InputError(f"the files of {self.folder} lack {missing[0]}, which the model's recipe says is stored")
        with whole_folder(self.out) as aside:
            writer = ShardWriter(aside, self.max_shard)
            for name, tensor in self._tensors(checkpoint, owner, layer_tensors):
                writer.add(name, tensor)
            finish()
            writer.close()
            checkpoint.close()
            copy_companions(self.folder, aside)
            if (self.folder / PROVENANCE).is_file():
                shutil.copyfile(self.folder / PROVENANCE, aside / PROVENANCE)
            write_json(aside / "config.json", self.config)
        return checkpoint.num_bytes, writer.total

    def _tensors(
        self,
        checkpoint: Checkpoint,
        owner: Mapping[str, str],
        layer_tensors: Callable[[Checkpoint, Layer], Iterator[tuple[str, Tensor]]],
    ) -> Iterator[tuple[str, Tensor]]:
        """In the order of the files; those of a layer where its first one stands."""
        written: set[str] = set()
        done, of = 0, checkpoint.num_bytes
        for key, stored in checkpoint.tensors.items():
            self.told(done, of, key)
            name = owner.get(key)
            if name is None:
                yield key, checkpoint.read(key)
            elif name not in written:
                written.add(name)
                yield from layer_tensors(checkpoint, self.layers[name])
            done += stored.num_bytes
        self.told(of, of, "")


def _config(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    quant = config.get("quantization_config")
    if not isinstance(quant, dict) or quant.get("quant_method") != "specdec" or "recipe" not in quant:
        raise InputError(f"the weights of {folder} are not stored by specdec; run specdec quantize first")
    return config


def _layers(folder: Path, config: Mapping[str, Any]) -> dict[str, Layer]:
    """The layers that the recipe stores, by name."""
    settings = AutoConfig.for_model(**{key: value for key, value in config.items() if key != "quantization_config"})
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
    except (ValueError, KeyError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(f"no causal language model can be made of {folder}: {first}") from error
    found = candidates(model)
    formats = Recipe.of(config["quantization_config"]["recipe"]).assign(found)
    return {name: Layer(name, format, *found.shapes[name]) for name, format in formats.items()}


def _takes(format: Format) -> bool:
    try:
        values_of(format)
    except InputError:
        return False
    return True
