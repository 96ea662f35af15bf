"""Making an EAGLE head of its weights and its target, whose tables it may share. Shapes: see `specdec.models.eagle`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from specdec.errors import IncompatiblePairError, InputError, UnsupportedModelError
from specdec.formats.files import describing
from specdec.models.eagle import EagleConfig, EagleModel
from specdec.vocabulary import output_weight

_MOST_LAYERS = 64


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """What EAGLE-3 reads unless its config says otherwise: the inputs of an early, the middle, and a late layer."""
    return (min(2, num_layers), num_layers // 2, max(0, num_layers - 3))


def _complete(config: EagleConfig, target: Any) -> None:
    """Fill in which states are read, and refuse a target that does not have them."""
    of_target = target.config.get_text_config(decoder=True)
    num_layers, width = int(of_target.num_hidden_layers), int(of_target.hidden_size)
    if config.eagle_version == 1:
        config.target_layer_ids, config.hidden_convention = (num_layers,), "input"
    elif config.target_layer_ids is None:
        config.target_layer_ids = default_layer_ids(num_layers)
    if width != config.target_hidden_size:
        raise IncompatiblePairError(
            f"the EAGLE head was trained for a target of width {config.target_hidden_size}, and this one has {width}"
        )
    if not 0 <= min(config.hidden) <= max(config.hidden) <= num_layers:
        raise IncompatiblePairError(
            f"the EAGLE head reads hidden states {list(config.hidden)}, and the target has 0 to {num_layers}"
        )
    rows = target.get_input_embeddings().weight.shape[0]
    if rows < config.vocab_size and not config.own_embeddings:
        raise IncompatiblePairError(f"the EAGLE head knows {config.vocab_size} tokens, and the target has {rows}")


def check_vocabulary_map(d2t: Tensor, vocab_size: int) -> None:
    """Raise `InputError` unless offsets map the draft vocabulary into the target's, one to one."""
    ids = torch.arange(len(d2t)) + d2t.cpu()
    outside = int(((ids < 0) | (ids >= vocab_size)).sum())
    if outside or len(ids.unique()) < len(ids):
        what = f"{outside} of its tokens lie outside" if outside else "two of its tokens are one in"
        raise InputError(
            f"the head's d2t does not map its vocabulary of {len(d2t)} into the target's of {vocab_size}: {what} it. "
            "d2t holds offsets: target id = draft id + d2t[draft id]"
        )


def build(config: EagleConfig, tensors: Mapping[str, Tensor], target: Any) -> EagleModel:
    """A head with these weights, bound to its target: tables that it lacks are the target's own, shared, not copied.

    `tensors` are named as the model's own. Raises `InputError` for missing, unknown or misshapen ones, and
    `IncompatiblePairError` for a target of other sizes.
    """
    with describing("EAGLE head"):
        _complete(config, target)
    config._attn_implementation = "sdpa"
    dtype, device = target.dtype, target.get_input_embeddings().weight.device
    if not 1 <= config.num_hidden_layers <= _MOST_LAYERS:
        raise UnsupportedModelError(f"an EAGLE head has 1 to {_MOST_LAYERS} layers, not {config.num_hidden_layers}")
    # Shapes are compared before anything of their size is made: they come from a file.
    with describing("EAGLE head"), torch.device("meta"), no_init_weights():
        shapes = {name: tensor.shape for name, tensor in EagleModel(config).state_dict().items()}
    shared = set()
    if not config.own_embeddings:
        shared.add("embed_tokens.weight")
    if not config.own_head:
        shared.add("lm_head.weight")
    if config.draft_vocab_size == config.vocab_size and "d2t" not in tensors:
        shared.add("d2t")
    _check_tensors(tensors, {name: shape for name, shape in shapes.items() if name not in shared})
    if "d2t" in tensors:
        check_vocabulary_map(tensors["d2t"], config.vocab_size)
    with no_init_weights():
        # In its dtype from the start: rotary frequencies stay float32, and no weight is rounded on the way.
        model: EagleModel = EagleModel._from_config(config, dtype=dtype)
    model.load_state_dict(dict(tensors), strict=False)
    model.to(device).eval().requires_grad_(False)
    bind(model, target)
    return model


def _check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> None:
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise InputError(
            f"the EAGLE head's files lack {len(missing)} of its weights, for example {missing[0]}: the download is "
            "incomplete, or config.json is another head's"
        )
    if unknown:
        raise InputError(f"the EAGLE head's files hold a weight that no such head has: {unknown[0]}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"the EAGLE head's {name} has shape {list(tensors[name].shape)}, and its config says {list(shape)}"
            )


def bind(model: EagleModel, target: Any) -> None:
    """Take over the tables that the head shares with its target. A part of the target's head is a copy."""
    config = model.config
    if not config.own_embeddings:
        table = target.get_input_embeddings().weight
        if table.shape[1] != config.hidden_size:
            raise IncompatiblePairError(
                f"the EAGLE head has no embeddings of its own and is {config.hidden_size} wide; the target's "
                f"embeddings are {table.shape[1]} wide"
            )
        model.embed_tokens.weight = _in_dtype(table, model)
        model.embed_tokens.num_embeddings = table.shape[0]
    if not config.own_head:
        rows = output_weight(target)
        if rows.shape[1] != config.hidden_size:
            raise IncompatiblePairError(
                f"the EAGLE head predicts with the target's head, which is {rows.shape[1]} wide, not "
                f"{config.hidden_size}"
            )
        if config.draft_vocab_size != rows.shape[0]:
            rows = nn.Parameter(rows.detach()[model.draft_ids.to(rows.device)], requires_grad=False)
        model.lm_head.weight = _in_dtype(rows, model)


def _in_dtype(table: nn.Parameter, model: EagleModel) -> nn.Parameter:
    dtype = model.fc.weight.dtype
    return table if table.dtype == dtype else nn.Parameter(table.detach().to(dtype), requires_grad=False)


def own_tensors(model: EagleModel) -> dict[str, Tensor]:
    """What the head does not share with its target, by name; for its files."""
    shared = {"embed_tokens.weight"} if not model.config.own_embeddings else set()
    if not model.config.own_head:
        shared.add("lm_head.weight")
    if model.config.draft_vocab_size == model.config.vocab_size:
        shared.add("d2t")
    return {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
