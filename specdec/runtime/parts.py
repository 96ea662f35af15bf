"""Parts of a model: shallow copies with some of its own layers, and the taps that stand between layers.

Shape suffixes: M rows of one step, L rows whose logits are wanted, V vocabulary, H hidden size.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from typing_extensions import Self

from specdec.errors import UnsupportedModelError
from specdec.runtime.cache import layer_types
from specdec.runtime.shared import DerivedModel


class _Wire(threading.local):
    """The states that pass a tap during a call; each thread has its own."""

    states: Tensor | None = None

    def __deepcopy__(self, memo: object) -> _Wire:
        return _Wire()


class Exit(nn.Module):
    """Stands between layers, and keeps what passes."""

    def __init__(self, kind: str):
        super().__init__()
        self.attention_type, self.wire = kind, _Wire()

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        self.wire.states = hidden_states
        return hidden_states


class Entry(nn.Module):
    """Stands before a part's first layer: what comes from the embeddings ends here, the states given it go on."""

    def __init__(self, kind: str):
        super().__init__()
        self.attention_type, self.wire = kind, _Wire()

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        assert self.wire.states is not None
        return self.wire.states


class PartOutput(NamedTuple):
    logits: Tensor  # [1, L, V]; of a section that does not end the model, what goes on, [1, M, H]
    hidden_states: dict[int, Tensor]  # by `transformers`' index, `[1, M, H]`


def layers_path(model: Any) -> str:
    """Where the list of layers stands whose attention layers index the cache as the list does."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers

    def indices(layer: nn.Module) -> set[int]:
        return {int(m.layer_idx) for m in layer.modules() if getattr(m, "layer_idx", None) is not None}  # type: ignore[arg-type]

    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(indices(layer) == {i} for i, layer in enumerate(module))
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no single list of its {count} layers, each of which knows its place in the "
            "cache: it cannot be cut. Of the drafters that share the target's weights, 'self_quant' needs no such list"
        )
    return str(found[0])


def _shallow(module: nn.Module) -> Any:
    """The same module with a dictionary of children of its own."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def with_module(model: Any, path: str, module: nn.Module) -> Any:
    """A copy of the modules on the way to `path`, with another one there; everything else is the model's own."""
    root = twin = _shallow(model)
    *parents, leaf = path.split(".")
    for name in parents:
        child = _shallow(twin._modules[name])
        twin._modules[name] = child
        twin = child
    twin._modules[leaf] = module
    return root


def with_layers_at(model: Any, path: str, layers: Sequence[nn.Module], kinds: Sequence[str]) -> Any:
    """Such a copy with other layers in the list at `path`."""
    root = with_module(model, path, nn.ModuleList(layers))
    holder = root.get_submodule(path.rpartition(".")[0])
    config = copy.deepcopy(holder.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = list(kinds)
    holder.config = config
    return root


class LowerPart(DerivedModel):
    """The first `exit_layer` layers, and the model's own final norm and head on them.

    `hidden_states[exit_layer]` is what comes out of them before that norm.
    """

    def __init__(self, model: Any, exit_layer: int):
        path, kinds = layers_path(model), layer_types(model.config.get_text_config(decoder=True))
        tap = Exit(kinds[exit_layer - 1])
        layers = [*model.get_submodule(path)[:exit_layer], tap]
        inner = with_layers_at(model, path, layers, (*kinds[:exit_layer], kinds[exit_layer - 1]))
        super().__init__(model, inner, {"exit_layer": exit_layer})
        self.exit_layer, self.tap = exit_layer, tap

    @classmethod
    def derive(cls, model: Any, **options: Any) -> Self:
        return cls(model, **options)

    def forward(
        self, *, logits_to_keep: int | Tensor = 0, output_hidden_states: bool = False, **given: Any
    ) -> PartOutput:
        wire = self.tap.wire
        try:
            out = self.inner(logits_to_keep=logits_to_keep, **given)
            assert wire.states is not None
            return PartOutput(out.logits, {self.exit_layer: wire.states})
        finally:
            wire.states = None


class UpperPart(DerivedModel):
    """The layers from `exit_layer` on, with the final norm and the head. `features [1, M, H]`: the exit states.

    The tokens go through the embeddings, whose result is thrown away: so it does not matter what else a model does to
    its inputs (scales, learned positions), and looking up a row costs next to nothing.
    """

    def __init__(self, model: Any, exit_layer: int):
        path, kinds = layers_path(model), layer_types(model.config.get_text_config(decoder=True))
        tap = Entry(kinds[exit_layer])
        layers = [tap, *model.get_submodule(path)[exit_layer:]]
        inner = with_layers_at(model, path, layers, (kinds[exit_layer], *kinds[exit_layer:]))
        super().__init__(model, inner, {"exit_layer": exit_layer})
        self.input_width = int(model.config.get_text_config(decoder=True).hidden_size)
        self.tap = tap

    @classmethod
    def derive(cls, model: Any, **options: Any) -> Self:
        return cls(model, **options)

    def forward(
        self,
        *,
        features: Tensor,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool = False,
        **given: Any,
    ) -> PartOutput:
        wire = self.tap.wire
        wire.states = features
        try:
            return PartOutput(self.inner(logits_to_keep=logits_to_keep, **given).logits, {})
        finally:
            wire.states = None
