"""Whether a DFlash draft reads the hidden states that it was trained on: both meanings of its numbers on a short text.

Shape suffixes: B sequences (one), L tokens, A anchors, K drafted positions, N all drafted positions.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch

from specdec.errors import DrafterWarning
from specdec.formats.dflash import CONVENTIONS
from specdec.models.dflash import DFlashModel
from specdec.models.dflash_anchors import anchored_hidden

PROBE = (
    "The river runs past the old mill, and the road runs beside the river. In the morning the children walk along "
    "the road to school; in the evening they walk back home.\n\n"
    "def average(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n"
)
_TOKENS = 128
# The other meaning has to draft so many tokens more, and so much more of them, before it is worth a warning.
_MORE, _RATIO = 0.1, 1.25


@torch.inference_mode()
def expected_accepted(target: Any, model: DFlashModel, tokens: list[int], shifts: dict[str, int]) -> dict[str, float]:
    """Expected accepted tokens of a block at temperature 1 on a text, with each number of `shifts` added to
    its layer ids.

    The target runs once. Where an id leaves the target's range, that meaning is left out.
    """
    tokens_BL = torch.tensor([tokens], device=target.get_input_embeddings().weight.device)
    out = target(input_ids=tokens_BL, use_cache=False, output_hidden_states=True)
    table_VH, head = target.get_input_embeddings().weight, target.get_output_embeddings()
    model = copy.deepcopy(model).to(table_VH.device, table_VH.dtype).eval()
    depth = model.config.num_positions
    anchors_BA = torch.arange(min(8, len(tokens) - depth), len(tokens) - depth + 1, device=tokens_BL.device)[None]
    p_AKV = out.logits[0].float().softmax(-1)[anchors_BA[0][:, None] + torch.arange(depth, device=tokens_BL.device)]
    found: dict[str, float] = {}
    for name, shift in shifts.items():
        ids = [i + shift for i in model.config.layer_ids]
        if not 0 <= min(ids) <= max(ids) < len(out.hidden_states):
            continue
        features = torch.cat([out.hidden_states[i] for i in ids], -1)
        hidden = anchored_hidden(model, features, tokens_BL, anchors_BA, table_VH)[0]
        q_AKR = model.logits(hidden, head).float().softmax(-1)
        p_AKR = p_AKV
        if model.d2t is not None:
            p_AKR = p_AKV[..., torch.arange(len(model.d2t), device=model.d2t.device) + model.d2t]
        width = min(p_AKR.shape[-1], q_AKR.shape[-1])
        overlap_AK = torch.minimum(p_AKR[..., :width], q_AKR[..., :width]).sum(-1)
        found[name] = overlap_AK.cumprod(-1).sum(-1).mean().item()
    return found


def check_convention(target: Any, tokenizer: Any, model: DFlashModel, convention: str) -> dict[str, float]:
    """Warn when the draft fits the target clearly better if its layer numbers are read the other way.

    Off by one layer, a draft keeps the text exact and loses most of its acceptance. Without a tokenizer nothing is
    tried. Returns the expected accepted tokens by convention.
    """
    if tokenizer is None:
        return {}
    tokens = tokenizer(PROBE)["input_ids"][:_TOKENS]
    if len(tokens) <= model.config.block_size:
        return {}
    shifts = {name: value - CONVENTIONS[convention] for name, value in CONVENTIONS.items()}
    found = expected_accepted(target, model, tokens, shifts)
    here = found[convention]
    best = max(found, key=lambda name: found[name])
    if best != convention and found[best] > max(here + _MORE, here * _RATIO):
        warnings.warn(
            f"the draft's layer numbers are read as {convention!r}, and on a short text {here:.2f} of its tokens are "
            f"accepted in a round; read as {best!r}, {found[best]:.2f} are. If that is how it was trained, pass "
            f"layer_ids={best!r}",
            DrafterWarning,
            stacklevel=2,
        )
    return found
