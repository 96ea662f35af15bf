"""Pruning the linear layers of a model: by magnitude, or by what their inputs make of each weight (Wanda).

What is left is stored by the sparse formats, or as delta-CSC. Embeddings, norms and the head stay as they are.

Shape suffixes: N outputs, K inputs, B rows of text, T tokens of a row.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.format import parse
from specdec.quant.layers import candidates, weight_of
from specdec.quant.sparse import Sparse, keep_largest

if TYPE_CHECKING:
    from specdec.quant.methods.walk import Walk

#: Called after each layer: how many are done, of how many, and the name of this one.
Progress = Callable[[int, int, str], None]

_LARGEST_GROUP = 1024


@dataclass(frozen=True)
class Pattern:
    """Which weights of a row are left: all but floor(K * sparsity), or `left` of each `group` of consecutive ones."""

    sparsity: Fraction
    left: int = 0
    group: int = 0

    @classmethod
    def of(cls, wanted: float | str | Sparse | Pattern) -> Pattern:
        """A share of weights to drop, as a number; "2:4" for two left of each four; or a sparse format or its name.

        Numbers are taken as they are written: 0.29 of 100 weights are 29. `InputError` for anything else.
        """
        if isinstance(wanted, Pattern):
            return wanted
        if isinstance(wanted, str) and ":" in wanted:
            return cls._group(wanted)
        if isinstance(wanted, str):
            format = parse(wanted)
            if not isinstance(format, Sparse):
                raise InputError(
                    f"{wanted} is no sparse format; name a share of weights, a pattern as 2:4, or sparse-60"
                )
            wanted = format
        if isinstance(wanted, Sparse):
            return cls._group("2:4") if wanted.percent is None else cls(Fraction(wanted.percent, 100))
        if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 <= wanted < 1:
            raise InputError(f"a sparsity is a number from 0 to below 1, or a pattern as 2:4; found {wanted!r}")
        return cls(Fraction(str(wanted)))

    @classmethod
    def _group(cls, text: str) -> Pattern:
        match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
        left, group = map(int, match.groups()) if match else (0, 0)
        if not 0 < left < group <= _LARGEST_GROUP:
            raise InputError(
                f"{text!r} is no pattern; 2:4 leaves two weights of each four, and groups are of up to {_LARGEST_GROUP}"
            )
        return cls(1 - Fraction(left, group), left, group)

    def keep(self, scores_NK: Tensor) -> Tensor:
        """bool `[N, K]`: the largest scores of each row, or group; of equal ones the first. `InputError` for a K that
        groups do not divide.
        """
        K = scores_NK.shape[1]
        if not self.group:
            return keep_largest(scores_NK, K - int(K * self.sparsity))
        if K % self.group:
            raise InputError(f"{K} inputs are no multiple of {self.group}; prune this layer by a share, or skip it")
        return keep_largest(scores_NK.unflatten(1, (-1, self.group)), self.left).flatten(1)


def prunable(model: Any, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The layers that are pruned, by module name: linear ones but the head, whose names no expression in `skip` finds.

    `UnsupportedModelError` where weights lie in stacks of matrices that pruning does not reach, unless skipped;
    `InputError` for an expression that finds nothing.
    """
    found = candidates(model)
    names = [name for name in found.shapes if name != found.head]
    stacks = [name for name, p in model.named_parameters() if p.ndim == 3 and min(p.shape) > 1]
    for pattern in skip:
        try:
            matched = [name for name in (*names, *stacks) if re.search(pattern, name)]
        except re.error as error:
            raise InputError(f"skip {pattern!r} is not a regular expression: {error}") from error
        if not matched:
            raise InputError(f"skip {pattern!r} matches no layer that could be pruned, such as {(*names, *stacks)[0]}")
        names = [name for name in names if name not in matched]
        stacks = [name for name in stacks if name not in matched]
    if stacks:
        raise UnsupportedModelError(
            f"{stacks[0]} is a stack of matrices, which pruning does not reach; leave such weights as they are with "
            f"skip={[re.escape(stacks[0])]!r} and the like"
        )
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layer to prune that is not skipped")
    return {name: model.get_submodule(name) for name in names}


