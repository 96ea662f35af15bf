"""`specdec info`: models, plugins, device, dtype, versions."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from specdec.cli import options, screen
from specdec.dtypes import dtype_name
from specdec.errors import InputError

_EXAMPLES = """\
examples:
  specdec info
  specdec info --json info.json
  specdec info --target org/target --drafter org/draft
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="models, plugins, device, dtype, versions",
        description="Show what is installed here: models, plugins and the packages they come from, device, versions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    options.add_model_options(parser, loads=False)
    parser.set_defaults(run=run)


def describe_folder(folder: Path) -> dict[str, Any]:
    """Parameters, bytes and shape of a model, from its files' headers alone."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} is no model folder: config.json cannot be read") from error
    parameters = 0
    dtypes: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                tensor = weights.get_slice(name)
                n = 1
                for side in tensor.get_shape():
                    n *= side
                parameters += n
                dtypes.add(str(tensor.get_dtype()))
    quantised = config.get("quantization_config") or {}
    method = str(quantised.get("quant_method", "")) if isinstance(quantised, dict) else ""
    kinds = "/".join(sorted(dtypes)).lower() or "no safetensors"
    formats: dict[str, Any] = {}
    if method == "specdec":
        parameters, formats, kinds = stored_formats(folder)
    elif method:
        kinds = f"{method}: {kinds}"
    return {
        "parameters": parameters,
        "bytes": sum(file.stat().st_size for file in files),
        "stored_as": kinds,
        "formats": formats,
        "architecture": (config.get("architectures") or [config.get("model_type", "?")])[0],
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "width": config.get("hidden_size", config.get("n_embd")),
        "vocabulary": config.get("vocab_size"),
        "context": config.get("max_position_embeddings", config.get("n_positions")),
    }


def stored_formats(folder: Path) -> tuple[int, dict[str, Any], str]:
    """Of a folder with stored weights: weights, layers with bytes and bits per weight by format, and that in words."""
    from transformers import AutoConfig

    from specdec.quant.hf import with_empty_layers
    from specdec.quant.source import empty_model

    model = with_empty_layers(empty_model(AutoConfig.from_pretrained(str(folder))))
    return formats_of(model)


def formats_of(model: Any) -> tuple[int, dict[str, Any], str]:
    from specdec.quant.linear import num_parameters, stored_as
    from specdec.quant.report import Report

    found: dict[str, Any] = {}
    weights: dict[str, int] = {}
    for layer in Report.of_model(model).layers:
        entry = found.setdefault(layer.format, {"layers": 0, "bytes": 0})
        entry["layers"] += 1
        entry["bytes"] += layer.after
        weights[layer.format] = weights.get(layer.format, 0) + layer.weights
    for name, entry in found.items():
        entry["bits_per_weight"] = 8 * entry["bytes"] / weights[name]
    words = ", ".join(filter(None, (stored_as(model), dtype_name(model.dtype))))
    return num_parameters(model), found, words


def kv_bytes(name: str, arguments: argparse.Namespace, dtype: Any, drafts: bool) -> int | None:
    """Bytes of keys and values that a token takes, by the model's configuration; None where that does not tell.

    Raises `UnsupportedModelError` when a target's heads do not fit `--kv-cache`; a draft goes without.
    """
    import torch
    from transformers import AutoConfig

    from specdec.errors import UnsupportedModelError
    from specdec.quant.kv import bytes_per_token

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError):  # a head, or a kind of model that transformers does not know
        return None
    computed = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None) or torch.float32
    try:
        return bytes_per_token(config, computed, arguments.kv_cache)
    except UnsupportedModelError as error:
        if drafts:
            return bytes_per_token(config, computed)
        raise UnsupportedModelError(f"{name}: {error}") from error


def describe_model(name: str, trust_remote_code: bool) -> dict[str, Any]:
    """A folder is read; a hub id is loaded."""
    if Path(name).is_dir():
        return describe_folder(Path(name))
    from specdec.loading import load_model
    from specdec.quant.linear import num_weight_bytes

    model = load_model(name, device="cpu", dtype="auto", trust_remote_code=trust_remote_code)
    config = model.config.get_text_config(decoder=True)
    parameters, formats, words = formats_of(model)
    return {
        "parameters": parameters,
        "bytes": num_weight_bytes(model),
        "stored_as": words,
        "formats": formats,
        "architecture": type(model).__name__,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": getattr(config, "max_position_embeddings", None),
    }


def plugins() -> dict[str, dict[str, dict[str, str]]]:
    """Kind to name to `{class, package, version}`; nothing is imported."""
    from specdec import registry

    found: dict[str, dict[str, dict[str, str]]] = {}
    for kind in registry.GROUPS:
        found[kind] = {}
        for name, point in registry.available(kind).items():
            package = point.dist.name if point.dist else "?"
            release = point.dist.version if point.dist else "?"
            found[kind][name] = {"class": point.value, "package": package, "version": release}
    return found


def gather(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from specdec import registry
    from specdec.loading import EMBEDDED, choose_dtype, default_device
    from specdec.quant.kv import kv_format

    kv_format(arguments.kv_cache)
    if arguments.threads is not None:
        torch.set_num_threads(max(1, arguments.threads))
    device = options.checked_device(arguments.device) or default_device()
    dtype = choose_dtype(arguments.dtype, device)
    models: dict[str, Any] = {}
    for part in ("target", "draft"):
        folder = EMBEDDED / part
        found = describe_folder(folder) if folder.is_dir() else None
        if found is not None:
            found["kv_bytes_per_token"] = kv_bytes(str(folder), arguments, dtype, part == "draft")
        models[f"embedded {part}"] = found
    if arguments.target is not None:
        models[arguments.target] = describe_model(arguments.target, arguments.trust_remote_code)
        models[arguments.target]["kv_bytes_per_token"] = kv_bytes(arguments.target, arguments, dtype, drafts=False)
    drafter = arguments.drafter
    if drafter is not None and (Path(drafter).is_dir() or "/" in drafter):
        models[drafter] = describe_model(drafter, arguments.trust_remote_code)
        models[drafter]["kv_bytes_per_token"] = kv_bytes(drafter, arguments, dtype, drafts=True)
    elif drafter is not None:
        registry.find("drafter", drafter)
    return {
        "versions": screen.versions(),
        "device": screen.device_name(device),
        "dtype": dtype if isinstance(dtype, str) else dtype_name(dtype),
        "kv_cache": arguments.kv_cache,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "models": models,
        "plugins": plugins(),
    }


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    out, _ = screen.consoles()
    versions = "  ".join(f"[bold]{name}[/] {number}" for name, number in found["versions"].items())
    dtype = "the checkpoint's" if found["dtype"] == "auto" else found["dtype"]
    out.print(f"\n{versions}")
    out.print(
        f"[bold]device[/] {found['device']}  [bold]dtype[/] {dtype}  "
        f"[bold]keys and values[/] {found['kv_cache'] or 'as computed'}  "
        f"[bold]threads[/] {found['threads']} of {found['cores']} cores\n"
    )
    models = Table(title="Models", title_justify="left", box=None, pad_edge=False, header_style="dim")
    models.add_column("")
    for head in ("parameters", "on disk", "layers", "width", "vocabulary", "context", "KV/token"):
        models.add_column(head, justify="right")
    for name, model in found["models"].items():
        if model is None:
            models.add_row(name, "not installed", style="dim")
            continue
        shape = [str(model[key] if model[key] is not None else "-") for key in ("layers", "width", "vocabulary")]
        size = f"{screen.size(model['bytes'])} {model['stored_as']}"
        kv = model["kv_bytes_per_token"]
        rest = [str(model["context"] or "-"), f"{kv} B" if kv is not None else "-"]
        models.add_row(screen.model_name(name), screen.count(model["parameters"]), size, *shape, *rest)
    out.print(models)
    for name, model in found["models"].items():
        for format, entry in (model or {}).get("formats", {}).items():
            out.print(
                f"  {screen.model_name(name)}: {entry['layers']} layers as [bold]{format}[/], "
                f"{screen.size(entry['bytes'])}, {entry['bits_per_weight']:.2f} bits per weight"
            )
    table = Table(title="\nPlugins", title_justify="left", box=None, pad_edge=False, header_style="dim")
    for head in ("kind", "name", "package", "class"):
        table.add_column(head)
    for kind, named in found["plugins"].items():
        for i, (name, plugin) in enumerate(named.items()):
            package = f"{plugin['package']} {plugin['version']}"
            table.add_row(kind if i == 0 else "", f"[bold]{name}[/]", package, f"[dim]{plugin['class']}[/]")
    out.print(table)
    out.print()


def run(arguments: argparse.Namespace) -> int:
    screen.check_writable(arguments.json)
    screen.quiet(arguments)
    found = gather(arguments)
    _show(found)
    screen.write_json(arguments.json, found)
    return 0
