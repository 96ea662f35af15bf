"""DFlash: one pass over a block of masked slots drafts all of its tokens at once (Chen et al., arXiv 2602.06036).

The first slot holds the last committed token, the root; the others hold a mask embedding. Every layer reads, besides
the block, keys and values made from the target's own hidden states of the verified text: queries come from the block
alone, and within it every slot sees every other. Embeddings and output head are the target's.

Shape suffixes: B sequences, L tokens of context, M slots of blocks, S slots of one block, K drafted positions, H hidden
width, W width of the target's features, G key/value heads, D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RotaryEmbedding, rotate_half

from specdec.errors import IncompatiblePairError, UnsupportedModelError
from specdec.runtime.cache import bucket, layer_types

# Ways to stretch rotary positions that do not change with the length of the text: kept keys stay right.
ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3"})
# Buffers follow the buckets of caches; a draft has no context of its own that ends.
NO_LIMIT = 1 << 40


@dataclass(frozen=True, eq=False)
class DFlashConfig:
    """`layers`: shape of the draft's layers. `layer_ids`: the target's hidden states that it reads, as `transformers`
    numbers them: 0 the embeddings, i the input of layer i, the number of layers the last, after the final norm.

    `sample_from_anchor`: slot i drafts token i + 1 behind the root, the root's own slot the first; else slot i drafts
    what stands in its own place, and the root's slot nothing. `causal`: layers in which a slot sees no later one.
    `mask_token_id`: whose embedding stands in masked slots; None: the draft has a vector of its own.
    `draft_vocab_size`: of an output head of its own; None: the target's head.
    """

    layers: Qwen3Config
    block_size: int
    layer_ids: tuple[int, ...]
    mask_token_id: int | None = None
    sample_from_anchor: bool = False
    causal: tuple[bool, ...] = ()
    draft_vocab_size: int | None = None
    embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    softcap: float = 0.0
    num_target_layers: int | None = None

    def __post_init__(self) -> None:
        rope = (self.layers.rope_parameters or {}).get("rope_type", "default")
        if rope not in ROPE_TYPES:
            raise UnsupportedModelError(
                f"the draft's rotary positions are of type {rope!r}, which changes with the length of the text; "
                f"types that work: {', '.join(sorted(ROPE_TYPES))}"
            )

    @property
    def num_positions(self) -> int:
        """Drafted tokens of one pass."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    def window(self, layer: int) -> int:
        """0: none."""
        sliding = layer_types(self.layers)[layer] == "sliding_attention"
        return int(self.layers.sliding_window or 0) if sliding else 0

    def is_causal(self, layer: int) -> bool:
        return bool(self.causal) and self.causal[layer]


