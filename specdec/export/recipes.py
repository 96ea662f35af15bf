"""Recipes of ExecuTorch artefacts: weights in fewer bits for XNNPACK, whose products then round activations to int8.

A recipe says which linear layer gets how many bits, and by which method its values are chosen; both are those of
`specdec.quant`. What the graphs hold are the same codes and scales, in torchao's form, which XNNPACK's partitioner
knows. Each row of activations is rounded by a scale of its own, so that no row depends on the rows beside it.

Shape suffixes: B rows of text, T tokens, N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.export.exporter import Stored
from specdec.quant.bits import unpack_bits
from specdec.quant.format import Format, Parts
from specdec.quant.layers import candidates
from specdec.quant.linear import PackedLinear
from specdec.quant.methods import create, prepare_model
from specdec.quant.recipe import Recipe

#: Positive scales of groups, which XNNPACK's kernels want, and rows rounded as they round them.
_W4 = "int4-pos-a8"
_W8 = "int8"
# Errors of the first layers pass through all others.
_EARLY = r"(^|\.)(layers|h|blocks?)\.[01]\."
_BODIES: dict[str, dict[str, Any]] = {
    "int8": {"default": _W8},
    "w4a8": {"default": _W4},
    "w4a8-head8": {"default": _W4, "head": _W8},
    "w4a8-early8": {"default": _W4, "head": _W8, "rules": [[_EARLY, _W8]], "optional": True},
}
#: Methods that look at activations on a calibration text, behind the name of a recipe: w4a8-head8-gptq.
_METHODS = {"int8": ("smoothquant",), "w4a8": ("awq", "gptq"), "w4a8-head8": ("awq", "gptq")}
#: What others call them.
ALIASES = {"w8a8": "int8", "8da8w": "int8", "8da4w": "w4a8", "int4": "w4a8"}
NAMES = tuple(f"{body}{end}" for body in _BODIES for end in ("", *(f"-{m}" for m in _METHODS.get(body, ()))))

#: Told of steps done, steps in all, and what comes next.
Told = Callable[[int, int, str], None]


def canonical(recipe: str) -> str:
    """The name of a recipe, whichever of its names is given; of a recipe of one's own its JSON, in one line.

    Such a one is a file, or the text itself: {"default": "int4", "head": "int8", "rules": [["down_proj", "int8"]]}.
    Raises `InputError` for what is neither, with the names that there are.
    """
    given = recipe.strip()
    if given.startswith("{") or given.endswith(".json"):
        return _own(given)
    name = ALIASES.get(given.lower(), given.lower())
    if name in NAMES:
        return name
    near = difflib.get_close_matches(name, [*NAMES, *ALIASES], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if re.fullmatch(r"w\d+a16(-.*)?", name):
        hint = ": beside weights of few bits XNNPACK rounds activations to 8, not 16; take w4a8 or int8"
    raise InputError(
        f"no recipe of the executorch backend is called {recipe!r}{hint}. There are {', '.join(NAMES)}, or a JSON file "
        'such as {"default": "int4", "head": "int8"}'
    )


def _own(given: str) -> str:
    if given.startswith("{"):
        try:
            content = json.loads(given)
        except ValueError as error:
            raise InputError(f"the recipe {given[:40]!r}… is not JSON: {error}") from error
        recipe = Recipe.of(content)
    else:
        recipe = Recipe.of(Path(given))
    recipe = _for_xnnpack(recipe)
    create(recipe.method, recipe.options)
    return json.dumps({**recipe.to_dict(), "name": ""}, sort_keys=True)


def _for_xnnpack(recipe: Recipe) -> Recipe:
    """The same with formats that the delegate has: int8, and int4 in groups, for which int4-pos-a8 is meant."""

    def known(format: str | None) -> str | None:
        if format is None or format in ("int8", "default"):
            return format
        options = set(format.split("-")[1:]) - {"pos", "a8"}
        if not format.startswith("int4") or not options <= {"g64", "g128"}:
            raise InputError(
                f"XNNPACK has no {format} weights; a recipe for it is made of int8, int4, int4-g64 and int4-g128"
            )
        return "-".join(("int4", *sorted(options), "pos", "a8"))

    fallback = recipe.fallback if recipe.fallback in ("error", "keep") else known(recipe.fallback)
    return replace(
        recipe,
        default=known(recipe.default),
        head=known(recipe.head),
        rules=tuple((pattern, known(format)) for pattern, format in recipe.rules),
        fallback=fallback or "error",
    )


def recipe_of(name: str) -> Recipe:
    """What a canonical name, or the JSON of a recipe of one's own, stands for."""
    if name.startswith("{"):
        return Recipe.of(json.loads(name))
    body = max((body for body in _BODIES if name == body or name.startswith(f"{body}-")), key=len)
    method = name[len(body) + 1 :] or "rtn"
    return Recipe.from_dict({**_BODIES[body], "method": method, "name": name})


