"""Training-time test of a draft head: all its drafting steps from every start of a row at once (arXiv 2503.01840).

Start t knows tokens 0..t+1 and the target's states 0..t. Step j of K reads token t+1+j and a feature: the target's at t
for j = 0, else what step j - 1 gave.

Shape suffixes: B rows, L tokens of a row, S starts of a row, H hidden width, R draft vocabulary, K steps, D width of an
attention head.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from specdec.errors import InputError
from specdec.models.eagle import OWN, EagleModel

_ATTENTION = "specdec_unrolled"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one step: `query [B, heads, S, D]`, keys and values of all steps so far, `[B, kv heads, K S, D]`.

    Of the first step's keys a start sees its own and all before it, which the target has computed; of each later
    step's only its own. So the scores are `[S, S + K - 1]`, not `[S, K S]` with a mask.
    """
    groups, num_starts = query.shape[1] // key.shape[1], query.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    query = query * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    true_k, own_k = key[:, :, :num_starts], key[:, :, num_starts:].unflatten(2, (-1, num_starts))
    true_v, own_v = value[:, :, :num_starts], value[:, :, num_starts:].unflatten(2, (-1, num_starts))
    later = torch.ones(num_starts, num_starts, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ true_k.transpose(2, 3)).masked_fill(later, -torch.inf)
    own_scores = (query[:, :, None] * own_k).sum(-1).transpose(2, 3)
    weights = torch.cat((scores, own_scores), -1).softmax(-1)
    out = weights[..., :num_starts] @ true_v
    out = out + (weights[..., num_starts:].transpose(2, 3)[..., None] * own_v).sum(2)
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


def unroll(head: EagleModel, tokens_BL: Tensor, features_BLH: Tensor, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Training-time test: what each step gives, its logits `[B, S, R]` and its own features `[B, S, H]`; S = L - K.

    The head's own forward, once a step, on a cache that grows by a step at a time: the same computation as drafting
    these tokens from every start at once. `features_BLH`: what `fuse` made of the target's states.
    """
    return list(unrolling(head, tokens_BL, features_BLH, steps, logits=True))


def unrolling(
    head: EagleModel, tokens_BL: Tensor, features_BLH: Tensor, steps: int, *, logits: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    num_starts = tokens_BL.shape[1] - steps
    if num_starts < 1:
        raise InputError(f"rows of {tokens_BL.shape[1]} tokens are too short for {steps} steps; raise --length")
    device = tokens_BL.device
    cache = DynamicCache()
    positions = torch.arange(num_starts, device=device)[None]
    given = features_BLH[:, :num_starts]
    none = torch.zeros(0, dtype=torch.int64, device=device)
    usual, head.config._attn_implementation = head.config._attn_implementation, _ATTENTION
    try:
        for step in range(steps):
            out = head(
                input_ids=tokens_BL[:, 1 + step : 1 + step + num_starts],
                features=given,
                position_ids=positions + step,
                past_key_values=cache,
                output_hidden_states=True,
                logits_to_keep=0 if logits else none,
            )
            assert out.hidden_states is not None
            given = out.hidden_states[OWN]
            yield out.logits, given
    finally:
        head.config._attn_implementation = usual
