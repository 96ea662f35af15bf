"""The draft head of EAGLE-1 and EAGLE-3 as a `transformers` model.

Row i of a head reads token x_{i+1} and a feature: the target's of token x_i, or, behind what the target has computed,
the head's own output one row before. Its logits are the draft's distribution of x_{i+2}.

| | EAGLE-1 (arXiv 2401.15077) | EAGLE-3 (arXiv 2503.01840) |
|---|---|---|
| true feature | last hidden state, after the final norm | `fuse` of several hidden states |
| into the layer | fc(cat(embedding, feature)), no norm | cat(norm(embedding), norm(feature)): q, k, v are 2H wide |
| logits | the target's head | own norm and head, over a draft vocabulary |
| own feature | the layer's output | the layer's output; after the norm with `norm_output` |

Attention, MLP, norms and rotary embedding are those of `transformers`.

Shape suffixes: B sequences, M rows, H hidden width, T width of the target's states together, V target vocabulary,
R draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from specdec.errors import IncompatiblePairError, UnsupportedModelError

LAYERS = {"llama": LlamaDecoderLayer, "qwen3": Qwen3DecoderLayer}
#: "input": layer id i means the input of layer i, `hidden_states[i]` (original EAGLE-3, speculators); "output": its
#: output, `hidden_states[i + 1]`.
CONVENTIONS = ("input", "output")
#: Index of the own feature in the head's `hidden_states`; 0 is the feature that it was given.
OWN = 1


class EagleConfig(LlamaConfig):
    """A head's shape, in the fields of its decoder layer, and what it reads of the target.

    `vocab_size` is the target's, `draft_vocab_size` the head's own (None: the same). `target_layer_ids` are read by
    `hidden_convention`. `own_embeddings` and `own_head` tell whether the head has tables of its own, or the target's.
    """

    model_type = "specdec_eagle"

    eagle_version: int = 3
    layer_kind: str = "llama"
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    target_layer_ids: list[int] | tuple[int, ...] | None = None
    hidden_convention: str = "input"
    norm_before_residual: bool = False
    norm_output: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    fc_bias: bool = False
    own_embeddings: bool = False
    own_head: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        self.target_hidden_size = self.target_hidden_size or self.hidden_size
        self.tie_word_embeddings = False

    @property
    def num_states(self) -> int:
        """Hidden states of the target in one feature."""
        return 1 if self.eagle_version == 1 else len(self.target_layer_ids or (0, 0, 0))

    @property
    def hidden(self) -> tuple[int, ...]:
        """Those states by their index in `transformers`' `hidden_states`."""
        return self.hidden_by(self.hidden_convention)

    def hidden_by(self, convention: str) -> tuple[int, ...]:
        """What they would be by another convention."""
        assert self.target_layer_ids is not None
        return tuple(i + (convention == "output") for i in self.target_layer_ids)


def check_config(config: EagleConfig) -> EagleConfig:
    """`config`, if a head can be built of it; else `UnsupportedModelError`."""
    for name, value, known in (
        ("eagle_version", config.eagle_version, (1, 3)),
        ("layer_kind", config.layer_kind, tuple(LAYERS)),
        ("hidden_convention", config.hidden_convention, CONVENTIONS),
    ):
        if value not in known:
            raise UnsupportedModelError(f"an EAGLE head's {name} is one of {', '.join(map(str, known))}, not {value!r}")
    if config.norm_before_fc and config.fc_norm:
        raise UnsupportedModelError("norm_before_fc and fc_norm exclude each other; the config has both")
    if config.eagle_version == 1 and config.hidden_size != config.target_hidden_size:
        raise UnsupportedModelError(
            f"an EAGLE-1 head is as wide as its target: {config.hidden_size} and {config.target_hidden_size}"
        )
    return config


