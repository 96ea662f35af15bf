"""Tiny DFlash drafts for the tiny models, and a slow, obvious computation of what such a draft says.

`says` is written from the description of the method alone: loops over slots and heads, no cache, no library code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import tiny_models
import torch
from specdec.drafters import ParallelDrafter
from torch import Tensor
from transformers import Qwen3Config

from specdec.models.dflash import DFlashConfig, DFlashModel
from specdec.models.dflash_text import DFlashNetwork
from specdec.train.dflash import DFlashObjective
from specdec.train.trainer import look

THETA = 10000.0


def shape(target: Any, **changes: Any) -> Qwen3Config:
    """Two layers of the target's width, with more query heads than key/value heads."""
    width, vocab = target.get_input_embeddings().weight.shape[1], target.get_output_embeddings().weight.shape[0]
    fields = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": vocab,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        **changes,
    }
    return Qwen3Config(**fields)


def config(target: Any, block: int = 5, layer_ids: Sequence[int] = (0, 1, 2), **changes: Any) -> DFlashConfig:
    return DFlashConfig(shape(target), block, tuple(layer_ids), **changes)


def random_model(made: DFlashConfig, seed: int = 3) -> DFlashModel:
    """In float64, with noise on every parameter, so that a wrong position, mask or layer changes the numbers."""
    torch.manual_seed(seed)
    model = DFlashModel(made).double()
    model.initialize(0.4)
    return tiny_models.randomize(model, 0.1, seed).eval()


def fitted(target: Any, text: Sequence[int], steps: int = 120, **shape: Any) -> DFlashModel:
    """A draft that learned one text of the target's, by the library's own training: some of it is accepted."""
    objective = DFlashObjective(target, None, config(target, **shape), anchors=16, loss="ce")
    torch.manual_seed(0)
    objective.module.initialize(0.1)
    tokens = torch.tensor([list(text)])
    batch = look(target, tokens, torch.ones_like(tokens, dtype=torch.bool), objective.hidden)
    optimizer = torch.optim.Adam(objective.module.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        objective.loss(batch).loss.backward()
        optimizer.step()
    return objective.module.eval()


def drafter(target: Any, model: DFlashModel, backend: str | None = None) -> ParallelDrafter:
    return ParallelDrafter(DFlashNetwork(target, model, backend))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean() + eps)


def _turned(x: Tensor, place: int) -> Tensor:
    """Rotary positions, the halves of a head as pairs; angles in float32, as every implementation has them."""
    half = len(x) // 2
    speeds = 1.0 / (THETA ** (torch.arange(0, len(x), 2, dtype=torch.float32) / len(x)))
    angles = torch.tensor(float(place), dtype=torch.float32) * speeds
    cos, sin = angles.cos().double(), angles.sin().double()
    return torch.cat((x[:half] * cos - x[half:] * sin, x[half:] * cos + x[:half] * sin))


@torch.no_grad()
def says(
    weights: Mapping[str, Tensor],
    states: Sequence[Tensor],
    root: int,
    table: Tensor,
    head: Tensor,
    mask_vector: Tensor,
    *,
    block: int,
    heads: int = 4,
    kv_heads: int = 2,
    eps: float = 1e-6,
    causal: Sequence[bool] = (False, False),
    windows: Sequence[int] = (0, 0),
    from_anchor: bool = False,
) -> Tensor:
    """Logits `[K, V]` behind `root`; `states`: the target's hidden states `[n, H]` that the draft reads, in order."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    n = len(states[0])
    context = [
        _norm(w["fc.weight"] @ torch.cat([s[i] for s in states]), w["hidden_norm.weight"], eps) for i in range(n)
    ]
    slots = [table[root]] + [mask_vector] * (block - 1)
    for layer, (is_causal, window) in enumerate(zip(causal, windows, strict=True)):
        name = f"layers.{layer}."
        normed = [_norm(x, w[name + "input_layernorm.weight"], eps) for x in slots]

        def project(x: Tensor, kind: str, place: int, name: str = name) -> list[Tensor]:
            count = heads if kind == "q" else kv_heads
            pieces = list((w[f"{name}self_attn.{kind}_proj.weight"] @ x).chunk(count))
            if kind == "v":
                return pieces
            return [_turned(_norm(piece, w[f"{name}self_attn.{kind}_norm.weight"], eps), place) for piece in pieces]

        everything = [*context, *normed]
        keys = [project(x, "k", place) for place, x in enumerate(everything)]
        values = [project(x, "v", place) for place, x in enumerate(everything)]
        after = []
        for slot, x in enumerate(slots):
            place, query, mixed = n + slot, project(normed[slot], "q", n + slot), []
            seen = [
                other
                for other in range(len(everything))
                if (not is_causal or other <= place) and (not window or abs(place - other) < window)
            ]
            for h in range(heads):
                g = h * kv_heads // heads
                scores = torch.stack([query[h] @ keys[other][g] / math.sqrt(len(query[h])) for other in seen])
                mixed.append(sum(p * values[other][g] for p, other in zip(scores.softmax(0), seen, strict=True)))
            x = x + w[name + "self_attn.o_proj.weight"] @ torch.cat(mixed)
            y = _norm(x, w[name + "post_attention_layernorm.weight"], eps)
            gate = w[name + "mlp.gate_proj.weight"] @ y
            after.append(
                x
                + w[name + "mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w[name + "mlp.up_proj.weight"] @ y))
            )
        slots = after
    drafting = slots if from_anchor else slots[1:]
    return torch.stack([head @ _norm(x, w["norm.weight"], eps) for x in drafting])
