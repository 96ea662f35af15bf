"""The calibration text on its way through a model, one decoder block at a time.

What is kept is the input of one block, for all rows. Shape suffixes: B rows, T tokens, H hidden width, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.layers import linear_shape
from specdec.quant.linear import PackedLinear
from specdec.quant.methods.collect import Collector
from specdec.quant.methods.method import Stats


def decoder_layers(model: Any) -> str:
    """The name of the list of decoder layers: the outermost with as many layers as the configuration says."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and all(map(_has_linear, module))
    ]
    depth = min((name.count(".") for name in found), default=0)
    outermost: list[str] = [name for name in found if name.count(".") == depth]
    if len(outermost) != 1:
        seen = f"{len(outermost)} ({', '.join(outermost)})" if outermost else "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} should have one list of {count} decoder layers with linear layers in them, and "
            f"has {seen}; use the method rtn, which needs no calibration"
        )
    return outermost[0]


def _has_linear(module: nn.Module) -> bool:
    return any(linear_shape(child) is not None for child in module.modules())


class _Unpacked(nn.Module):
    """A packed layer's product with many rows, by one stock product with the weights that it stands for."""

    def __init__(self, layer: PackedLinear, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("weight", layer.weight_in(dtype))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]


@contextmanager
def unpacked(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For a while, unpack the weights of packed layers once instead of for each product: the same numbers, up to the
    order of sums. Layers that round activations stay."""
    found = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, PackedLinear) and not child.format.rounds_rows
    }
    for name, child in found.items():
        module.set_submodule(name, _Unpacked(child, dtype))
    try:
        yield
    finally:
        for name, child in found.items():
            module.set_submodule(name, child)


class _Enough(Exception):
    """The last block has been reached: what comes behind is not needed."""


@dataclass
class Call:
    """What a block is called with besides the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Stand(nn.Module):
    """Stands where a decoder block was, and has its attributes; `answer(hidden, call)` is what it gives."""

    def __init__(self, block: nn.Module, answer: Callable[[Tensor, Call], Any]):
        super().__init__()
        # Not a child: neither its names nor its parameters are to show.
        object.__setattr__(self, "block", block)
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        return self.answer(hidden, Call(args[1:], named))


class Walk:
    """The text at the input of block `at`; begins at the first block.

    `model` is a copy that is walked on: blocks may be changed between `run` and `advance`.
    Raises `UnsupportedModelError` for models without a list of decoder layers, and `InputError` for activations that
    are NaN or infinite.
    """

    @torch.no_grad()
    def __init__(self, model: Any, tokens_BT: Tensor):
        self.model, self.prefix, self.at = model, decoder_layers(model), 0
        self.blocks = list(model.get_submodule(self.prefix))
        self.device = next(model.parameters()).device
        self.tokens_BT = tokens_BT.to(self.device)
        self.hidden: list[Tensor] = []
        self.calls: list[list[Call]] = [[] for _ in self.blocks]  # [block][row]
        self._tuples = [False] * len(self.blocks)  # whether a block gives its hidden states in a tuple
        for row in range(len(self.tokens_BT)):
            self._record(row)
        self._check(self.hidden, "the embeddings")

    def _record(self, row: int) -> None:
        """The input of the first block for one row, and what all blocks are called with beside it.

        The first row runs through the blocks themselves, which shows what they return.
        """

        def answer(index: int) -> Callable[[Tensor, Call], Any]:
            def give(hidden: Tensor, call: Call) -> Any:
                if index == 0:
                    self.hidden.append(hidden)
                first = self.calls[index][0] if row else None
                call = Call(_shared(call.args, first and first.args), _shared(call.kwargs, first and first.kwargs))
                self.calls[index].append(call)
                out = hidden
                if row == 0:
                    given = self.blocks[index](hidden, *call.args, **call.kwargs)
                    self._tuples[index] = isinstance(given, tuple)
                    out = given[0] if isinstance(given, tuple) else given
                    if not isinstance(out, Tensor) or out.shape != hidden.shape:
                        raise UnsupportedModelError(
                            f"{self.name(index)} gives no hidden states of the shape that it is given; use the method "
                            "rtn, which needs no calibration"
                        )
                if index + 1 == len(self.blocks):
                    raise _Enough
                return (out,) if self._tuples[index] else out

            return give

        with self._stands(answer):
            try:
                self.model(input_ids=self.tokens_BT[row : row + 1], use_cache=False)
            except _Enough:
                return
        raise UnsupportedModelError(
            f"{type(self.model).__name__} does not run its {len(self.blocks)} decoder layers one after another; use "
            "the method rtn, which needs no calibration"
        )

    @contextmanager
    def _stands(self, answer: Callable[[int], Callable[[Tensor, Call], Any]]) -> Iterator[None]:
        layers = self.model.get_submodule(self.prefix)
        for index, block in enumerate(self.blocks):
            layers[index] = _Stand(block, answer(index))
        try:
            yield
        finally:
            for index, block in enumerate(self.blocks):
                layers[index] = block

    def name(self, index: int) -> str:
        return f"{self.prefix}.{index}"

    def run(self, row: int) -> Tensor:
        """The block's output for one row, `[1, T, H]`."""
        call = self.calls[self.at][row]
        out = self.blocks[self.at](self.hidden[row], *call.args, **call.kwargs)
        found: Tensor = out[0] if self._tuples[self.at] else out
        return found

    @torch.no_grad()
    def observe(self, inputs: dict[str, str], wanted: frozenset[str]) -> dict[str, Stats]:
        """What all rows do to the inputs of modules of the block: `{key: module name}` to `{key: Stats}`."""
        block = self.blocks[self.at]
        named = {key: (block.get_submodule(name), f"{self.name(self.at)}.{name}") for key, name in inputs.items()}
        return self._observe(named, wanted, self.run)

    @torch.no_grad()
    def observe_rest(self, names: list[str], wanted: frozenset[str]) -> dict[str, Stats]:
        """The same for modules outside of the blocks, once all blocks have been walked through."""
        layers_last = len(self.blocks) - 1

        def answer(row: int) -> Callable[[int], Callable[[Tensor, Call], Any]]:
            def at(index: int) -> Callable[[Tensor, Call], Any]:
                def give(hidden: Tensor, call: Call) -> Any:
                    out = self.hidden[row] if index == layers_last else hidden
                    return (out,) if self._tuples[index] else out

                return give

            return at

        def run(row: int) -> None:
            with self._stands(answer(row)):
                self.model(input_ids=self.tokens_BT[row : row + 1], use_cache=False)

        named = {name: (self.model.get_submodule(name), name) for name in names}
        return self._observe(named, wanted, run)

    def _observe(
        self, named: dict[str, tuple[nn.Module, str]], wanted: frozenset[str], run: Callable[[int], object]
    ) -> dict[str, Stats]:
        collectors = {key: Collector(name, wanted, self.tokens_BT.numel()) for key, (_, name) in named.items()}
        hooks = [
            module.register_forward_pre_hook(lambda _, args, c=collectors[key]: c.add(args[0]))
            for key, (module, _) in named.items()
        ]
        try:
            for row in range(len(self.tokens_BT)):
                run(row)
        finally:
            for hook in hooks:
                hook.remove()
        return {key: collector.finish() for key, collector in collectors.items()}

    @torch.no_grad()
    def advance(self) -> None:
        """Through the block as it is now."""
        with unpacked(self.blocks[self.at], self.hidden[0].dtype):
            self.hidden = [self.run(row) for row in range(len(self.hidden))]
        self._check(self.hidden, self.name(self.at))
        self.calls[self.at] = []
        self.at += 1

    @staticmethod
    def _check(hidden: list[Tensor], where: str) -> None:
        for row, states in enumerate(hidden):
            if not bool(torch.isfinite(states).all()):
                raise InputError(
                    f"the activations behind {where} are NaN or infinite on row {row} of the calibration text; check "
                    "the weights, or load the model in float32"
                )


def _shared(value: Any, first: Any) -> Any:
    """The value, with tensors of the first row in place of equal ones: positions and masks are kept once."""
    if isinstance(value, Tensor):
        same = isinstance(first, Tensor) and first.shape == value.shape and first.dtype == value.dtype
        return first if same and bool((first == value).all()) else value
    if type(value) in (tuple, list) and type(first) is type(value) and len(first) == len(value):
        return type(value)(_shared(a, b) for a, b in zip(value, first, strict=True))
    if type(value) is dict and type(first) is dict:
        return {key: _shared(item, first.get(key)) for key, item in value.items()}
    return value
