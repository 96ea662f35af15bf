"""A recipe's method at work on a model, block by block: look at inputs, fold scales, round, go on with what came out.

Shape suffixes: B rows, T tokens, N outputs, K inputs, P channels of the module that a scale is folded into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdec.errors import InputError, UnsupportedModelError
from specdec.quant.format import Format
from specdec.quant.layers import candidates, weight_of
from specdec.quant.linear import PackedLinear
from specdec.quant.methods.calibration import check_tokens
from specdec.quant.methods.folding import LINEAR, NORM, Anatomy, Fold, Group, divided, representable
from specdec.quant.methods.method import Linear, Method, Prepared, Stats, create, working
from specdec.quant.methods.walk import Walk
from specdec.quant.recipe import Recipe
from specdec.runtime.copies import shared_copy

#: Told as the work goes on: steps done, steps in all, what comes next.
Told = Callable[[int, int, str], None]


def apply(
    model: Any, recipe: Any, calibration_tokens: Tensor | None = None, *, progress: Told | None = None
) -> Prepared:
    """The stored parts of every module that the recipe chooses, by the recipe's method. The model stays as it is.

    `calibration_tokens`: int64 `[B, T]` (`specdec.quant.methods.calibration`); methods that look at no activations need
    none. What the model was changed into beside its parts is in `Prepared.changed`: see there.

    Each block sees what the blocks before it give once they are quantised. Memory beyond the model's and the result's:
    the hidden states of the text, twice, and one block's weights in float32 with the statistics of its inputs.
    Raises `InputError` for text, options or formats that do not fit the method, and for activations that are NaN;
    `UnsupportedModelError` for a model without a list of decoder layers. Lossless: no, weights are rounded.
    """
    result = Prepared()
    for piece in Run(model, recipe, calibration_tokens, progress).pieces():
        result.add(piece)
    return result


def prepare_model(
    model: Any, recipe: Any, calibration_tokens: Tensor | None = None, *, progress: Told | None = None
) -> Any:
    """A copy of the model with packed layers, as `apply` makes them, for use in memory.

    Its `quantisation_notes` say what was left out. It shares all other tensors with the model, which stays as it is.
    Lossless: no, weights are rounded.
    """
    run = Run(model, recipe, calibration_tokens, progress)
    notes = Prepared()
    for piece in run.pieces():
        notes.add(Prepared(notes=piece.notes))
    run.twin.quantisation_notes = notes.notes
    return run.twin


class Run:
    """One pass over a model. `pieces` gives the result block by block, so that it can be written as it is made.

    `twin`: a copy that shares the model's tensors and ends as the quantised model.
    """

    def __init__(self, model: Any, recipe: Any, tokens_BT: Tensor | None, progress: Told | None = None):
        self.recipe = Recipe.of(recipe)
        self.method: Method = create(self.recipe.method, self.recipe.options)
        found = candidates(model)
        self.formats = self.recipe.assign(found)
        self.method.check(self.formats)
        self.tokens_BT = check_tokens(tokens_BT, model, self.recipe.method) if self.method.needs else None
        self.twin = shared_copy(model).eval()
        self.progress = progress or (lambda done, of, what: None)

    @torch.no_grad()
    def pieces(self) -> Iterator[Prepared]:
        if self.tokens_BT is None:
            yield from self._plain()
            return
        self.progress(0, 1, "calibration text")
        walk = Walk(self.twin, self.tokens_BT)
        count = len(walk.blocks)
        inside = tuple(f"{walk.name(index)}." for index in range(count))
        rest = [name for name in self.formats if not name.startswith(inside)]
        for index in range(count):
            self.progress(index, count + bool(rest), walk.name(index))
            yield self._block(walk)
            walk.advance()
        if rest:
            self.progress(count, count + 1, ", ".join(rest))
            yield self._rest(walk, rest)
        self.progress(count + bool(rest), count + bool(rest), "")

    def _plain(self) -> Iterator[Prepared]:
        """Of a method that looks at no activations: a module is a piece."""
        for done, (name, format) in enumerate(self.formats.items()):
            self.progress(done, len(self.formats), name)
            weight_NK = working(weight_of(self.twin.get_submodule(name)))
            yield self._stored({name: self._round(name, weight_NK, format, Stats())})
        self.progress(len(self.formats), len(self.formats), "")

    def _round(self, name: str, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        try:
            return self.method.round(weight_NK, format, stats)
        except InputError as error:
            raise InputError(f"{name} cannot be stored as {format.name} by {self.recipe.method}: {error}") from error

    def _stored(
        self, parts: dict[str, dict[str, Tensor]], changed: dict[str, Tensor] | None = None, notes: Any = ()
    ) -> Prepared:
        """The piece, once the twin has it."""
        for full, tensor in (changed or {}).items():
            name, _, parameter = full.rpartition(".")
            setattr(self.twin.get_submodule(name), parameter, nn.Parameter(tensor, requires_grad=False))
        for name, stored in parts.items():
            module = self.twin.get_submodule(name)
            N, K = weight_of(module).shape
            self.twin.set_submodule(name, PackedLinear(self.formats[name], K, N, module.bias, stored))
        return Prepared(parts, {name: self.formats[name] for name in parts}, changed or {}, list(notes))

    # ---------------------------------------------------------------- a block

    def _block(self, walk: Walk) -> Prepared:
        prefix, block = walk.name(walk.at), walk.blocks[walk.at]
        anatomy = Anatomy.of(block, walk.hidden[0], walk.calls[walk.at][0])
        groups = anatomy.find_folds(self._head_width(), lambda group, fold: self._objection(prefix, group, fold))
        groups = [group for group in groups if any(f"{prefix}.{name}" in self.formats for name in group.layers)]
        stats = walk.observe({group.layers[0]: group.layers[0] for group in groups}, self.method.needs)
        missed = {name for name in self.formats if name.startswith(f"{prefix}.")}
        missed -= {f"{prefix}.{name}" for group in groups for name in group.layers}
        if missed:
            raise UnsupportedModelError(
                f"{min(missed)} is not run as a layer by its block, so its input cannot be seen; keep it by a rule, or "
                "use the method rtn"
            )
        piece = _Folding(self, prefix, block, groups, stats)
        # From the last group to the first: scaling the input of a layer changes the weights of the one before.
        for group in reversed(groups):
            piece.scale(group)
        parts = {}
        for group in groups:
            for name in group.layers:
                full = f"{prefix}.{name}"
                if full in self.formats:
                    format, seen = self.formats[full], stats[group.layers[0]]
                    parts[full] = self._round(full, piece.weight(name), format, seen)
        return self._stored(parts, piece.changed, piece.notes)

    def _objection(self, prefix: str, group: Group, fold: Fold) -> str | None:
        """Why a fold must not be used although it may be exact."""
        kept = [name for name in group.layers if f"{prefix}.{name}" not in self.formats]
        if kept:
            return f"{kept[0]} reads the same input and is kept in full precision"
        if fold.kind == LINEAR and f"{prefix}.{fold.producer}" not in self.formats:
            return f"{fold.producer}, which would take up the scales, is kept in full precision"
        config = self.twin.config.get_text_config(decoder=True)
        if fold.kind == LINEAR and getattr(config, "num_kv_shared_layers", None):
            return "later layers read this layer's keys and values"
        return None

    def _head_width(self) -> int | None:
        config = self.twin.config.get_text_config(decoder=True)
        heads = getattr(config, "num_attention_heads", None)
        return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)

    def _rest(self, walk: Walk, names: list[str]) -> Prepared:
        """Layers outside of the blocks, such as the head. Nothing is folded there: the input of the head is read by
        others too (drafters that follow hidden states)."""
        stats = walk.observe_rest(names, self.method.needs)
        parts = {}
        for name in names:
            weight_NK = working(weight_of(self.twin.get_submodule(name)))
            parts[name] = self._round(name, weight_NK, self.formats[name], stats[name])
        return self._stored(parts)


class _Folding:
    """The weights of one block as they are once scales have moved."""

    def __init__(self, run: Run, prefix: str, block: nn.Module, groups: list[Group], stats: dict[str, Stats]):
        self.run, self.prefix, self.block, self.stats = run, prefix, block, stats
        self.weights: dict[str, Tensor] = {}
        self.changed: dict[str, Tensor] = {}  # by full name
        self.notes: list[str] = []

    def weight(self, name: str) -> Tensor:
        if name not in self.weights:
            self.weights[name] = working(weight_of(self.block.get_submodule(name)))
        return self.weights[name]

    def scale(self, group: Group) -> None:
        method, key = self.run.method, group.layers[0]
        if group.fold is None:
            if type(method).scales is not Method.scales:
                self.notes.append(f"{', '.join(group.layers)}: input not scaled, since {group.reason}")
            return
        layers = [Linear(name, self.weight(name), self.run.formats[f"{self.prefix}.{name}"]) for name in group.layers]
        s_K = method.scales(layers, self.stats[key], group.fold.kind, group.fold.shared)
        if s_K is None:
            return
        if not bool((torch.isfinite(s_K) & (s_K > 0)).all()):
            raise InputError(f"{self.prefix}.{key}: the method's scales are not all positive numbers")
        s_P = group.fold.of_producer(s_K)
        if group.fold.kind == NORM:
            s_P = representable(self.block.get_submodule(group.fold.producer), group.fold, s_P)
        s_K = group.fold.of_input(s_P)
        for layer in layers:
            self.weights[layer.name] = layer.weight_NK * s_K.to(layer.weight_NK)
        self._divide(group.fold, s_P)
        self.stats[key] = self.stats[key].divided(s_K)

    def _divide(self, fold: Fold, s_P: Tensor) -> None:
        module = self.block.get_submodule(fold.producer)
        for parameter, tensor in divided(module, fold, s_P).items():
            if fold.kind == LINEAR and parameter == "weight":
                weight_NK = self.weight(fold.producer)
                self.weights[fold.producer] = weight_NK / s_P.to(weight_NK)[:, None]
            else:
                self.changed[f"{self.prefix}.{fold.producer}.{parameter}"] = tensor
