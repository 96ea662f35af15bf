"""DFlash drafts on disk: the layout of z-lab and SpecForge, and that of the speculators library.

| | z-lab (`DFlashDraftModel`) | speculators (`speculators_model_type: dflash`) |
|---|---|---|
| shape of the layers | top level of `config.json` | `transformer_layer_config` |
| target's hidden states | `dflash_config.target_layer_ids`: outputs of layer i, which is hidden state i + 1 | \
`aux_hidden_state_layer_ids`: hidden state i |
| mask token | `dflash_config.mask_token_id` | `mask_token_id` |
| `block_size` | top level, or in `dflash_config` | top level |
| sliding layers | causal, unless `is_causal` says otherwise | causal, unless `sliding_window_non_causal` |

Weights have the same names in both. Ours is z-lab's, with the key that names the drafter, `layer_id_convention`, and a
tensor `mask_embedding` where the target has no token to spare for masked slots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config

from specdec.dtypes import dtype_name
from specdec.errors import InputError, UnsupportedModelError
from specdec.formats.files import describing, load_pickled, names_of, read_config, read_tensors
from specdec.loading import DRAFTER_KEY
from specdec.models.dflash import DFlashConfig, DFlashModel
from specdec.runtime.cache import layer_types

ARCHITECTURE = "DFlashDraftModel"
#: What a layer number of a file means: `transformers`' hidden state of that number, or the output of that layer.
CONVENTIONS = {"hidden_states": 0, "outputs": 1}
_CONVENTION = "layer_id_convention"
#: Where our own files name the target.
VERIFIER = "verifier"
_LAYER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
# What describes the layers, and not the file that they lie in.
_QWEN3_FIELDS = (set(Qwen3Config().to_dict()) | {"rope_theta", "rope_scaling"}) - {
    "architectures",
    "dtype",
    "transformers_version",
}
# Of the target; some files carry copies. `verifier_*` is for training only.
_OF_THE_TARGET = ("embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight", "t2d")
_LIMIT = 1 << 24


def is_speculators(config: Mapping[str, Any]) -> bool:
    return config.get("speculators_model_type") == "dflash"


def is_dflash(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` describes a DFlash draft, in either layout."""
    return is_speculators(config) or (
        ARCHITECTURE in names_of(config) and isinstance(config.get("dflash_config"), Mapping)
    )


def is_own(folder: Path) -> bool:
    """Whether `specdec train` wrote the folder: then its layer numbers need no guessing."""
    return DRAFTER_KEY in read_config(folder)


def _whole(value: Any, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LIMIT:
        raise UnsupportedModelError(f"config.json: {name} is a whole number from {least}, not {value!r}")
    return value


def _layers(fields: Mapping[str, Any]) -> Qwen3Config:
    """The shape of the draft's layers; fields that are missing are no longer guessed by `transformers`."""
    if fields.get("model_type", "qwen3") != "qwen3":
        raise UnsupportedModelError(
            f"the draft's layers are of type {fields['model_type']!r}; DFlash drafts with qwen3 layers can be read"
        )
    for name in _LAYER_FIELDS:
        if name != "head_dim" or fields.get(name) is not None:
            _whole(fields.get(name), name)
    known = {name: value for name, value in fields.items() if name in _QWEN3_FIELDS}
    if known.get("head_dim") is None:
        known["head_dim"] = known["hidden_size"] // known["num_attention_heads"]
    if known["num_attention_heads"] % known["num_key_value_heads"] or known["head_dim"] % 2:
        raise UnsupportedModelError("config.json: heads come in equal groups by key/value head, of an even head_dim")
    try:
        made = Qwen3Config(**known)
        kinds = layer_types(made)
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"config.json describes no qwen3 layers: {error}") from error
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other or len(kinds) != made.num_hidden_layers:
        raise UnsupportedModelError(f"config.json: layer types {', '.join(other) or len(kinds)} do not fit the layers")
    return made


def _layer_ids(ids: Any, name: str, shift: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and abs(i) < _LIMIT for i in ids):
        raise UnsupportedModelError(f"config.json: {name} is a list of layer numbers, not {ids!r}")
    return tuple(i + shift for i in ids)


