"""How Medusa heads lie on disk, told apart by the names of their tensors.

| layout | file | tensors |
|---|---|---|
| own | `model.safetensors` | `blocks.K.L.weight/bias`, `projections.K.weight`, `d2t_absolute` |
| original (also TGI) | `medusa_lm_head.pt`, `.safetensors` | `K.L.linear.weight/bias`, `K.N.weight` after N blocks |
| original, in a model | the model's own files | the same behind `medusa_head.` |
| vLLM | `model.safetensors` | `blocks.K.layers.L.weight/bias`, `lm_heads.K.weight` or `lm_head.weight`, `token_map` |

K head, L block. The number of heads and blocks is that of the tensors: published configurations of the original layout
say 2 heads beside files with 5. Pickled files are read with `weights_only=True`, which runs no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.dtypes import dtype_name
from specdec.errors import InputError, UnsupportedModelError
from specdec.formats.files import load_pickled, names_of, read_config
from specdec.formats.medusa_heads import HeadShape, MedusaHeads, output_rows
from specdec.loading import DRAFTER_KEY, EMBEDDED, load_model
from specdec.policy import MAX_DEPTH

NAME = "medusa"
EMBEDDED_TARGET = "the embedded target"
_HEAD_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
_WEIGHT_FILES = ("model*.safetensors", "pytorch_model*.bin")
_PREFIX = re.compile(r"^medusa_heads?\.")
_ORIGINAL = re.compile(r"^(\d+)\.(\d+)\.(linear\.)?(weight|bias)$")
_BLOCK = re.compile(r"^blocks\.(\d+)\.(?:layers\.)?(\d+)\.(weight|bias)$")
_PROJECTION = re.compile(r"^(?:lm_heads|projections)\.(\d+)\.weight$")


def recognises(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder with this configuration holds Medusa heads in a layout of others."""
    architectures = names_of(config)
    named = "medusa_num_heads" in config or config.get("model_type") == "medusa" or "MedusaModel" in architectures
    return named or any((folder / name).is_file() for name in _HEAD_FILES)


# ---------------------------------------------------------------- reading


def _config(folder: Path) -> dict[str, Any]:
    return read_config(folder) if (folder / "config.json").is_file() else {}


def _files(folder: Path) -> list[Path]:
    for name in _HEAD_FILES:
        if (folder / name).is_file():
            return [folder / name]
    for pattern in _WEIGHT_FILES:
        if found := sorted(folder.glob(pattern)):
            return found
    raise UnsupportedModelError(
        f"{folder} has no Medusa heads: neither {' nor '.join(_HEAD_FILES)}, nor {' nor '.join(_WEIGHT_FILES)}"
    )


def _open(path: Path) -> tuple[list[str], Callable[[str], Tensor]]:
    """The names in a file, and how one is read: of a large model only the heads are."""
    try:
        if path.suffix == ".safetensors":
            # The handle lives as long as the function that reads from it.
            handle = safe_open(path, framework="pt")
            return list(handle.keys()), handle.get_tensor
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    weights = load_pickled(path, mmap=True)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UnsupportedModelError(f"{path} does not hold a dictionary of tensors")
    return list(weights), weights.__getitem__


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The heads' tensors by name, without the prefix that they have inside a whole model."""
    opened = [_open(path) for path in _files(folder)]
    inside_model = any(_PREFIX.match(name) for names, _ in opened for name in names)
    for names, read in opened:
        for name in names:
            if not inside_model or _PREFIX.match(name):
                yield _PREFIX.sub("", name), read(name)


@dataclass
class _Found:
    """The parts of heads under the names of no layout."""

    blocks: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    projections: dict[int, Tensor] = field(default_factory=dict)
    shared: bool = False
    d2t_absolute: Tensor | None = None
    named: Callable[[int, int, str], str] = lambda k, i, part: f"blocks.{k}.{i}.{part}"

    def take(self, name: str, tensor: Tensor) -> None:
        if match := _ORIGINAL.match(name):
            head, layer, linear, part = int(match[1]), int(match[2]), match[3], match[4]
            self.named = lambda k, i, part: f"{k}.{i}.linear.{part}"
            if linear:
                self.blocks.setdefault((head, layer), {})[part] = tensor
                return
            if part == "weight" and head not in self.projections:
                self.projections[head] = tensor
                return
        elif match := _BLOCK.match(name):
            if ".layers." in name:
                self.named = lambda k, i, part: f"blocks.{k}.layers.{i}.{part}"
            self.blocks.setdefault((int(match[1]), int(match[2])), {})[match[3]] = tensor
            return
        elif match := _PROJECTION.match(name):
            self.projections[int(match[1])] = tensor
            return
        elif name == "lm_head.weight":
            self.projections[0], self.shared = tensor, True
            return
        elif name in ("token_map", "d2t_absolute"):
            self.d2t_absolute = tensor.to(torch.int64)
            return
        raise UnsupportedModelError(f"the tensor {name!r} belongs to no layout of Medusa heads that is known here")


