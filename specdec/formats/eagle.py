"""Layouts of EAGLE heads: our own, the original EAGLE-1 and -3 (SpecForge's and ModelOpt's too), and `speculators`.

All name the same tensors; what differs is the configuration, and `midlayer.` for `layers.0.`. A layer id of EAGLE-3
names the input of that layer in all of them, `hidden_states[id]`; where a publisher means the output, say so
(`hidden_convention="output"`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from specdec.dtypes import dtype_name
from specdec.errors import InputError, UnsupportedModelError
from specdec.formats.files import describing, load_pickled, names_of, read_config, read_tensors
from specdec.loading import DRAFTER_KEY
from specdec.models.eagle import LAYERS, EagleConfig, EagleModel
from specdec.models.eagle_build import own_tensors

SPECULATORS = "speculators"
_WEIGHTS, _PICKLED = "model.safetensors", "pytorch_model.bin"
# Of the decoder layer: what an original configuration, or the nested one of speculators, says about it.
_LAYER_FIELDS = (
    "attention_bias", "head_dim", "hidden_act", "hidden_size", "intermediate_size", "layer_types",
    "max_position_embeddings", "mlp_bias", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "rms_norm_eps", "rope_parameters", "sliding_window", "vocab_size",
)  # fmt: skip
_FLAGS = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")
# ModelOpt's switches and the only values for which its head is the published one.
_EXPECTED = {
    "use_aux_hidden_state": True, "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True,
    "use_mtp_layernorm": False, "next_layer_regular": True, "parallel_draft_step": 1,
}  # fmt: skip
# Tensors that say nothing new: a mask that follows from d2t, a copy of the target's head, rotary frequencies.
_REDUNDANT = ("t2d", "verifier_lm_head.weight")


class Checkpoint(NamedTuple):
    config: EagleConfig
    tensors: dict[str, Tensor]


def layout_of(config: Mapping[str, Any], folder: Path) -> str | None:
    """ "specdec", "speculators" or "original", or None for a folder that holds no EAGLE head."""
    if config.get(DRAFTER_KEY) == "eagle":
        return "specdec"
    if "speculators_model_type" in config:
        return SPECULATORS if config["speculators_model_type"] == "eagle3" else None
    names = " ".join(names_of(config))
    if any(other in names for other in ("DFlash", "DSpark", "Domino", "PEagle")):
        return None
    if "Eagle" in names or "eagle_config" in config or "draft_vocab_size" in config:
        return "original"
    # An EAGLE-1 head calls itself a Llama; what it holds tells.
    few = isinstance(config.get("num_hidden_layers"), int) and config["num_hidden_layers"] <= 4
    shape = _shape_in(folder, "fc.weight") if few and config.get("model_type") in list(LAYERS) else None
    return "original" if shape is not None and len(shape) == 2 and shape[1] == 2 * shape[0] else None


def _shape_in(folder: Path, name: str) -> list[int] | None:
    """The shape of one tensor of a folder, without reading it where the file allows; None where there is none."""
    try:
        if (folder / _WEIGHTS).is_file():
            with safe_open(folder / _WEIGHTS, "pt") as file:
                return list(file.get_slice(name).get_shape()) if name in file.keys() else None  # noqa: SIM118
        if (folder / _PICKLED).is_file():
            content = load_pickled(folder / _PICKLED, "meta")
            found = content.get(name) if isinstance(content, Mapping) else None
            return list(found.shape) if isinstance(found, Tensor) else None
    except (OSError, RuntimeError, SafetensorError, UnsupportedModelError):
        return None
    return None


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, under the names of our model."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(folder).items():
        short = name.removeprefix("model.")
        tensors["layers.0." + short.removeprefix("midlayer.") if short.startswith("midlayer.") else short] = tensor
    return tensors


def _check_map(tensors: dict[str, Tensor]) -> None:
    """d2t as int64 offsets; `InputError` where t2d shows that it holds something else."""
    if "d2t" not in tensors:
        return
    d2t = tensors["d2t"]
    if d2t.ndim != 1 or d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise InputError(f"d2t holds one whole number for each draft token, not {d2t.dtype} {list(d2t.shape)}")
    d2t = tensors["d2t"] = d2t.to(torch.int64)
    mask = tensors.get("t2d")
    if mask is None:
        return
    named = mask.bool().nonzero()[:, 0]
    ids = torch.arange(len(d2t)) + d2t
    if torch.equal(ids.sort().values, named):
        return
    absolute = torch.equal(d2t.sort().values, named)
    raise InputError(
        "d2t and t2d contradict each other: "
        + (
            "d2t holds target ids, where offsets are meant; subtract 0, 1, 2, … from it"
            if absolute
            else f"t2d marks {len(named)} tokens, and d2t leads to others"
        )
    )


def read(folder: str | Path) -> Checkpoint:
    """The head in a folder of any layout. Raises `InputError` or `UnsupportedModelError`, which say what is wrong."""
    folder = Path(folder)
    given = read_config(folder)
    layout = layout_of(given, folder)
    if layout is None:
        kind = given.get("speculators_model_type")
        reason = f"it is a {kind!r} speculator" if kind else "its config.json is not that of one"
        raise UnsupportedModelError(f"{folder} holds no EAGLE head: {reason}")
    tensors = _tensors(folder)
    _check_map(tensors)
    tensors = {n: t for n, t in tensors.items() if n not in _REDUNDANT and not n.endswith("rotary_emb.inv_freq")}
    if layout == "specdec":
        del given[DRAFTER_KEY]
    with describing("EAGLE head"):
        config = EagleConfig.from_dict(given) if layout == "specdec" else _published_config(given, tensors, layout)
    return Checkpoint(config, tensors)


def _published_config(given: Mapping[str, Any], tensors: Mapping[str, Tensor], layout: str) -> EagleConfig:
    nested = given.get("eagle_config") or {}
    for field, expected in _EXPECTED.items():
        if nested.get(field, expected) != expected:
            raise UnsupportedModelError(f"heads with {field} = {nested[field]!r} are not supported, only {expected!r}")
    outer = {
        **given,
        **{name: nested[name] for name in (*_FLAGS, "eagle_aux_hidden_state_layer_ids") if name in nested},
    }
    layer = given.get("transformer_layer_config") or {} if layout == SPECULATORS else given
    kind = layer.get("model_type", "llama")
    if kind not in list(LAYERS):
        raise UnsupportedModelError(
            f"EAGLE heads with layers of type {kind!r} are not supported, only {sorted(LAYERS)}"
        )
    whole = AutoConfig.for_model(kind, **{k: v for k, v in layer.items() if k not in ("model_type", "dtype")}).to_dict()
    fields = {name: whole[name] for name in _LAYER_FIELDS if whole.get(name) is not None}
    if "layer_types" in fields:
        fields["layer_types"] = list(fields["layer_types"])[: fields["num_hidden_layers"]]
    fields["sliding_window"] = fields.get("sliding_window") if _slides(fields) else None
    version = 3 if any(name.endswith("layers.0.hidden_norm.weight") for name in tensors) else 1
    if version == 1 and (layout == SPECULATORS or "d2t" in tensors):
        raise InputError("the EAGLE-3 head's files lack layers.0.hidden_norm.weight: the download is incomplete")
    ids = outer.get("eagle_aux_hidden_state_layer_ids")
    return EagleConfig(
        **fields,
        eagle_version=version,
        layer_kind=kind,
        draft_vocab_size=outer.get("draft_vocab_size") if version == 3 else None,
        target_hidden_size=outer.get("target_hidden_size"),
        target_layer_ids=None if ids is None else [int(i) for i in ids],
        norm_before_residual=bool(outer.get("norm_before_residual")),
        norm_output=bool(outer.get("norm_output")),
        norm_before_fc=bool(outer.get("norm_before_fc")) or "input_norm.weight" in tensors,
        fc_norm=bool(outer.get("fc_norm")) or "fc_norm.0.weight" in tensors,
        fc_bias="fc.bias" in tensors,
        own_embeddings="embed_tokens.weight" in tensors,
        own_head="lm_head.weight" in tensors or version == 3,
        bos_token_id=None,
        eos_token_id=None,
    )


def _slides(fields: Mapping[str, Any]) -> bool:
    return "sliding_attention" in (fields.get("layer_types") or ())


def write_own(folder: Path, head: EagleModel, dtype: torch.dtype = torch.bfloat16) -> None:
    """`config.json` and `model.safetensors` that `read` reads; weights in `dtype`, what the target has left out."""
    config = {**head.config.to_dict(), DRAFTER_KEY: "eagle", "architectures": ["EagleModel"]}
    # Whoever looks for a tokenizer beside it would ask transformers for a model type that it does not know.
    for name in ("_name_or_path", "dtype", "model_type"):
        config.pop(name, None)
    tensors = {n: t.detach().cpu() for n, t in own_tensors(head).items()}
    _write(folder, config, {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()})


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    text = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / _WEIGHTS, metadata={"format": "pt"})


def export(found: Checkpoint, out: Path, head_VH: Tensor | None = None, verifier: str | None = None) -> None:
    """An EAGLE-3 head in the speculators layout; what is written is read back and compared.

    `head_VH`: the target's output table, for a head that has none of its own. `verifier`: the target's name, for the
    record that the layout wants.
    """
    config, tensors = found.config, dict(found.tensors)
    if config.eagle_version != 3:
        raise InputError("the speculators layout has EAGLE-3 heads only, and this is an EAGLE-1 head")
    count = int(config.draft_vocab_size or 0)
    d2t = tensors.setdefault("d2t", torch.zeros(count, dtype=torch.int64))
    ids_R = torch.arange(count) + d2t
    if "lm_head.weight" not in tensors:
        if head_VH is None:
            raise InputError("the head predicts with its target's own head: the export needs that table")
        tensors["lm_head.weight"] = head_VH[ids_R].to(tensors["fc.weight"].dtype)
    dtype = dtype_name(tensors["fc.weight"].dtype)
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, ids_R, True)
    layer = {name: getattr(config, name, None) for name in _LAYER_FIELDS}
    method = {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    _write(
        out,
        {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [method],
                "verifier": {"name_or_path": verifier, "architectures": []},
            },
            "transformer_layer_config": {
                "model_type": config.layer_kind,
                **{name: value for name, value in layer.items() if value is not None},
            },
            "draft_vocab_size": config.draft_vocab_size,
            "target_hidden_size": config.target_hidden_size,
            "eagle_aux_hidden_state_layer_ids": None if config.target_layer_ids is None else list(config.hidden),
            "tie_word_embeddings": False,
            "dtype": dtype,
            **{name: getattr(config, name) for name in _FLAGS},
        },
        tensors,
    )
    again = read(out)
    kept = {name: tensor for name, tensor in tensors.items() if name != "t2d"}
    same = kept.keys() == again.tensors.keys() and all(torch.equal(kept[n], again.tensors[n]) for n in kept)
    if not same:
        raise InputError(f"{out}: what was written reads back as another head")