def parse(config: Mapping[str, Any], convention: str | None = None) -> tuple[DFlashConfig, str]:
    """What `config.json` says, and the convention of its layer numbers; `convention` overrules what it says.

    Raises `UnsupportedModelError` for other kinds of drafts, and for numbers that make no sense.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise InputError(f"layer_ids is one of {', '.join(CONVENTIONS)}, not {convention!r}")
    return _parse_speculators(config, convention) if is_speculators(config) else _parse_z_lab(config, convention)


def _refuse_projector(projector: Any) -> None:
    if projector not in (None, "dflash"):
        raise UnsupportedModelError(
            f"the draft has a {projector!r} projector, which corrects its tokens one by one; plain DFlash can be read"
        )


def _parse_speculators(config: Mapping[str, Any], convention: str | None) -> tuple[DFlashConfig, str]:
    fields = config.get("transformer_layer_config")
    if not isinstance(fields, Mapping):
        raise UnsupportedModelError("config.json has no transformer_layer_config")
    _refuse_projector(config.get("projector_type"))
    layers = _layers(fields)
    convention = convention or "hidden_states"
    sizes = config.get("draft_vocab_size"), fields.get("vocab_size")
    mask = config.get("mask_token_id")
    sliding = [kind == "sliding_attention" for kind in layer_types(layers)]
    return DFlashConfig(
        layers,
        _whole(config.get("block_size"), "block_size", 2),
        _layer_ids(config.get("aux_hidden_state_layer_ids"), "aux_hidden_state_layer_ids", CONVENTIONS[convention]),
        None if mask is None else _whole(mask, "mask_token_id", 0),
        bool(config.get("sample_from_anchor", False)),
        tuple(on and not config.get("sliding_window_non_causal", False) for on in sliding),
        None if sizes[0] in (None, sizes[1]) else _whole(sizes[0], "draft_vocab_size"),
    ), convention


def _parse_z_lab(config: Mapping[str, Any], convention: str | None) -> tuple[DFlashConfig, str]:
    own = config.get("dflash_config")
    if not isinstance(own, Mapping):
        raise UnsupportedModelError("config.json has no dflash_config: this is no DFlash draft")
    _refuse_projector(own.get("projector_type"))
    layers = _layers(config)

    def value(name: str, otherwise: Any = None) -> Any:
        return own.get(name, config.get(name, otherwise))

    convention = convention or own.get(_CONVENTION) or "outputs"
    if convention not in CONVENTIONS:
        raise UnsupportedModelError(f"config.json: {_CONVENTION} is one of {', '.join(CONVENTIONS)}")
    mask, count = value("mask_token_id"), config.get("num_target_layers")
    causal = config.get("is_causal")
    return DFlashConfig(
        layers,
        _whole(value("block_size"), "block_size", 2),
        _layer_ids(value("target_layer_ids"), "target_layer_ids", CONVENTIONS[convention]),
        None if mask is None else _whole(mask, "mask_token_id", 0),
        bool(value("sample_from_anchor", False)),
        tuple(kind == "sliding_attention" if causal is None else bool(causal) for kind in layer_types(layers)),
        embedding_scale=float(value("input_embedding_scale", 1.0)),
        output_multiplier=float(value("output_multiplier", 1.0)),
        softcap=float(value("final_logit_softcapping") or 0.0),
        num_target_layers=None if count is None else _whole(count, "num_target_layers"),
    ), convention


def read(folder: Path, convention: str | None = None) -> tuple[DFlashModel, str]:
    """The draft in a folder, in float32 or as stored, and the convention of its layer numbers.

    Every tensor's shape is checked against the configuration before it is used. A tensor `mask_embedding` (also as
    `mask_embedding.pt` beside the weights) stands in masked slots, whatever token is named. Raises
    `UnsupportedModelError` for missing, unknown or misshapen tensors.
    """
    raw = read_config(folder)
    if not is_dflash(raw):
        raise UnsupportedModelError(f"{folder} holds no DFlash draft: its config.json is of another kind")
    with describing("DFlash draft"):
        config, convention = parse(raw, convention)
    tensors = read_tensors(folder)
    aside = folder / "mask_embedding.pt"
    if aside.is_file():
        tensors["mask_embedding"] = _only_tensor(aside)
    return build(config, tensors), convention


def _only_tensor(path: Path) -> Tensor:
    found = load_pickled(path)
    if isinstance(found, Mapping) and len(found) == 1:
        found = next(iter(found.values()))
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"{path} is not one tensor")
    return found.reshape(-1)


def build(config: DFlashConfig, tensors: dict[str, Tensor]) -> DFlashModel:
    """A model of this shape that holds these tensors."""
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _OF_THE_TARGET}
    if "mask_embedding" in tensors:
        config = replace(config, mask_token_id=None)
    elif config.mask_token_id is None:
        raise UnsupportedModelError("the draft names no mask_token_id and has no tensor mask_embedding")
    if config.draft_vocab_size is None:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in ("lm_head.weight", "d2t")}
    with describing("DFlash draft"), torch.device("meta"):
        model = DFlashModel(config)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for what, names in (("lack", wanted.keys() - tensors.keys()), ("also hold", tensors.keys() - wanted.keys())):
        if names:
            raise UnsupportedModelError(
                f"the draft's files {what} {len(names)} tensors, for example {min(names)}: it is no plain DFlash draft"
            )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UnsupportedModelError(
                f"the draft's {name} has shape {list(tensors[name].shape)}, and its config.json says {list(shape)}"
            )
    model.load_state_dict(tensors, assign=True)
    return model


def _layer_config(config: DFlashConfig, vocab_size: int) -> dict[str, Any]:
    fields = config.layers.to_dict()
    for name in ("architectures", "dtype", "torch_dtype", "_name_or_path"):
        fields.pop(name, None)
    return {**fields, "model_type": "qwen3", "vocab_size": vocab_size}


def _save(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write(
    folder: Path,
    model: DFlashModel,
    vocab_size: int,
    dtype: torch.dtype = torch.bfloat16,
    verifier: Mapping[str, Any] | None = None,
) -> None:
    """Write z-lab's layout, with the key that tells `specdec` which drafter reads it.

    `verifier`: `name_or_path` and `architectures` of the target, for `write_speculators` to repeat.
    """
    config = model.config
    if model.lm_head is not None:
        raise InputError("z-lab's layout has no place for a draft vocabulary; write the speculators layout")
    own: dict[str, Any] = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": [i - CONVENTIONS["outputs"] for i in config.layer_ids],
        _CONVENTION: "outputs",
    }
    extras = {
        "sample_from_anchor": config.sample_from_anchor,
        "input_embedding_scale": config.embedding_scale,
        "output_multiplier": config.output_multiplier,
        "final_logit_softcapping": config.softcap,
    }
    plain = {"input_embedding_scale": 1.0, "output_multiplier": 1.0}
    own.update({name: value for name, value in extras.items() if value and value != plain.get(name)})
    head: dict[str, Any] = {DRAFTER_KEY: "parallel", "architectures": [ARCHITECTURE]}
    if verifier is not None:
        head[VERIFIER] = dict(verifier)
    if config.num_target_layers is not None:
        head["num_target_layers"] = config.num_target_layers
    if any(config.causal) or not set(layer_types(config.layers)) <= {"full_attention"}:
        if len(set(config.causal)) > 1:
            raise InputError("z-lab's layout says of all layers at once whether they are causal")
        head["is_causal"] = any(config.causal)
    fields = _layer_config(config, vocab_size)
    stored = {**fields, **head, "dtype": dtype_name(dtype)}
    _save(folder, {**stored, "block_size": config.block_size, "dflash_config": own}, model.state_dict(), dtype)


def write_speculators(
    folder: Path, model: DFlashModel, vocab_size: int, verifier: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Write the layout of the speculators library. `verifier`: `name_or_path` and `architectures` of the target.

    Raises `InputError` where that layout has no place for what the draft has.
    """
    config = model.config
    if config.mask_token_id is None:
        raise InputError(
            "the speculators layout has no place for a mask embedding of the draft's own; train with --mask-token ID, "
            "the id of a token that texts do not hold"
        )
    if (config.embedding_scale, config.output_multiplier, config.softcap) != (1.0, 1.0, 0.0):
        raise InputError("the speculators layout has no place for scaled embeddings or capped logits")
    sliding = [kind == "sliding_attention" for kind in layer_types(config.layers)]
    causal = list(config.causal) or [False] * len(sliding)
    if causal not in (sliding, [False] * len(sliding)):
        raise InputError("in the speculators layout, sliding layers are causal, all or none, and no others")
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": config.num_positions,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    content = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_version": "0.3.0",
        "transformer_layer_config": _layer_config(config, vocab_size),
        "draft_vocab_size": config.draft_vocab_size or vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [i - CONVENTIONS["hidden_states"] for i in config.layer_ids],
        "mask_token_id": config.mask_token_id,
        "sample_from_anchor": config.sample_from_anchor,
        "sliding_window_non_causal": not any(causal),
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": dict(verifier),
        },
        "dtype": dtype_name(dtype),
    }
    _save(folder, content, model.state_dict(), dtype)