def _shape(found: _Found, config: Mapping[str, Any], own: bool) -> HeadShape:
    heads = 1 + max((head for head, _ in found.blocks), default=max(found.projections, default=-1))
    layers = 1 + max((layer for _, layer in found.blocks), default=-1)
    if not heads:
        raise UnsupportedModelError("the file has no Medusa heads")
    if max(heads, layers) > MAX_DEPTH:
        raise UnsupportedModelError(f"{heads} heads of {layers} blocks; at most {MAX_DEPTH} of each are read")
    projection = "own"
    if own and config.get("projection") in ("shared", "tied"):
        projection = str(config["projection"])
    elif found.shared or (config.get("original_lm_head") and found.projections.keys() == {0}):
        projection = "shared"
    weights = list(found.projections.values())
    map_size = None if found.d2t_absolute is None else len(found.d2t_absolute)
    sizes = weights[0].shape if weights else (map_size or int(config.get("vocab_size", 0)), 0)
    width = int(sizes[1]) if weights else int(config.get("hidden_size", 0))
    vocab_size = int(config.get("vocab_size", sizes[0])) if map_size is not None else int(sizes[0])
    if own:
        vocab_size = int(config["vocab_size"])
    bias = any("bias" in parts for parts in found.blocks.values())
    scale = float(config.get("logit_scale") or 1.0)
    return HeadShape(heads, layers, width, vocab_size, map_size or vocab_size, projection, bias, scale)


def _assemble(found: _Found, shape: HeadShape) -> dict[str, Tensor]:
    """The module's state, each tensor checked; `UnsupportedModelError` names the first that is missing or wrong."""
    width, state = shape.hidden_size, {}
    dtypes = {t.dtype for parts in found.blocks.values() for t in parts.values()}
    dtypes |= {weight.dtype for weight in found.projections.values()}
    if any(not dtype.is_floating_point or dtype.itemsize < 2 for dtype in dtypes):
        raise UnsupportedModelError(f"heads are stored as {', '.join(map(str, dtypes))}; only floating point is read")

    def put(key: str, name: str, tensor: Tensor | None, *size: int) -> None:
        if tensor is None:
            raise UnsupportedModelError(
                f"the heads lack the tensor {name!r} ({shape.num_heads} heads of {shape.num_layers} blocks are there "
                "otherwise): the file is incomplete; download it again"
            )
        if tensor.shape != size:
            raise UnsupportedModelError(f"the tensor {name!r} is {list(tensor.shape)} and should be {list(size)}")
        state[key] = tensor.contiguous()

    for head in range(shape.num_heads):
        for layer in range(shape.num_layers):
            parts = found.blocks.get((head, layer), {})
            name = found.named
            put(f"blocks.{head}.{layer}.weight", name(head, layer, "weight"), parts.get("weight"), width, width)
            if shape.bias:
                put(f"blocks.{head}.{layer}.bias", name(head, layer, "bias"), parts.get("bias"), width)
    for head in range({"own": shape.num_heads, "shared": 1, "tied": 0}[shape.projection]):
        weight = found.projections.get(head)
        if weight is not None and found.d2t_absolute is not None and len(weight) == shape.vocab_size:
            weight = weight[found.d2t_absolute]  # vLLM allows all rows beside a map
        put(f"projections.{head}.weight", f"projection of head {head}", weight, shape.draft_size, width)
    if found.d2t_absolute is not None:
        state["d2t_absolute"] = found.d2t_absolute
    return state


def read(folder: str | Path) -> MedusaHeads:
    """The heads that a folder holds, in any layout, on the CPU in the dtype in which they are stored.

    Tied ones still have to `borrow` the target's head. Raises `UnsupportedModelError` for files that lack tensors, have
    wrong ones, or cannot be read without running code, and `InputError` for configurations that do not fit them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; download the heads first, then name the folder that holds them")
    config = _config(folder)
    own = config.get(DRAFTER_KEY) == NAME
    if own and not {"vocab_size", "hidden_size"} <= config.keys():
        raise InputError(f"{folder}/config.json lacks vocab_size or hidden_size")
    found = _Found()
    for name, tensor in _tensors(folder):
        found.take(name, tensor)
    shape = _shape(found, config, own)
    if config.get("truncated_vocab_size", shape.draft_size) == shape.vocab_size and shape.draft_size < shape.vocab_size:
        # vLLM ignores a map beside a configuration that asks for the whole vocabulary.
        found.d2t_absolute, shape = None, replace(shape, draft_size=shape.vocab_size)
    state = _assemble(found, shape)
    heads = MedusaHeads(shape, found.d2t_absolute)
    floating = [tensor.dtype for tensor in state.values() if tensor.is_floating_point()]
    heads = heads.to(floating[0] if floating else torch.float32)
    heads.load_state_dict(state)
    return heads.requires_grad_(False).eval()


# ---------------------------------------------------------------- writing


def _write(folder: Path, file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    # Clones: safetensors refuses tensors that share memory, as tied rows of a target do.
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, folder / file)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(heads: MedusaHeads, folder: Path, base: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Our own layout. `base`: the target that the heads are for, for the reader and for exports of tied heads."""
    shape = heads.shape
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in heads.state_dict().items()}
    config = {
        DRAFTER_KEY: NAME,
        "num_heads": shape.num_heads,
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_size,
        "projection": shape.projection,
        "logit_scale": shape.logit_scale,
        "dtype": dtype_name(dtype),
        "base_model_name_or_path": base,
    }
    _write(folder, "model.safetensors", tensors, config)


