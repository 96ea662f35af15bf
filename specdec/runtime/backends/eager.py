"""The eager backend: the stock `transformers` model, called step by step on the slot cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from specdec.errors import InputError
from specdec.quant.kv import kv_format
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult, stored_as
from specdec.runtime.cache import SlotCache, check_rewindable, layer_types
from specdec.vocabulary import output_size

# Attention implementations that take a dense 4-D mask; flash kernels do not, and flex aborts on one.
_DENSE_MASK = ("sdpa", "eager")
_NO_LIMIT = 1 << 30


class EagerBackend(Backend):
    """Lossless: yes; float rounding may differ between row counts (see docs/lossless.md).

    `kv_cache`: keys and values are stored as `specdec.quant.kv` says, and unpacked for each step.
    """

    def __init__(self, model: Any, cache: SlotCache | None = None, kv_cache: str | None = None):
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self._types = layer_types(self.config)
        context = getattr(self.config, "max_position_embeddings", None) or _NO_LIMIT
        self._capabilities = Capabilities(
            vocab_size=output_size(model),
            context=context,
            device=next(model.parameters()).device,
            dtype=model.dtype,
            input_width=int(getattr(model, "input_width", 0)),
        )
        self.cache = cache or SlotCache(self.config.num_hidden_layers, context, kv_format(kv_cache))
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def open(cls, model: Any, **options: Any) -> Self:
        kv_cache = options.pop("kv_cache", None)
        if options:
            raise InputError(f"the eager backend takes kv_cache= and no other option, not {sorted(options)}")
        check_rewindable(model)
        if model.training:
            raise InputError(f"{type(model).__name__} is in training mode (dropout is on); call model.eval() first")
        attention = model.config._attn_implementation
        if attention not in _DENSE_MASK:
            raise InputError(
                f"the model uses {attention!r} attention, which takes no tree mask; load it with "
                "attn_implementation='sdpa', or call model.set_attn_implementation('sdpa')"
            )
        made = cls(model, kv_cache=kv_cache)
        if kv_cache is not None:
            made.bytes_per_token  # noqa: B018 - a token goes through, so that sizes that do not fit are refused now
        return made

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def kv_cache(self) -> str | None:
        return self.cache.format.name if self.cache.format is not None else None

    @property
    def describes(self) -> str:
        return super().describes + stored_as(self.kv_cache)

    def _bias(self, step: Step, sliding: bool) -> Tensor:
        allowed = step.mask_MC
        if sliding:
            allowed = allowed & (step.positions[:, None] - step.key_positions_C[None, :] < self.config.sliding_window)
        dtype = self._capabilities.dtype
        bias = torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)
        return bias[None, None].to(self._capabilities.device)

    def _masks(self, step: Step) -> Tensor | dict[str, Tensor]:
        """One mask, or one per layer type where the model mixes types. A float bias: eager attention adds it."""
        kinds = {kind: self._bias(step, kind == "sliding_attention") for kind in set(self._types)}
        return kinds if len(kinds) > 1 else next(iter(kinds.values()))

    @torch.inference_mode()
    def forward(self, step: Step) -> StepResult:
        self.cache.place(step.start, len(step.tokens))
        device = self._capabilities.device
        more: dict[str, Any] = {"logits_to_keep": step.num_logits} if self._keeps_logits else {}
        if step.inputs_MW is not None:
            more["features"] = step.inputs_MW[None].to(device)
        out = self.model(
            input_ids=step.tokens[None].to(device),
            position_ids=step.positions[None].to(device),
            attention_mask=self._masks(step),
            past_key_values=self.cache,
            use_cache=True,
            output_hidden_states=bool(step.hidden),
            **more,
        )
        hidden = (
            torch.cat([out.hidden_states[i][0].to(out.logits.device) for i in step.hidden], -1) if step.hidden else None
        )
        return StepResult(out.logits[0, -step.num_logits :], hidden)

    @torch.inference_mode()
    def gather(self, slots: Sequence[int], start: int) -> None:
        self.cache.gather(slots, start)

    @torch.inference_mode()
    def fork(self, length: int) -> Self:
        return type(self)(self.model, self.cache.fork(length)).join_family(self)

    def on_slots_of(self, other: Backend) -> Self:
        if not isinstance(other, EagerBackend) or len(other.cache.layers) != len(self.cache.layers):
            return super().on_slots_of(other)
        return type(self)(self.model, other.cache).join_family(self)

    @property
    def num_bytes(self) -> int:
        return self.cache.num_bytes