@torch.no_grad()
def magnitude(
    model: Any,
    sparsity: float | str | Sparse | Pattern,
    *,
    in_place: bool = False,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> Any:
    """A copy of the model (or itself, `in_place`) in which each output's smallest weights are zero.

    `sparsity`: see `Pattern.of`; `skip`: see `prunable`. Lossless: no, weights are dropped.
    """
    pattern, layers = Pattern.of(sparsity), prunable(model, skip)
    check_weights(layers, pattern)
    model = model if in_place else copy.deepcopy(model)
    for done, name in enumerate(layers, 1):
        _prune(weight_of(model.get_submodule(name)), pattern)
        if progress is not None:
            progress(done, len(layers), name)
    return model


@torch.no_grad()
def wanda(
    model: Any,
    tokens_BT: Tensor,
    sparsity: float | str | Sparse | Pattern,
    *,
    in_place: bool = False,
    skip: Sequence[str] = (),
    progress: Progress | None = None,
) -> Any:
    """The same by |weight| times the norm of the weight's input over a text (Sun et al., arXiv 2306.11695).

    `tokens_BT`: int64 rows of text, all of one length. Block after block is scored on what the pruned blocks before it
    give; scores are compared within the row of an output, or within groups. Beside the model (and its copy), memory
    holds the input of one block for the whole text. `InputError` for ids that are not the model's, and activations that
    are NaN or infinite; `UnsupportedModelError` for models whose decoder layers cannot be walked through.
    Lossless: no, weights are dropped.
    """
    # Imported here: the calibration text may come from training's reader, and training uses what stands above.
    from specdec.quant.methods.calibration import check_tokens
    from specdec.runtime.copies import is_spread

    pattern, layers = Pattern.of(sparsity), prunable(model, skip)
    check_weights(layers, pattern)
    tokens_BT = check_tokens(tokens_BT, model, "wanda")
    if is_spread(model):
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} are spread out by accelerate hooks; load it on one device"
        )
    model = model if in_place else copy.deepcopy(model)
    left = list(layers)

    def prune(norms: Mapping[str, Tensor]) -> None:
        for name, norm_K in norms.items():
            _prune(weight_of(model.get_submodule(name)), pattern, norm_K)
            left.remove(name)
            if progress is not None:
                progress(len(layers) - len(left), len(layers), name)

    with _evaluating(model):
        walk = _walk(model, tokens_BT)
        for index in range(len(walk.blocks)):
            block = walk.name(index) + "."
            inner = {name: name.removeprefix(block) for name in left if name.startswith(block)}
            if inner:
                prune(_norms(walk.observe(inner, frozenset({"norm_K"}))))
            walk.advance()
        if left:
            prune(_norms(walk.observe_rest(left, frozenset({"norm_K"}))))
    return model


def _walk(model: Any, tokens_BT: Tensor) -> Walk:
    from specdec.quant.methods.walk import Walk

    try:
        return Walk(model, tokens_BT)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"Wanda follows a text through the model, which fails: {error}; or prune by magnitude"
        ) from error


def _norms(stats: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: found.norm_K for name, found in stats.items()}


def _prune(weight_NK: Tensor, pattern: Pattern, norm_K: Tensor | None = None) -> None:
    scores_NK = weight_NK.abs() if norm_K is None else weight_NK.abs().to(norm_K.dtype) * norm_K
    # Not by a product with the mask, which leaves negative zeros.
    weight_NK.masked_fill_(~pattern.keep(scores_NK), 0)


def check_weights(layers: Mapping[str, nn.Module], pattern: Pattern) -> None:
    """Before anything is changed."""
    for name, module in layers.items():
        weight_NK = weight_of(module)
        N, K = weight_NK.shape
        if pattern.group and K % pattern.group:
            raise InputError(
                f"{name} [{N}, {K}] cannot be pruned {pattern.left}:{pattern.group}, {K} not being a multiple of "
                f"{pattern.group}; prune by a share, or skip this layer"
            )
        bad = int((~torch.isfinite(weight_NK)).sum())
        if bad:
            raise InputError(f"{bad} weights of {name} are NaN or infinite; mend the model before it is pruned")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
