"""How well the target of a cell knows text: what rounding its weights costs beside what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Tokens that are judged at most: an average over these is sure to some hundredths of a nat.
_MOST_TOKENS, _MOST_OF_ONE = 8192, 1024


@torch.inference_mode()
def prompt_loss(target: Any, prompts: Sequence[Sequence[int]]) -> dict[str, Any] | None:
    """`{"loss", "tokens", "text"}`: mean negative log-likelihood in nats per token of the prompts' own tokens, each
    given those before it, at most 8192 of them. None where there is no such token, or no model to ask (an artefact).

    The first token of a prompt is not judged. Compare it between targets on the same prompts only.
    """
    if not isinstance(target, nn.Module):
        return None
    total, count = 0.0, 0
    device = next(target.parameters()).device
    for ids in prompts:
        row_L = torch.tensor(ids[: min(_MOST_OF_ONE, _MOST_TOKENS - count + 1)], device=device)
        if len(row_L) < 2:
            continue
        logits_LV: Tensor = target(input_ids=row_L[None]).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits_LV, row_L[1:], reduction="sum"))
        count += len(row_L) - 1
        if count >= _MOST_TOKENS:
            break
    return {"loss": total / count, "tokens": count, "text": "prompts"} if count else None
