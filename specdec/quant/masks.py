"""Zeros that stay zero while a pruned model is trained, and how many there are to be at each step.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdec.errors import InputError
from specdec.quant.layers import weight_of
from specdec.quant.pruning import Pattern, check_weights, prunable
from specdec.quant.sparse import Sparse


def cubic_sparsity(step: float, end: float, final: float, *, begin: float = 0, initial: float = 0.0) -> float:
    """How much is to be dropped at a step of training: `initial` up to step `begin`, `final` from step `end` on.

    Between: final + (initial - final) (1 - (step - begin) / (end - begin))^3, so most is dropped early, while much is
    left to take over (Zhu & Gupta, arXiv 1710.01878). Steps may be shares of a run. `InputError` for a sparsity outside
    of 0 to 1, one that falls, or an end that does not lie behind the beginning.
    """
    if not 0 <= initial <= final < 1 or not begin < end:
        raise InputError(
            "pruning goes from one share to a larger one below 1, and from one step to a later one; "
            f"found {initial} to {final}, and {begin} to {end}"
        )
    if step <= begin or step >= end:  # to the last bit: counts are rounded down
        return initial if step <= begin else final
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


class Masks:
    """Keeps zeros zero while a model is trained: `apply` behind each step of the optimiser.

    Nothing else need be saved to resume: the zeros of the weights say it all, and `of` reads them.
    """

    def __init__(self, kept: Mapping[str, tuple[nn.Module, Tensor]]):
        self._kept = dict(kept)

    @classmethod
    def of(cls, model: Any, skip: Sequence[str] = ()) -> Masks:
        """Of the weights that are not zero now, in all layers that `prunable` finds."""
        return cls({name: (module, weight_of(module).detach() != 0) for name, module in prunable(model, skip).items()})

    @property
    def sparsity(self) -> dict[str, float]:
        """The share of weights dropped, by module name."""
        return {name: 1 - int(kept.sum()) / kept.numel() for name, (_, kept) in self._kept.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Make the weights that were dropped zero again, in place."""
        for module, kept in self._on_device():
            weight_of(module).masked_fill_(~kept, 0)

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """Make their gradients zero, in place, before gradients are clipped: they are no part of the norm."""
        for module, kept in self._on_device():
            gradient = module.weight.grad
            if isinstance(gradient, Tensor):
                (gradient.T if isinstance(module, Conv1D) else gradient).masked_fill_(~kept, 0)

    @torch.no_grad()
    def prune(self, sparsity: float | str | Sparse | Pattern) -> None:
        """Drop the smallest weights of each row that are left, until it has that many zeros. None comes back."""
        pattern = Pattern.of(sparsity)
        check_weights({name: module for name, (module, _) in self._kept.items()}, pattern)
        for name, (module, kept) in self._kept.items():
            weight_NK = weight_of(module)
            kept = kept.to(weight_NK.device)
            self._kept[name] = (module, kept & pattern.keep(weight_NK.abs().masked_fill(~kept, 0)))
        self.apply()

    def _on_device(self) -> Iterator[tuple[nn.Module, Tensor]]:
        for module, kept in self._kept.values():
            yield module, kept.to(weight_of(module).device)
