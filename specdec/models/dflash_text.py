"""A DFlash draft at work on a text: keys and values of what is verified, and one pass over a block per proposal.

Shape suffixes: L tokens of context, S slots of a block, K drafted positions, H hidden width, W width of the target's
features, G key/value heads, D head width, V vocabulary, R draft vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import IncompatiblePairError
from specdec.kernels import ops
from specdec.kernels.ops import DTYPES
from specdec.models.dflash import NO_LIMIT, DFlashModel, check_target
from specdec.runtime.cache import bucket
from specdec.runtime.native import NativeLinear
from specdec.vocabulary import output_size

# Tokens of a prompt whose keys and values are made in one go.
_PIECE = 2048


class DFlashContext:
    """Keys and values of one text's verified tokens, in slots; a block's own stand behind them for one pass.

    Appending n tokens costs O(n), whatever the length of the text; buffers grow by buckets.
    """

    def __init__(self, model: DFlashModel):
        self.model, self.config = model, model.config
        self.length = 0
        self.kv: Tensor | None = None  # [layers, 2, G, slots, D]

    def _reserve(self, slots: int, like: Tensor) -> Tensor:
        if self.kv is None or self.kv.shape[3] < slots:
            layers = self.config.layers
            grown = like.new_empty(
                layers.num_hidden_layers, 2, layers.num_key_value_heads, bucket(slots, NO_LIMIT), layers.head_dim
            )
            if self.kv is not None:
                grown[:, :, :, : self.length] = self.kv[:, :, :, : self.length]
            self.kv = grown
        return self.kv

    def append(self, features_LW: Tensor) -> None:
        """The target's hidden states of the next verified tokens."""
        context_BLH = self.model.context(features_LW.to(self.model.norm.weight.dtype)[None])
        start, end = self.length, self.length + len(features_LW)
        kv = self._reserve(end + self.config.block_size, context_BLH)
        cos, sin = self.model.rotary(end)
        here = cos[:, start:end], sin[:, start:end]
        for i, layer in enumerate(self.model.attentions):
            k, v = layer.keys_values(context_BLH, here)
            kv[i, 0, :, start:end], kv[i, 1, :, start:end] = k[0], v[0]
        self.length = end

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        start, end = self.length, self.length + k.shape[2]
        assert self.kv is not None
        self.kv[layer, 0, :, start:end], self.kv[layer, 1, :, start:end] = k[0], v[0]
        window, causal = self.config.window(layer), self.config.is_causal(layer)
        first = max(0, start - window + 1) if window else 0
        both = self.kv[layer, :, None, :, first:end]
        if not window and not causal:
            return both[0], both[1], None
        places = torch.arange(first, end, device=k.device)
        ahead = places - torch.arange(start, end, device=k.device)[:, None]
        mask = (ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool)
        if window:
            mask &= ahead.abs() < window
        return both[0], both[1], mask

    def hidden(self, root: int, depth: int, table_VH: Tensor) -> Tensor:
        """Hidden states `[depth, H]` that draft the tokens behind `root`, which follows the verified tokens."""
        x_1SH = self.model.block_embeddings(torch.tensor([root], device=table_VH.device), table_VH)
        end = self.length + self.config.block_size
        self._reserve(end, x_1SH)
        cos, sin = self.model.rotary(end)
        out_1SH = self.model(x_1SH, (cos[:, self.length : end], sin[:, self.length : end]), self)
        return self.model.drafting(out_1SH[0], depth)


class DFlashNetwork:
    """A draft made ready to run beside its target: in its dtype, on its device, on the native products where they run.

    `model` stays as it is. `hidden`: the target's hidden states that it reads. `ids_R`: the target's ids of the
    columns of its logits, where it has a vocabulary of its own. Raises `IncompatiblePairError` for another target's.
    """

    def __init__(self, target: Any, model: DFlashModel, backend: str | None = None):
        check_target(model.config, target)
        self.table_VH: Tensor = target.get_input_embeddings().weight
        self.head: nn.Module = target.get_output_embeddings()
        device, dtype = self.table_VH.device, self.table_VH.dtype
        self.model = copy.deepcopy(model).to(device, dtype).requires_grad_(False).eval()
        self.ids_R = self._ids(output_size(target))
        self.hidden, self.num_positions = model.config.layer_ids, model.config.num_positions
        if backend != "eager" and device.type == "cpu" and dtype in DTYPES and ops.available():
            _go_native(self.model)
            if type(self.head) is nn.Linear:
                self.head = NativeLinear(self.head.weight, self.head.bias)

    def _ids(self, vocab_size: int) -> Tensor | None:
        d2t = self.model.d2t
        if d2t is None:
            return None
        ids_R = torch.arange(len(d2t), device=d2t.device) + d2t
        if not bool(((ids_R >= 0) & (ids_R < vocab_size)).all()) or len(ids_R.unique()) < len(ids_R):
            raise IncompatiblePairError(
                f"the draft's d2t names tokens twice, or outside the target's vocabulary of {vocab_size}: it was made "
                "for another target"
            )
        return ids_R

    def open(self) -> DFlashText:
        return DFlashText(self)

    def bytes_for(self, length: int) -> int:
        """Of the keys and values of a text of `length` tokens."""
        config, shape = self.model.config, self.model.config.layers
        per_slot = 2 * int(shape.num_hidden_layers) * int(shape.num_key_value_heads) * int(shape.head_dim)
        return per_slot * bucket(length + config.block_size, NO_LIMIT) * self.table_VH.element_size()


class DFlashText:
    """One text beside its target. Proposing leaves no trace; verified tokens are appended."""

    def __init__(self, network: DFlashNetwork):
        self.network, self.slots = network, DFlashContext(network.model)

    @property
    def length(self) -> int:
        return self.slots.length

    @torch.inference_mode()
    def append(self, features_LW: Tensor) -> None:
        """The target's hidden states of the next verified tokens, in the order of `hidden`."""
        for piece in features_LW.split(_PIECE):
            self.slots.append(piece)

    @torch.inference_mode()
    def logits(self, root: int, depth: int) -> Tensor:
        """`[depth, V]`, or `[depth, R]`, of the tokens behind `root`, which follows the verified ones."""
        network = self.network
        hidden_KH = self.slots.hidden(root, depth, network.table_VH)
        return network.model.logits(hidden_KH, network.head)


def _go_native(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, NativeLinear(child.weight, child.bias))