class Past(Protocol):
    """Where a layer's block finds what stands before it."""

    def join(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `[B, G, ·, D]` of the block, with those before them in front; and a mask, True = seen."""


class DFlashAttention(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, width, bias=bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x_BMH: Tensor) -> Tensor:
        heads: Tensor = x_BMH.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return heads

    def keys_values(self, x_BMH: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`[B, G, M, D]` each, keys turned to their positions."""
        k = self.k_norm(self.k_proj(x_BMH).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return _turn(k, rotary), self._heads(self.v_proj(x_BMH))

    def forward(self, x_BMH: Tensor, rotary: tuple[Tensor, Tensor], past: Past) -> Tensor:
        q = self.q_norm(self.q_proj(x_BMH).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        k, v, mask = past.join(self.layer, *self.keys_values(x_BMH, rotary))
        out = scaled_dot_product_attention(_turn(q, rotary), k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


def _turn(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """`x` `[B, heads, M, D]`, turned to its positions."""
    cos, sin = (table[:, None] for table in rotary)
    turned: Tensor = x * cos + rotate_half(x) * sin
    return turned


class DFlashLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = DFlashAttention(config, layer)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BMH: Tensor, rotary: tuple[Tensor, Tensor], past: Past) -> Tensor:
        x_BMH = x_BMH + self.self_attn(self.input_layernorm(x_BMH), rotary, past)
        out: Tensor = x_BMH + self.mlp(self.post_attention_layernorm(x_BMH))
        return out


class DFlashModel(nn.Module):
    """The draft's own weights, named as published checkpoints name them.

    Its vector for masked slots is there where the configuration names no mask token; its output head and `d2t`
    (token = index + d2t[index]) where it has a vocabulary of its own.
    """

    def __init__(self, config: DFlashConfig):
        super().__init__()
        self.config, layers = config, config.layers
        width = layers.hidden_size
        self.layers = nn.ModuleList([DFlashLayer(layers, i) for i in range(layers.num_hidden_layers)])
        self.norm = nn.RMSNorm(width, eps=layers.rms_norm_eps)
        self.fc = nn.Linear(len(config.layer_ids) * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps=layers.rms_norm_eps)
        self.mask_embedding = nn.Parameter(torch.zeros(width)) if config.mask_token_id is None else None
        self.lm_head: nn.Module | None = None
        self.d2t: Tensor | None
        self.register_buffer("d2t", None)
        if config.draft_vocab_size is not None:
            self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
            self.d2t = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def attentions(self) -> list[DFlashAttention]:
        return [cast(DFlashLayer, layer).self_attn for layer in self.layers]

    @torch.no_grad()
    def initialize(self, std: float = 0.02) -> None:
        """Random matrices; what a layer adds to its input starts small."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                quiet = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, std / (2 * len(self.layers)) ** 0.5 if quiet else std)

    def rotary(self, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 … end - 1 at least, `[1, n, D]`, made once."""
        weight = self.norm.weight
        made = self._rotary
        if made is None or made[0].shape[1] < end or made[0].dtype != weight.dtype or made[0].device != weight.device:
            with torch.inference_mode(False), torch.no_grad():
                places = torch.arange(bucket(end, NO_LIMIT), device=weight.device)[None]
                made = Qwen3RotaryEmbedding(self.config.layers).to(weight.device)(weight.detach(), places)
            self._rotary = made
        return made

    def context(self, features_BLW: Tensor) -> Tensor:
        """`[B, L, H]`: what every layer makes keys and values of the verified text from."""
        fused: Tensor = self.hidden_norm(self.fc(features_BLW))
        return fused

    def block_embeddings(self, roots: Tensor, table_VH: Tensor) -> Tensor:
        """Input of the blocks that begin with the tokens `roots` `[...]`: `[..., S, H]`."""
        config = self.config
        own = self.mask_embedding
        masked_H = own if own is not None else table_VH[config.mask_token_id] * config.embedding_scale
        root_H = embedding(roots, table_VH) * config.embedding_scale
        slots = masked_H.to(root_H.dtype).expand(*roots.shape, config.block_size - 1, -1)
        return torch.cat((root_H[..., None, :], slots), -2)

    def forward(self, x_BMH: Tensor, rotary: tuple[Tensor, Tensor], past: Past) -> Tensor:
        """Hidden states `[B, M, H]` of the slots, after the final norm."""
        for layer in self.layers:
            x_BMH = layer(x_BMH, rotary, past)
        out: Tensor = self.norm(x_BMH)
        return out

    def drafting(self, x_SH: Tensor, depth: int) -> Tensor:
        """Of a block's slots `[..., S, H]`, those that draft the first `depth` tokens."""
        first = 0 if self.config.sample_from_anchor else 1
        return x_SH[..., first : first + depth, :]

    def logits(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """Of slots, by the target's `head` or the draft's own; in the draft's own vocabulary if it has one."""
        out: Tensor = (head if self.lm_head is None else self.lm_head)(hidden)
        if self.config.output_multiplier != 1.0:
            out = out * self.config.output_multiplier
        if self.config.softcap > 0:
            out = torch.tanh(out / self.config.softcap) * self.config.softcap
        return out


def check_target(config: DFlashConfig, target: Any) -> None:
    """Raise `IncompatiblePairError` when a draft of this shape cannot read this target."""
    table_VH = target.get_input_embeddings().weight
    num_layers = int(target.config.get_text_config(decoder=True).num_hidden_layers)
    width = table_VH.shape[1]
    if config.layers.hidden_size != width:
        raise IncompatiblePairError(
            f"the draft is {config.layers.hidden_size} wide and the target's embeddings {width}: it was trained for "
            "another target"
        )
    if config.num_target_layers not in (None, num_layers):
        raise IncompatiblePairError(
            f"the draft was trained for a target of {config.num_target_layers} layers, and this one has {num_layers}"
        )
    outside = [i for i in config.layer_ids if not 0 <= i <= num_layers]
    if outside:
        raise IncompatiblePairError(
            f"the draft reads hidden state {outside[0]} of the target, which has 0 to {num_layers}: it was trained for "
            "another target, or its layer numbers follow another convention (layer_ids='hidden_states' or 'outputs')"
        )
    if config.mask_token_id is not None and not 0 <= config.mask_token_id < len(table_VH):
        raise IncompatiblePairError(
            f"the draft's mask token {config.mask_token_id} has no row in the target's embeddings of {len(table_VH)}; "
            "its folder needs a tensor `mask_embedding`"
        )


def spread_layers(num_layers: int, count: int) -> tuple[int, ...]:
    """`count` hidden states spread over the target: outputs of layers 1 … L - 3, as DFlash has it."""
    first, last = min(1, num_layers - 1), max(num_layers - 3, min(1, num_layers - 1))
    if count == 1:
        return (num_layers // 2 + 1,)
    ids: Sequence[int] = [round(first + i * (last - first) / (count - 1)) + 1 for i in range(count)]
    return tuple(dict.fromkeys(ids))
