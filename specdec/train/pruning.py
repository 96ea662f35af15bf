"""Which weights of sparse layers are left while they are trained: dropped at once, or in steps with training between.

Shape suffixes: R rows of text, L tokens of a row, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError
from specdec.quant.masks import cubic_sparsity
from specdec.quant.pruning import Pattern
from specdec.quant.sparse import Sparse
from specdec.train.rounding import RoundedLinear

PRUNERS = ("magnitude", "wanda")
_ROWS = 8  # of calibration text in one forward


class Pruning:
    """Drops the weights with the lowest scores: |w| (magnitude), or |w| times the norm of its input over some text, in
    the full-precision model (Wanda, arXiv 2306.11695). Scores are compared within the row of an output.

    In n steps, after the i-th of which a layer that ends with a share s dropped has s (1 - (1 - i/n)^3) dropped
    (`cubic_sparsity`). The first lies before the first step of training, the last `share` of the run later. What was
    dropped stays so.
    """

    def __init__(self, layers: Mapping[str, RoundedLinear], score: str, steps: int, share: float):
        self.layers = {name: layer for name, layer in layers.items() if layer.mask is not None}
        pairs = next((n for n, layer in self.layers.items() if _percent(layer) is None), None)
        if steps > 1 and pairs is not None:
            raise InputError(
                f"{pairs} keeps two of each four weights, which cannot be pruned in steps: --prune-steps 1"
            )
        if not self.layers and (steps > 1 or score != "magnitude"):
            raise InputError(
                "this recipe has no sparse format, so there is nothing to prune; leave out --prune options"
            )
        self.score, self.steps, self.share = score, steps, share
        self.settled = not self.layers or steps == 1
        self.norms: dict[str, Tensor] = {}

    @property
    def needs_activations(self) -> bool:
        return bool(self.layers) and self.score == "wanda"

    @torch.no_grad()
    def look(self, target: Any, tokens_RL: Tensor) -> None:
        """Norms `[K]` of the inputs of each layer, float32, over all positions of some rows of text."""
        sums: dict[str, Tensor] = {}

        def add(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found_K = inputs[0].flatten(0, -2).double().square().sum(0)
                sums[name] = sums[name] + found_K if name in sums else found_K

            return hook

        handles = [target.get_submodule(name).register_forward_pre_hook(add(name)) for name in self.layers]
        try:
            for piece in tokens_RL.split(_ROWS):
                target(input_ids=piece.to(target.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.layers if name not in sums]
        if unused:
            raise InputError(f"{unused[0]} has no input on the calibration text; use --prune magnitude")
        self.norms = {name: total_K.sqrt().float() for name, total_K in sums.items()}

    def advance(self, share: float) -> None:
        """Drop what is due when `share` of the run is over; each step once, in a resumed run too."""
        stage = min(self.steps, 1 + int(share / self.share * (self.steps - 1) + 1e-9)) if self.steps > 1 else 1
        for name, layer in self.layers.items():
            if int(layer.stage) < stage:
                layer.prune(self._mask(name, layer, stage), stage)
        self.settled = stage == self.steps or not self.layers

    def _mask(self, name: str, layer: RoundedLinear, stage: int) -> Tensor:
        scores_NK = layer.weight.detach().abs() if int(layer.stage) == 0 else layer.masters().abs()
        if self.norms:
            scores_NK = scores_NK * self.norms[name].to(scores_NK.device)
        percent = _percent(layer)
        if percent is None or stage == self.steps:
            assert isinstance(layer.format, Sparse)
            return Pattern.of(layer.format).keep(scores_NK)
        return Pattern.of(cubic_sparsity(stage, self.steps, percent / 100)).keep(scores_NK)


def _percent(layer: RoundedLinear) -> int | None:
    """None where two of each four weights are kept."""
    assert isinstance(layer.format, Sparse)
    return layer.format.percent
