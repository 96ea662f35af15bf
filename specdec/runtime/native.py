"""A model on our own kernels: a shallow copy that shares every weight, with other linear and attention layers.

The copy's products and its attention give a row the same bits however many rows ride along. The user's model object
stays as it was. Shape suffixes: M rows of one step, W width of hidden states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.pytorch_utils import Conv1D

from specdec.dtypes import dtype_name
from specdec.errors import InputError, UnsupportedModelError
from specdec.kernels import ops, packed
from specdec.quant.hf import is_ours
from specdec.quant.linear import PackedLinear
from specdec.runtime.cache import layer_types
from specdec.runtime.copies import is_spread, with_layers

ATTENTION = "specdec"
# Keyword arguments of attention functions that change nothing here, or that the step's own data stand for.
_IGNORED = {
    "cache_position",
    "dropout",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "sliding_window",
    "use_cache",
}


class Kernels(Protocol):
    """What stands in for linear and attention layers: `specdec.kernels.ops` itself, or the kernels of a device."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor: ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, handle: Tensor, layer: int, scale: float, softcap: float, window: int, /
    ) -> Tensor: ...


class NativeLinear(nn.Module):
    """`x @ weight.T + bias` by a kernel, on the weights of the layer that it stands in for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernels: Kernels = ops):
        super().__init__()
        self.weight, self.bias = weight, bias
        self._product = kernels.linear

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.weight, self.bias)


class Passing(CacheLayerMixin):
    """Hands the new rows on: attention itself writes and reads the slots."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def check_call(module: nn.Module, kwargs: Mapping[str, Any], own: str, who: str, lacking: bool = False) -> None:
    """`UnsupportedModelError` when a model asks its attention for more than is known, or does not hand on `own`.

    `who` "… do(es)" not know; `lacking`: something else was not handed on.
    """
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED and name != own]
    if unknown or lacking or own not in kwargs:
        reason = f"asks its attention for {', '.join(unknown)}" if unknown else "keeps arguments from its attention"
        raise UnsupportedModelError(f"{type(module).__name__} {reason}, which {who} not know")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `transformers` calls in place of its own attention: query `[1, heads, M, D]`, the new keys and values."""
    check_call(module, kwargs, "native", "the native kernels do")
    call: NativeCall = kwargs["native"]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    attend = call.kernels.attend
    return attend(query, key, value, call.handle, layer, scale, float(softcap or 0.0), call.windows[layer]), None


AttentionInterface.register(ATTENTION, _attention)


class NativeCall:
    """What the attention layers of one call need: the handle of the steps, and each layer's window (0: none)."""

    def __init__(self, handle: Tensor, windows: tuple[int, ...], kernels: Kernels):
        self.handle, self.windows, self.kernels = handle, windows, kernels


def _is_stock(module: nn.Module) -> bool:
    """Whether it has weights that go through stock products."""
    if isinstance(module, PackedLinear):
        return not packed.invariant(next(iter(module.parts.values())).device, module.format)
    known = isinstance(module, (NativeLinear, nn.Embedding))
    return not known and any(p.ndim >= 2 and p.is_floating_point() for p in module.parameters(recurse=False))


def _stock_products(modules: Iterable[nn.Module]) -> list[str]:
    """Kinds of layers whose weights go through stock products still."""
    return sorted({type(module).__name__ for module in modules if _is_stock(module)})


class Exposing:
    """Gives some hidden states of all rows beside the logits: `hidden`, by their index."""

    hidden: tuple[int, ...] = ()

    def hidden_rows(self, wanted: Sequence[int], exposed: Sequence[Tensor]) -> Tensor | None:
        """Of the `exposed` states that a call gave, those wanted, side by side: `[M, W]`. None when none is wanted."""
        if not wanted:
            return None
        missing = [i for i in wanted if i not in self.hidden]
        if missing:
            raise InputError(f"hidden state {missing[0]} was not announced: call backend.expose({list(wanted)}) first")
        parts = [exposed[self.hidden.index(i)] for i in wanted]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]


class NativeModel(Exposing, nn.Module):
    """Steps of a model by our own kernels, those for the CPU unless others are given.

    `forward(tokens [1, M], positions [1, M], rows [L], handle [1])` gives the logits `[L, V]` of the rows asked for,
    and each of the `hidden` states `[M, W]` of all rows; keys and values go to the slots that the handle names. A model
    with an `input_width` is given `inputs [1, M, input_width]` too. `stock` lists kinds of layers whose products stay
    stock: when it is empty, a row's bits do not depend on the other rows.
    """

    def __init__(self, model: Any, hidden: Sequence[int] = (), kernels: Kernels = ops):
        super().__init__()
        self._kernels = kernels
        self.hidden = tuple(hidden)
        self.input_width = int(getattr(model, "input_width", 0))
        config = model.config.get_text_config(decoder=True)
        kinds = layer_types(config)
        window = getattr(config, "sliding_window", None) or 0
        self.windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        self.kinds = frozenset(kinds)
        self.model = self._copy(model, kernels)
        self.stock = _stock_products(self.model.modules())

    @staticmethod
    def _copy(model: Any, kernels: Kernels) -> Any:
        def native(name: str, layer: Any) -> nn.Module | None:
            if type(layer) is nn.Linear:
                return NativeLinear(layer.weight, layer.bias, kernels)
            if type(layer) is Conv1D:  # stores the transpose: this one is a copy
                weight = nn.Parameter(layer.weight.detach().t().contiguous(), requires_grad=False)
                return NativeLinear(weight, layer.bias, kernels)
            return None  # packed layers have products of their own

        twin = with_layers(model, native)
        configs = {id(m.config): m.config for m in twin.modules() if hasattr(m, "config")}
        for config in configs.values():
            config._attn_implementation = ATTENTION
        return twin

    def expose(self, hidden: Sequence[int]) -> bool:
        """Give these hidden states too from now on; whether that is new."""
        before = self.hidden
        self.hidden = tuple(sorted({*before, *hidden}))
        return self.hidden != before

    def forward(
        self, tokens: Tensor, positions: Tensor, rows: Tensor, handle: Tensor, inputs: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        # A dense mask is taken as it is; none of these layers looks at it.
        unused = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        options: dict[str, Any] = {} if inputs is None else {"features": inputs}
        if self.hidden:
            options["output_hidden_states"] = True
        out = self.model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask={kind: unused for kind in self.kinds} if len(self.kinds) > 1 else unused,
            past_key_values=Cache(layers=[Passing() for _ in self.windows]),
            use_cache=True,
            logits_to_keep=rows,
            native=NativeCall(handle, self.windows, self._kernels),
            **options,
        )
        return (out.logits[0], *(out.hidden_states[i][0] for i in self.hidden))


def unsupported(model: Any) -> str | None:
    """Why the native kernels cannot run this model, in one line; None when they may."""
    if not ops.available():
        return ops.why_not()
    devices = {p.device.type for p in model.parameters()}
    if devices != {"cpu"}:
        return f"the native kernels run on the CPU, and the model is on {', '.join(sorted(devices))}"
    if model.dtype not in ops.DTYPES:
        return f"the native kernels know float32, bfloat16 and float64, not {dtype_name(model.dtype)}"
    return obstacle(model)


def obstacle(model: Any) -> str | None:
    """What in the model itself keeps other kernels out, in one line; None when nothing does."""
    if getattr(model, "hf_quantizer", None) is not None and not is_ours(model):
        return "the model's weights are quantised by another library"
    if is_spread(model):
        return "the model's layers are spread out by accelerate hooks"
    return None
