"""DFlash blocks at many places of whole texts, side by side: how a draft is trained and judged.

Shape suffixes: B sequences, L tokens of a text, A anchors of each, S slots of a block, M = A S, K drafted positions,
H hidden width, W width of the target's features, G key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.models.dflash import DFlashModel


class Anchored:
    """Blocks that begin at anchors of a whole text, side by side: how a draft is trained and judged.

    A block sees what stands before its anchor, and itself. `contexts`: of each layer, keys and values
    `[B, G, L, D]`; `anchors_BA`: positions of the blocks' roots.
    """

    def __init__(self, model: DFlashModel, context_BLH: Tensor, anchors_BA: Tensor):
        self.config = model.config
        length, size = context_BLH.shape[1], model.config.block_size
        cos, sin = model.rotary(length + size)
        here = cos[:, :length], sin[:, :length]
        self.contexts = [layer.keys_values(context_BLH, here) for layer in model.attentions]
        slots = torch.arange(size, device=anchors_BA.device)
        self.places_BM = (anchors_BA[..., None] + slots).flatten(1)
        self.rotary = cos[0, self.places_BM], sin[0, self.places_BM]
        self.anchor_BM = anchors_BA.repeat_interleave(size, 1)
        self.block_M = torch.arange(anchors_BA.shape[1], device=anchors_BA.device).repeat_interleave(size)
        self.length = length
        self.masks: dict[tuple[int, bool], Tensor] = {}

    def _mask(self, window: int, causal: bool) -> Tensor:
        """`[B, 1, M, L + M]`."""
        if (window, causal) not in self.masks:
            before = torch.arange(self.length, device=self.places_BM.device)
            sees_text = before < self.anchor_BM[..., None]
            sees_block = (self.block_M[:, None] == self.block_M).expand(len(self.places_BM), -1, -1)
            ahead_BMM = self.places_BM[:, None, :] - self.places_BM[:, :, None]
            if causal:
                sees_block = sees_block & (ahead_BMM <= 0)
            if window:
                sees_text = sees_text & (self.places_BM[..., None] - before < window)
                sees_block = sees_block & (ahead_BMM.abs() < window)
            self.masks[window, causal] = torch.cat((sees_text, sees_block), -1)[:, None]
        return self.masks[window, causal]

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        before_k, before_v = self.contexts[layer]
        mask = self._mask(self.config.window(layer), self.config.is_causal(layer))
        return torch.cat((before_k, k), 2), torch.cat((before_v, v), 2), mask


def anchored_hidden(
    model: DFlashModel, features_BLW: Tensor, tokens_BL: Tensor, anchors_BA: Tensor, table_VH: Tensor
) -> Tensor:
    """Hidden states `[B, A, K, H]` that draft the K tokens behind each anchor, in one pass, with gradients.

    The same numbers as drafting at each anchor after the text before it; `table_VH`: the target's embeddings.
    """
    past = Anchored(model, model.context(features_BLW), anchors_BA)
    x_BASH = model.block_embeddings(tokens_BL.gather(1, anchors_BA), table_VH)
    out_BMH = model(x_BASH.flatten(1, 2), past.rotary, past)
    return model.drafting(out_BMH.unflatten(1, x_BASH.shape[1:3]), model.config.num_positions)
