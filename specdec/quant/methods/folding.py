"""Where scales can go: which layers of a block share an input, and what can be divided so that they may be multiplied.

Nothing is taken from names alone. Modules that read and write the same tensor are found by running the block; a fold
is used when the block gives the same output with it.

Shape suffixes: N outputs, K inputs, P channels of the module that a scale is folded into.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from specdec.quant.layers import linear_shape, weight_of
from specdec.quant.methods.walk import Call

NORM, LINEAR = "norm", "linear"
# How far an exact fold may move a block's output, relative to what the scales would do without it. Scales of the trial
# are powers of two, so that next to nothing rounds differently; but a norm that stores weight - 1 rounds it once more,
# and in float32 at best.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_TOLERANCE_NARROW = 0.03


@dataclass(frozen=True)
class Fold:
    """`producer`: the name of the module within the block that is divided.

    `kind`: a norm, or a linear layer. `offset`: a norm that multiplies by 1 + weight. `source_K`: for each channel of
    the input, the channel of the producer that it comes from (key-value heads feed several query heads).
    """

    producer: str
    kind: str
    source_K: Tensor
    offset: bool = False

    @property
    def channels(self) -> int:
        return int(self.source_K.max()) + 1

    def of_producer(self, s_K: Tensor) -> Tensor:
        """`[P]`: the geometric mean over the channels that one channel feeds."""
        sums = torch.zeros(self.channels, dtype=s_K.dtype, device=s_K.device)
        source_K = self.source_K.to(s_K.device)
        total = sums.index_add(0, source_K, s_K.log())
        count = sums.index_add(0, source_K, torch.ones_like(s_K))
        return (total / count).exp()

    def of_input(self, s_P: Tensor) -> Tensor:
        return s_P[self.source_K.to(s_P.device)]

    def shared(self, s_K: Tensor) -> Tensor:
        """`s_K`, made equal for channels with one source."""
        return self.of_input(self.of_producer(s_K)) if self.channels < len(s_K) else s_K


@dataclass
class Group:
    """Linear layers of a block that read one tensor, by name within the block; `fold` None: `reason` says why."""

    layers: list[str]
    fold: Fold | None = None
    reason: str = ""


@dataclass(frozen=True)
class _Seen:
    name: str
    module: nn.Module
    input: Tensor
    output: Tensor


def _place(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


@dataclass
class Anatomy:
    """What a block does with one row: its linear layers and what looks like norms, in the order in which they ran."""

    block: nn.Module
    hidden: Tensor
    call: Call
    seen: list[_Seen] = field(default_factory=list)

    @classmethod
    @torch.no_grad()
    def of(cls, block: nn.Module, hidden: Tensor, call: Call) -> Anatomy:
        found = cls(block, hidden, call)
        hooks = [
            module.register_forward_hook(
                # Held, so that no two tensors have had one address.
                lambda module, args, output, name=name: found.seen.append(_Seen(name, module, args[0], output))
            )
            for name, module in block.named_modules()
            if linear_shape(module) is not None or _is_norm(module)
        ]
        try:
            found.output()
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def output(self, changed: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output with some of its parameters replaced."""
        out = functional_call(self.block, dict(changed or {}), (self.hidden, *self.call.args), self.call.kwargs)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    def groups(self) -> list[Group]:
        """In the order in which they ran. A layer that runs more than once is alone and has no fold."""
        found: dict[Any, Group] = {}
        times: dict[str, int] = {}
        for seen in self.seen:
            times[seen.name] = times.get(seen.name, 0) + 1
        for seen in self.seen:
            if linear_shape(seen.module) is None:
                continue
            if times[seen.name] > 1:
                found.setdefault(seen.name, Group([seen.name], reason="it runs more than once"))
                continue
            found.setdefault(_place(seen.input), Group([])).layers.append(seen.name)
        return list(found.values())

    def candidates(self, group: Group, head_width: int | None) -> list[Fold]:
        """What may be divided for a group: the norm that wrote its input, or linear layers before it beside it."""
        first = next(seen for seen in self.seen if seen.name == group.layers[0])
        K = int(first.input.shape[-1])
        every = torch.arange(K)
        for seen in self.seen:
            if linear_shape(seen.module) is None and _place(seen.output) == _place(first.input):
                if seen.module.weight.shape != (K,):  # type: ignore[operator, union-attr]
                    return []
                return [Fold(seen.name, NORM, every, offset) for offset in (False, True)]
        folds = []
        for seen in self.seen[: self.seen.index(first)]:
            shape = linear_shape(seen.module)
            beside = seen.name.rpartition(".")[0] == first.name.rpartition(".")[0]
            if shape is None or not beside or K % shape[0] or seen.name in group.layers:
                continue
            if shape[0] == K:
                folds.append(Fold(seen.name, LINEAR, every))
            elif head_width and shape[0] % head_width == 0:
                heads = torch.arange(shape[0]).view(-1, 1, head_width)
                folds.append(Fold(seen.name, LINEAR, heads.expand(-1, K // shape[0], -1).reshape(-1)))
        return folds

    @torch.no_grad()
    def is_exact(self, group: Group, fold: Fold, plain: Tensor) -> bool:
        """Whether the block gives its output `plain` when powers of two are folded."""
        generator = torch.Generator().manual_seed(0)
        s_P = (2.0 ** torch.randint(-2, 3, (fold.channels,), generator=generator)).to(plain)
        s_K = fold.of_input(s_P)
        consumers = {
            f"{name}.weight": oriented(module, weight_of(module) * s_K.to(weight_of(module)))
            for name, module in ((name, self.block.get_submodule(name)) for name in group.layers)
        }
        producer = divided(self.block.get_submodule(fold.producer), fold, s_P)
        named = {f"{fold.producer}.{name}": tensor for name, tensor in producer.items()}
        alone = (self.output(consumers) - plain).double().norm()
        both = (self.output({**consumers, **named}) - plain).double().norm()
        return bool(
            torch.isfinite(alone) & (alone > 0) & (both <= _TOLERANCE.get(plain.dtype, _TOLERANCE_NARROW) * alone)
        )

    def find_folds(self, head_width: int | None, allowed: Callable[[Group, Fold], str | None]) -> list[Group]:
        """The groups, each with the fold that is exact and `allowed` (which gives a reason against it, or None)."""
        groups, plain = self.groups(), self.output()
        for group in groups:
            if group.reason:
                continue
            for fold in self.candidates(group, head_width):
                reason = allowed(group, fold)
                if reason is not None:
                    group.reason = group.reason or reason
                elif self.is_exact(group, fold, plain):
                    group.fold, group.reason = fold, ""
                    break
            if group.fold is None and not group.reason:
                group.reason = "no norm or linear layer before it takes up scales exactly"
        return groups


def _is_norm(module: nn.Module) -> bool:
    """By shape: a module of one weight vector, and perhaps a bias."""
    weight = getattr(module, "weight", None)
    names = {name for name, _ in module.named_parameters()}
    return isinstance(weight, Tensor) and weight.ndim == 1 and names <= {"weight", "bias"}


def oriented(module: nn.Module, weight_NK: Tensor) -> Tensor:
    """A weight as the module stores it."""
    return weight_NK.t() if isinstance(module, Conv1D) else weight_NK


def divided(module: nn.Module, fold: Fold, s_P: Tensor) -> dict[str, Tensor]:
    """The parameters of a producer divided by `s_P`, in their dtypes."""
    found: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters(recurse=False):
        wide = tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
        s = s_P.to(wide)
        if name == "weight" and fold.kind == LINEAR:
            wide = oriented(module, weight_of(module).detach().to(wide) / s[:, None])
        elif name == "weight" and fold.offset:
            wide = (1 + wide) / s - 1
        else:
            wide = wide / s
        found[name] = wide.to(tensor.dtype)
    return found


def representable(module: nn.Module, fold: Fold, s_P: Tensor) -> Tensor:
    """The scales nearest to `s_P` by which the norm's weight can be divided in its own dtype."""
    weight: Tensor = module.weight.detach()  # type: ignore[union-attr, operator]
    wide = weight if weight.dtype == torch.float64 else weight.float()
    after = divided(module, fold, s_P)["weight"].to(wide)
    if fold.offset:
        wide, after = 1 + wide, 1 + after
    return torch.where((wide != 0) & (after != 0), wide / after, 1.0).to(s_P)