def _projections(heads: MedusaHeads, base: str) -> list[Tensor]:
    """One `[R, H]` for each head or for all; those of tied heads come from the target."""
    if heads.shape.projection != "tied":
        return [p.weight for p in heads.projections.children()]  # type: ignore[misc]
    source = str(EMBEDDED / "target") if base == EMBEDDED_TARGET else base
    target = load_model(source, device="cpu", dtype="auto")
    weight, bias = output_rows(target, heads.d2t_absolute)
    if bias is not None:
        raise InputError("the target's output head has a bias, for which other layouts have no place; train own heads")
    return [weight]


def export(source: Path, folder: Path, layout: str) -> None:
    """Write heads in our own layout as `layout`: "original" (also read by TGI), or "vllm"; then read them back.

    Raises `InputError` for what the layout cannot say.
    """
    heads, base = read(source), str(_config(source).get("base_model_name_or_path", ""))
    shape = heads.shape
    if layout not in _EXPORTS:
        raise InputError(f"Medusa heads have no {layout!r} layout; there are: {', '.join(_EXPORTS)}")
    projections = [weight.to(heads_dtype(heads)) for weight in _projections(heads, base)]
    _EXPORTS[layout](heads, projections, base, folder)
    again = read(folder)
    states = torch.randn(3, shape.hidden_size, generator=torch.Generator().manual_seed(0)).to(heads_dtype(heads))
    for k in range(shape.num_heads):
        ours = heads.residual(k, states) @ projections[k if len(projections) > 1 else 0].T * shape.logit_scale
        if not torch.allclose(again(k, states), ours, rtol=1e-2, atol=1e-2):
            raise UnsupportedModelError(f"{folder} reads back as other heads than {source}: head {k} differs")


def heads_dtype(heads: MedusaHeads) -> torch.dtype:
    return next(heads.parameters()).dtype


def _export_original(heads: MedusaHeads, projections: list[Tensor], base: str, folder: Path) -> None:
    shape = heads.shape
    if heads.d2t_absolute is not None or shape.logit_scale != 1.0:
        raise InputError(
            "the original layout has no draft vocabulary and no scale of logits; export to 'vllm', or train with the "
            "whole vocabulary"
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in heads.blocks.state_dict().items():
        head, layer, part = name.split(".")
        tensors[f"{head}.{layer}.linear.{part}"] = tensor
        if not shape.bias:
            tensors[f"{head}.{layer}.linear.bias"] = tensor.new_zeros(shape.hidden_size)
    for k in range(shape.num_heads):
        tensors[f"{k}.{shape.num_layers}.weight"] = projections[k if len(projections) > 1 else 0]
    config = {
        "medusa_num_heads": shape.num_heads,
        "medusa_num_layers": shape.num_layers,
        "base_model_name_or_path": base,
    }
    _write(folder, "medusa_lm_head.safetensors", tensors, config)


def _export_vllm(heads: MedusaHeads, projections: list[Tensor], base: str, folder: Path) -> None:
    shape = heads.shape
    tensors: dict[str, Tensor] = {}
    for name, tensor in heads.blocks.state_dict().items():
        head, layer, part = name.split(".")
        tensors[f"blocks.{head}.layers.{layer}.{part}"] = tensor
    tensors.update({f"lm_heads.{k}.weight": weight for k, weight in enumerate(projections)})
    if heads.d2t_absolute is not None:
        tensors["token_map"] = heads.d2t_absolute
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "truncated_vocab_size": shape.draft_size,
        "num_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "medusa_fc_bias": shape.bias,
        "original_lm_head": heads.joint,
        "logit_scale": shape.logit_scale,
        "base_model_name_or_path": base,
    }
    _write(folder, "model.safetensors", tensors, config)


_EXPORTS: dict[str, Callable[[MedusaHeads, list[Tensor], str, Path], None]] = {
    "original": _export_original,
    "vllm": _export_vllm,
}
LAYOUTS = tuple(_EXPORTS)