def needs_text(name: str) -> bool:
    """Whether the recipe's method looks at activations on a calibration text."""
    recipe = recipe_of(name)
    return bool(create(recipe.method, recipe.options).needs)


def quantise(model: Any, name: str, calibration_BT: Tensor | None = None, told: Told | None = None) -> Stored:
    """A copy of a float32 model by a recipe's canonical name. It shares all other tensors with the model.

    The same text, recipe and model give the same codes; `facts["sha256"]` tells.
    Raises `InputError` for layers whose shape does not fit, and where the method needs text and there is none.
    Lossless: no, weights and activations are rounded; plain and speculative decoding see the same rounding.
    """
    recipe = recipe_of(name)
    if not needs_text(name):
        calibration_BT = None
    found = candidates(model)
    packed = prepare_model(model, recipe, calibration_BT, progress=told)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    facts: dict[str, Any] = {
        "recipe": {**recipe.to_dict(), "name": recipe.name},
        "layers": _counted({name: layer.format for name, layer in layers.items()}),
        "left": sorted(set(found.shapes) - set(layers)),
        "notes": list(packed.quantisation_notes),
        "calibration": None if calibration_BT is None else digest_of([calibration_BT]),
        "sha256": digest_of([*_stored(layers), *packed.parameters()]),
    }
    num_bytes = sum(layer.num_bytes for layer in layers.values()) + sum(p.nbytes for p in packed.parameters())
    for name, layer in layers.items():
        packed.set_submodule(name, in_torchao(layer))
    return Stored(packed, facts, num_bytes)


def _counted(formats: Mapping[str, Format]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for format in formats.values():
        name = format.name.removesuffix("-a8").replace("-pos", "")
        counts[name] = counts.get(name, 0) + 1
    return counts


def _stored(layers: Mapping[str, PackedLinear]) -> list[Tensor]:
    return [layers[name].parts[part] for name in sorted(layers) for part in sorted(layers[name].parts)]


def digest_of(tensors: list[Any]) -> str:
    """SHA-256 of what tensors hold, in this order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _whole(format: Format, parts: Parts) -> tuple[Tensor, Tensor]:
    """Codes int8 `[N, K]` around zero and scales float32 `[N, G]`: their product is the weight."""
    codes = parts["codes"]
    if format.name == _W8:
        return codes, parts["scales"][:, None].contiguous()
    return unpack_bits(codes, 4, codes.shape[1] * 2).to(torch.int8) - 8, parts["scales"].float()


def in_torchao(layer: PackedLinear) -> nn.Linear:
    """The same codes and scales as a linear layer that torchao rounds activations for, each row by itself.

    Raises `InputError` where torchao is not installed.
    """
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
    except ImportError as error:
        raise InputError("recipes need the package torchao: pip install 'specdec[executorch]'") from error
    codes_NK, scales_NG = _whole(layer.format, layer.parts)
    bits = torch.int8 if layer.format.name == _W8 else getattr(torch, "int4")  # noqa: B009 - newer than torch's stubs
    zeros = torch.zeros(scales_NG.shape, dtype=torch.int8)
    group = (1, codes_NK.shape[1] // scales_NG.shape[1])
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = IntxUnpackedToInt8Tensor(
        codes_NK, scales_NG, zeros, bits, group, torch.float32, "int8_asym_per_token"
    )  # fmt: skip
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias, requires_grad=False)
    return made


def unwrap(module: nn.Module) -> None:
    """Weights of torchao's kind become plain tensors and the operators on them, in place: what an export traces."""
    from torchao.utils import unwrap_tensor_subclass

    unwrap_tensor_subclass(module)
