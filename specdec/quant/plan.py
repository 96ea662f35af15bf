"""What quantising a checkpoint will do, worked out from its headers before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant import memory
from specdec.quant.format import Format
from specdec.quant.layers import Candidates, candidates
from specdec.quant.linear import PackedLinear
from specdec.quant.memory import Estimate
from specdec.quant.methods.method import create
from specdec.quant.recipe import ROUND, Recipe
from specdec.quant.report import BY_RECIPE, BY_SHAPE, OTHER, Kept, Layer, Report, why
from specdec.quant.source import Checkpoint, empty_model, local_folder, model_names, read_config

MAX_SHARD = 1 << 30
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Plan:
    """`name`: the source's. `keys`: the checkpoint's key of each quantised layer's weight. `names`: the model's names
    of the checkpoint's keys. `kept`: the key that each tensor which is not quantised is copied from.

    `obstacle`: why the files cannot be read tensor by tensor; None when they can.
    """

    name: str
    checkpoint: Checkpoint
    recipe: Recipe
    layers: Candidates
    formats: dict[str, Format]
    keys: dict[str, str]
    names: dict[str, str]
    kept: dict[str, str]
    transposed: frozenset[str]
    report: Report
    estimate: Estimate
    max_shard: int
    obstacle: str | None
    trust_remote_code: bool

    @property
    def calibrates(self) -> bool:
        """The method looks at activations, for which the whole model is loaded."""
        return self.recipe.method != ROUND

    @property
    def dtype(self) -> torch.dtype:
        """That of the layers' weights in the files."""
        return next((self.checkpoint.tensors[key].dtype for key in self.keys.values()), torch.float32)

    @property
    def unties(self) -> bool:
        """The head shares the embedding's weights, and is stored apart from now on."""
        return self.layers.tied and self.layers.head in self.formats


def prepare(
    source: str | Path,
    recipe: Recipe | str | Path | Mapping[str, Any],
    *,
    max_shard: int = MAX_SHARD,
    trust_remote_code: bool = False,
) -> Plan:
    """For a folder or hub id, from its headers and configuration alone. `max_shard`: bytes of a file, at most.

    Raises `UnsupportedModelError` for weights that are pickled, damaged, quantised already or not the model's own, and
    `InputError` for recipes that do not fit the model, and methods that do not fit the recipe.
    """
    if max_shard < 1:
        raise InputError(f"a shard holds at least 1 byte, not {max_shard}")
    recipe = Recipe.of(recipe)
    folder = local_folder(source)
    config = read_config(folder, trust_remote_code)
    checkpoint = Checkpoint(folder)
    model = empty_model(config, trust_remote_code)
    layers = candidates(model)
    formats = recipe.assign(layers)
    method = create(recipe.method, recipe.options)
    method.check(formats)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names = model_names(model, list(checkpoint.tensors))
    by_name = {name: key for key, name in names.items()}
    unties = layers.head if layers.tied and layers.head in formats else None
    table = next((f"{name}.weight" for name, one in modules.items() if one is model.get_input_embeddings()), "")
    keys = {name: by_name[f"{name}.weight"] for name in formats if f"{name}.weight" in by_name}
    if unties is not None and unties not in keys and table in by_name:
        keys[unties] = by_name[table]
    transposed = frozenset(name for name in keys if isinstance(modules[name], Conv1D))
    for name, key in keys.items():
        _check_weight(checkpoint, key, layers.shapes[name], name in transposed)
    gone = {key for name, key in keys.items() if key == by_name.get(f"{name}.weight")}
    kept = {key: key for key in checkpoint.tensors if key not in gone}
    if unties is not None and table not in by_name and unties in keys:
        kept[table] = keys[unties]  # the files name the shared tensor after the head
    lacking = [name for name in formats if name not in keys]
    obstacle = f"the files have no tensor for {lacking[0]}.weight alone" if lacking else None
    if obstacle is None:
        report = _report(checkpoint, recipe, layers, formats, kept, names, modules, table)
    else:
        report = _report_without_files(model, layers, formats, unties)
    if obstacle is not None or recipe.method != ROUND:
        width = config.get_text_config(decoder=True).hidden_size
        estimate = memory.of_loaded(report, memory.of_method(report, width) if recipe.method != ROUND else 0)
    else:
        estimate = memory.of_stream(report, max_shard)
    return Plan(
        Path(source).resolve().name if Path(source).is_dir() else str(source),
        checkpoint, recipe, layers, formats, keys, names, kept, transposed, report, estimate, max_shard, obstacle,
        trust_remote_code,
    )  # fmt: skip


def _check_weight(checkpoint: Checkpoint, key: str, shape: tuple[int, int], transposed: bool) -> None:
    stored = checkpoint.tensors[key]
    wanted = shape[::-1] if transposed else shape
    if stored.shape != wanted:
        raise UnsupportedModelError(
            f"{key} is {list(stored.shape)} in {stored.file}, and {list(wanted)} by the configuration; "
            "the two do not belong together"
        )
    if stored.dtype not in _FLOATS:
        raise UnsupportedModelError(f"{key} is {stored.dtype} in {stored.file}; start from full-precision weights")


def _report(
    checkpoint: Checkpoint,
    recipe: Recipe,
    layers: Candidates,
    formats: Mapping[str, Format],
    kept: Mapping[str, str],
    names: Mapping[str, str],
    modules: Mapping[str, nn.Module],
    table: str,
) -> Report:
    by_name = {name: key for key, name in names.items()}
    rows, sizes = [], []
    for name, format in formats.items():
        N, K = layers.shapes[name]
        key = by_name.get(f"{name}.weight")
        before = checkpoint.tensors[key].num_bytes if key is not None else 0
        rows.append(Layer(name, (N, K), format.name, before, format.num_bytes(N, K)))
        sizes.append(before // (N * K))
    left = []
    for name, key in kept.items():
        stored = checkpoint.tensors[key]
        module_name = table.rpartition(".")[0] if name == table else names.get(key, key).rpartition(".")[0]
        module = modules.get(module_name)
        reason = why(module, len(stored.shape)) if module is not None else OTHER
        if reason == BY_RECIPE and recipe.format_name(module_name, module_name == layers.head) is not None:
            reason = BY_SHAPE
        left.append(Kept(name, stored.shape, stored.num_bytes, reason))
    return Report(tuple(rows), tuple(left), max(sizes) or 2)


def _report_without_files(
    model: nn.Module, layers: Candidates, formats: Mapping[str, Format], unties: str | None
) -> Report:
    """Where the files' tensors are other ones: of the empty model, which it changes into the quantised one."""
    for name, format in formats.items():
        N, K = layers.shapes[name]
        model.set_submodule(name, PackedLinear(format, K, N, getattr(model.get_submodule(name), "bias", None)))
    found = Report.of_model(model)
    return replace(found, layers=tuple(replace(one, before=0) if one.module == unties else one for one in found.layers))
