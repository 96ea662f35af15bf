"""Quantising a checkpoint from file to file: no model is built with weights, and one layer is in memory at a time.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.format import Format
from specdec.quant.linear import PREFIX
from specdec.quant.memory import CHUNK
from specdec.quant.methods.method import Prepared
from specdec.quant.plan import Plan
from specdec.quant.recipe import ROUND
from specdec.quant.report import Report
from specdec.quant.shards import ShardWriter, copy_companions, whole_folder, write_config
from specdec.quant.source import check_output
from specdec.train import provenance

#: Told before each tensor: bytes of the source that are done, of all, the tensor's name.
Told = Callable[[int, int, str], None]


def _silent(done: int, of: int, name: str) -> None:
    """Tells nobody."""


def quantize(
    plan: Plan,
    out: str | Path,
    *,
    prepared: Prepared | None = None,
    overwrite: bool = False,
    memory_budget: int | None = None,
    told: Told = _silent,
) -> Report:
    """Write the folder that `plan` describes; `from_pretrained` and `specdec.load` read it.

    Tensors go from file to file, one at a time: in memory are one shard and one layer. What is not quantised is copied
    bit by bit, and the folder appears when it is whole. `prepared`: what a calibrated method made of the model, whose
    parts are written instead of rounding here. `memory_budget`: bytes.

    Lossless: no, weights are rounded, once; the stored bits are those of quantising the loaded model.
    Raises `MemoryBudgetError` when it cannot fit, and `InputError` that names the tensor for NaN weights.
    """
    out = Path(out)
    source = plan.checkpoint.folder
    check_output(out, source, overwrite)
    plan.estimate.check_disk(out.resolve().parent)
    if prepared is None:
        plan.estimate.check_memory(memory_budget)
    if plan.calibrates and prepared is None:
        raise InputError(f"the method {plan.recipe.method} looks at activations: give prepared=calibrate(plan, ...)")
    unknown = set(prepared.changed) - set(plan.names.values()) if prepared is not None and not plan.obstacle else set()
    if unknown:
        raise InputError(f"{plan.recipe.method} changed {min(unknown)}, which is no tensor of the files by itself")
    with whole_folder(out) as folder:
        if plan.obstacle is None:
            _write(plan, prepared, folder, told)
        else:
            _through_model(plan, prepared, folder)
        copy_companions(source, folder)
        provenance.write(
            folder,
            {
                "kind": "quantized",
                "source": plan.name,
                "source_sha256": plan.checkpoint.digests(),
                "recipe": plan.recipe.to_dict(),
                "bits_per_weight": round(plan.report.bits, 4),
                "bytes": plan.report.after,
            },
        )
    return plan.report


def _write(plan: Plan, prepared: Prepared | None, folder: Path, told: Told) -> None:
    writer = ShardWriter(folder, plan.max_shard)
    for name, tensor in _tensors(plan, prepared, told, writer.make_room):
        writer.add(name, tensor)
    writer.close()
    plan.checkpoint.close()
    write_config(plan.checkpoint.folder, folder, plan.recipe.to_dict(), plan.unties)


def _through_model(plan: Plan, prepared: Prepared | None, folder: Path) -> None:
    """Where the files' tensors are not the model's own, transformers makes those while it loads the model."""
    from specdec.loading import load_model
    from specdec.quant.hf import QuantConfig

    rounding = replace(plan.recipe, method=ROUND, options={})
    source, remote = plan.checkpoint.folder, plan.trust_remote_code
    model = load_model(source, device="cpu", dtype="auto", quantize=rounding, trust_remote_code=remote)
    if prepared is not None:
        state = model.state_dict()
        for module, parts in prepared.parts.items():
            for part, tensor in parts.items():
                state[f"{module}.{PREFIX}{part}"].copy_(tensor)
        for name, tensor in prepared.changed.items():
            state[name].copy_(tensor)
    model.config.quantization_config = QuantConfig(plan.recipe)
    model.save_pretrained(folder, max_shard_size=plan.max_shard)


def _tensors(
    plan: Plan, prepared: Prepared | None, told: Told, room: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the result, in the order of the source's files."""
    checkpoint = plan.checkpoint
    made_of: dict[str, list[str]] = {}
    for module, key in plan.keys.items():
        made_of.setdefault(key, []).append(module)
    copied: dict[str, list[str]] = {}
    for name, key in plan.kept.items():
        copied.setdefault(key, []).append(name)
    done, of = 0, checkpoint.num_bytes
    for key, stored in checkpoint.tensors.items():
        told(done, of, key)
        for module in made_of.get(key, ()):
            room(plan.formats[module].num_bytes(*plan.layers.shapes[module]))
            parts = prepared.parts[module] if prepared is not None else _packed(plan, module)
            yield from ((f"{module}.{PREFIX}{part}", tensor.cpu()) for part, tensor in parts.items())
        for name in copied.get(key, ()):
            changed = prepared.changed.get(plan.names.get(key, key)) if prepared is not None else None
            yield name, _finite(checkpoint.read(key), key) if changed is None else changed.to("cpu", stored.dtype)
        done += stored.num_bytes
    told(of, of, "")


def _packed(plan: Plan, module: str) -> dict[str, Tensor]:
    """The stored parts of a layer, made of some rows of its weight at a time where its rows are stored one by one."""
    format, key = plan.formats[module], plan.keys[module]
    N, K = plan.layers.shapes[module]
    transposed = module in plan.transposed
    try:
        if not _by_rows(format, K):
            return format.pack(plan.checkpoint.read_rows(key, slice(0, N), transposed))
        parts = {name: torch.empty(part.shape, dtype=part.dtype) for name, part in format.parts(N, K).items()}
        step = max(1, CHUNK // K)
        for start in range(0, N, step):
            rows = slice(start, min(start + step, N))
            for name, tensor in format.pack(plan.checkpoint.read_rows(key, rows, transposed)).items():
                parts[name][rows] = tensor
    except InputError as error:
        raise InputError(f"{key} of {plan.name}: {error}") from error
    return parts


def _by_rows(format: Format, K: int) -> bool:
    """Whether every part of a weight has a row for each of its rows, so that some can be made without the others."""
    return all(part.shape[:1] == (3,) for part in format.parts(3, K).values())


def _finite(tensor: Tensor, key: str) -> Tensor:
    """`InputError` that names the tensor. By its extremes, which need no copy."""
    if tensor.is_floating_point() and tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise InputError(f"{key} holds NaN or infinite values; the checkpoint is damaged, or its training diverged")
    return tensor
