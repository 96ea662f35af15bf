"""Tiny EAGLE heads: random ones of every kind, and one that learned a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from specdec.models.eagle import EagleConfig, EagleModel
from specdec.models.eagle_build import build, own_tensors
from specdec.train.unroll import unroll

STEPS = 3


def config(target: Any, **changes: Any) -> EagleConfig:
    of_target = target.config
    vocab, width = target.get_input_embeddings().weight.shape
    fields = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "target_hidden_size": width,
        "target_layer_ids": [0, 1, of_target.num_hidden_layers],
        "initializer_range": 0.2,
    }
    return EagleConfig(**{**fields, **changes})


def draft_vocabulary(vocab_size: int, count: int) -> torch.Tensor:
    """`count` tokens as offsets: the first and the last ones, with a gap."""
    ids = torch.cat((torch.arange(count // 2), torch.arange(vocab_size - (count - count // 2), vocab_size)))
    return ids - torch.arange(count)


def tensors(shape: EagleConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights for everything that such a head has of its own; norms too."""
    torch.manual_seed(seed)
    shape._attn_implementation = "sdpa"
    head = EagleModel(shape).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    count = shape.draft_vocab_size
    if count != shape.vocab_size:
        head.d2t.copy_(draft_vocabulary(shape.vocab_size, count))
    return {name: tensor.clone() for name, tensor in own_tensors(head).items()}


def head(target: Any, seed: int = 0, **changes: Any) -> EagleModel:
    shape = config(target, **changes)
    return build(shape, tensors(shape, seed), target)


def fitted(target: Any, tokens: Sequence[int], steps: int = 60, **changes: Any) -> EagleModel:
    """A head that knows the target's choices behind these tokens rather well, from every place in them."""
    made = head(target, **{"draft_vocab_size": 48, "fc_norm": True, **changes})
    ids = torch.tensor([list(tokens)])
    with torch.no_grad():
        out = target(input_ids=ids, use_cache=False, output_hidden_states=True)
        features = torch.cat([out.hidden_states[i] for i in made.config.hidden], -1)
        choices = out.logits[0].argmax(-1)
    own = own_tensors(made)
    learned = [p.requires_grad_() for name, p in made.named_parameters() if name in own]
    optimizer = torch.optim.Adam(learned, lr=0.02)
    at = torch.full((made.config.vocab_size,), -100).index_put((made.draft_ids,), torch.arange(len(made.draft_ids)))
    for _ in range(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for j, (logits, _) in enumerate(unroll(made, ids, made.fuse(features), STEPS)):
            wanted = at[choices[1 + j :]][: logits.shape[1]]
            loss = loss + torch.nn.functional.cross_entropy(logits[0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.requires_grad_(False)