class EagleLayer(nn.Module):
    """A decoder layer of `transformers`; the first one takes what EAGLE feeds it."""

    def __init__(self, config: EagleConfig, layer_idx: int):
        super().__init__()
        layer: Any = LAYERS[config.layer_kind](cast(Any, config), layer_idx)
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.reads_both = config.eagle_version == 3 and layer_idx == 0
        self.norm_before_residual = config.norm_before_residual
        # EAGLE-1's first layer has no norm in front: what fc gives is its input.
        self.input_layernorm = layer.input_layernorm if config.eagle_version == 3 or layer_idx else None
        if self.reads_both:
            for name in ("q_proj", "k_proj", "v_proj"):
                narrow = getattr(self.self_attn, name)
                wide = nn.Linear(2 * config.hidden_size, narrow.out_features, bias=narrow.bias is not None)
                setattr(self.self_attn, name, wide)
            self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x_BMH: Tensor, embedded_BMH: Tensor, **options: Any) -> Tensor:
        residual = x_BMH
        if self.reads_both:
            normed = self.hidden_norm(x_BMH)
            residual = normed if self.norm_before_residual else x_BMH
            assert self.input_layernorm is not None
            x_BMH = torch.cat((self.input_layernorm(embedded_BMH), normed), -1)
        elif self.input_layernorm is not None:
            x_BMH = self.input_layernorm(x_BMH)
        attended, _ = self.self_attn(hidden_states=x_BMH, **options)
        x_BMH = residual + attended
        out: Tensor = x_BMH + self.mlp(self.post_attention_layernorm(x_BMH))
        return out


class EagleModel(PreTrainedModel):
    """`forward` takes tokens, positions and features, all `[1 or B, M]`, the features H wide: see `fuse`.

    Its output's `hidden_states` are the features it was given, and its own, to be fed back (`OWN`). Logits are over
    the draft vocabulary: row r stands for the target's token `draft_ids[r]`.
    """

    config_class = EagleConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ("EagleLayer",)
    config: EagleConfig

    def __init__(self, config: EagleConfig):
        super().__init__(check_config(config))
        width, given = config.hidden_size, config.num_states * int(config.target_hidden_size or 0)
        #: What a row reads besides its token: how the runtime knows.
        self.input_width = width
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.eagle_version == 1:
            self.fc = nn.Linear(2 * width, width, bias=config.fc_bias)
        else:
            self.fc = nn.Linear(given, width, bias=config.fc_bias)
            self.norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        if config.norm_before_fc:
            self.input_norm = LlamaRMSNorm(given, eps=config.rms_norm_eps)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                LlamaRMSNorm(given // config.num_states, eps=config.rms_norm_eps) for _ in range(config.num_states)
            )
        self.layers = nn.ModuleList(EagleLayer(config, i) for i in range(config.num_hidden_layers))
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.lm_head = nn.Linear(width, int(config.draft_vocab_size or 0), bias=False)
        #: EAGLE's vocabulary map: `draft_ids[r] = r + d2t[r]`.
        self.register_buffer("d2t", torch.zeros(int(config.draft_vocab_size or 0), dtype=torch.int64))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @property
    def draft_ids(self) -> Tensor:
        """int64 `[R]`."""
        offsets = cast(Tensor, self.d2t)
        return torch.arange(len(offsets), device=offsets.device) + offsets

    def fuse(self, states: Tensor) -> Tensor:
        """The target's states `[..., T]`, side by side, as features `[..., H]`: once for each token."""
        if states.shape[-1] != (given := self.config.num_states * int(self.config.target_hidden_size or 0)):
            raise IncompatiblePairError(
                f"the EAGLE head reads target states {given} wide, and this target's are {states.shape[-1]}; "
                "it was trained for another target"
            )
        states = states.to(self.dtype)
        if self.config.eagle_version == 1:
            return states
        if self.config.norm_before_fc:
            states = self.input_norm(states)
        if self.config.fc_norm:
            chunks = states.chunk(self.config.num_states, -1)
            states = torch.cat([norm(chunk) for norm, chunk in zip(self.fc_norm, chunks, strict=True)], -1)
        fused: Tensor = self.fc(states)
        return fused

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | Mapping[str, Tensor] | None = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        embedded, x = self.embed_tokens(input_ids), features
        if self.config.eagle_version == 1:
            x = self.fc(torch.cat((embedded, x), -1))
        places = self.rotary_emb(x, position_ids)
        kinds = getattr(self.config, "layer_types", None) or ()
        for i, layer in enumerate(self.layers):
            mask = attention_mask[kinds[i]] if isinstance(attention_mask, Mapping) else attention_mask
            x = layer(
                x,
                embedded,
                position_embeddings=places,
                position_ids=position_ids,
                attention_mask=mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        # EAGLE-1 predicts the target's normed state itself.
        normed = x if self.config.eagle_version == 1 else self.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(normed[:, kept]),
            past_key_values=past_key_values,
            hidden_states=(features, normed if self.config.norm_output else x) if output_hidden_states else None,
        )
