"""What a kind of training brings with it. The framework brings data, loop, checkpoints, evaluation, files.

Shape suffixes: B rows, L tokens of a row, V vocabulary, H hidden width, N starting positions, K drafted positions.

A kind is one class, derived from `Objective` and registered in the entry-point group `specdec.trainers`:

1. `options(parser)` adds its own options; `build(target, tokenizer, options)` makes the objective from their values
   (all of them, defaults included; `create` fills them in for callers from Python).
2. `begin(rows)` sees the training tokens once, before the first step and before a resumed run's weights are loaded.
3. In every training step `replace(tokens, mask)` may put other tokens in the place of the data's (on-policy text), then
   the frozen target runs once without gradients, and `loss(batch)` is what is minimised.
4. On held-out rows `acceptance(batch)` says how much of the target's probability the draft overlaps, position by
   position; the best weights by `expected_length` are kept.
5. `save(folder)` writes what `specdec.load(target, drafter=folder)` opens; `export` writes another project's layout.

Most kinds train a drafter. One that trains the target's own successor says so by `described`, `summary` and `usage`,
adds what it measures by `measures` and `judge`, and changes its course with the budget by `advance` and `settled`.

Conventions of positions. Logits at t are the target's distribution of token t + 1. A drafter starts from position t
knowing tokens 0..t and the target's hidden states 0..t - or, as the loop does it, tokens 0..t+1 and states 0..t. Which
of the two a kind means is its own affair; it reports only the starts t at which all of its K predictions exist.
"""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from specdec import registry
from specdec.errors import InputError


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of text and what the frozen target says about them, computed once.

    tokens_BL: int64. mask_BL: bool; where it is False, the target's prediction at that position does not count (what is
    behind the end of a text; padding is always at the end of a row). logits_BLV: float32, the target's raw logits.
    hidden: by `transformers` index (0 embeddings, number of layers = after the final norm), `[B, L, H]`, only those
    that `Objective.hidden` names, in the target's dtype. Nothing here requires gradients.
    """

    tokens_BL: Tensor
    mask_BL: Tensor
    logits_BLV: Tensor
    hidden: Mapping[int, Tensor] = field(default_factory=dict)

    def counted(self, values_BLV: Tensor) -> Tensor:
        """`[N, V]`: those at the positions that count."""
        return values_BLV.flatten(0, 1) if bool(self.mask_BL.all()) else values_BLV[self.mask_BL]

    def starts(self, last: int, first: int = 0) -> Tensor:
        """Bool `[B, L - last]`: the starts t at which positions t + first … t + last all count."""
        length = self.mask_BL.shape[1] - last
        if length < 1:
            raise InputError(
                f"rows of {self.mask_BL.shape[1]} tokens are too short for {last} positions; raise --length"
            )
        fits = self.mask_BL[:, first : first + length].clone()
        for offset in range(first + 1, last + 1):
            fits &= self.mask_BL[:, offset : offset + length]
        return fits


@dataclass(frozen=True, eq=False)
class Losses:
    """`loss`: a scalar with gradients, a mean over positions. `metrics`: detached scalars for the progress line."""

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """How one kind of drafter is trained. The target is frozen, in evaluation mode, shared, and never changed."""

    #: The name of the kind, as registered.
    kind: ClassVar[str]
    #: Layouts of other projects that `export` can write.
    layouts: ClassVar[tuple[str, ...]] = ()
    #: Fields of `Settings` whose defaults on the command line are other ones for this kind, such as `lr`.
    recommended: ClassVar[Mapping[str, Any]] = {}

    #: Commands to show under the options, each on a line of its own.
    examples: ClassVar[str] = ""
    #: Names of what `judge` measures beside acceptance.
    measures: ClassVar[tuple[str, ...]] = ()
    #: The command to try the result with, without `specdec`; `{target}` is " --target T" or empty, `{out}` the folder.
    usage: ClassVar[str] = "compare{target} --drafter {out}"

    #: What is trained: float32, `requires_grad` where wanted; its `state_dict` is what checkpoints hold. The target is
    #: no part of it. Assigned by `build`; the trainer moves it to the target's device and does not wrap it.
    module: nn.Module
    #: The target's hidden states wanted in a batch, by `transformers` index.
    hidden: tuple[int, ...] = ()
    #: Drafted positions K of `acceptance`.
    depth: int

    def __init__(self, target: Any, tokenizer: Any):
        self.target, self.tokenizer = target, tokenizer
        #: The values of the options that it was built from, for the record; `create` sets them.
        self.values: Mapping[str, Any] = {}

    @classmethod
    def options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of this kind, with their defaults. None of them may be required."""
        return None

    @classmethod
    @abstractmethod
    def build(cls, target: Any, tokenizer: Any, options: Mapping[str, Any]) -> Objective:
        """Make the objective; weights start from torch's global generator. Raises `InputError` for bad options."""

    @classmethod
    def check_texts(cls, texts: Iterable[str]) -> None:
        """`InputError` for documents that must not be trained on. Drafters may be trained on any."""
        return None

    def begin(self, rows: np.ndarray) -> None:
        """See the training tokens, int32 `[R, L]`, padding included; for example to choose a draft vocabulary.

        Called once, before the first step, in a resumed run too: it must give the same each time.
        """
        return None

    def replace(self, tokens_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the same shapes to train on in place of the data's; chance from torch's global generator only."""
        return tokens_BL, mask_BL

    @abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """Forward with gradients to `module`. Called in training mode."""

    @abstractmethod
    def acceptance(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Two `[N, K]` float tensors, one row for each start at which all K predictions exist and count.

        First: the overlap sum_v min(p, q) at temperature 1, over the target's whole vocabulary (a token outside a
        draft vocabulary has q = 0). Second: 1 where both have the same most probable token, else 0. Given the text's
        own tokens up to there. Called in evaluation mode, without gradients.
        """

    def judge(self, batch: Batch) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """What `acceptance` gives, and values `[N]` at held-out positions for each of `measures`: the curve has their
        means."""
        return (*self.acceptance(batch), {})

    def advance(self, share: float) -> None:
        """Told before the first step, and after each, which share of the budget is spent (1: all). The first row of
        the curve is from before.

        What it changes must be part of `module`'s state, for a resumed run is told nothing of what was before.
        """
        return None

    @property
    def settled(self) -> bool:
        """Whether weights may be kept from here on; while False, none are, and the run does not end early."""
        return True

    @classmethod
    def described(cls, row: Mapping[str, Any]) -> str:
        """A row of the curve in one line."""
        alphas = " ".join(f"{value:.2f}" for value in row["alpha_t1"])
        return (
            f"expected length {row['expected_length_t1']:.3f} at temperature 1, {row['expected_length_t0']:.3f} "
            f"greedy; by position {alphas}"
        )

    @classmethod
    def summary(cls, first: Mapping[str, Any], best: Mapping[str, Any]) -> list[str]:
        """Lines about the weights that were kept; `first`: the row before the first step."""
        lines = []
        for temperature in (1, 0):
            positions = "  ".join(f"{value:.3f}" for value in best[f"alpha_t{temperature}"])
            length = best[f"expected_length_t{temperature}"]
            lines.append(f"held-out, temperature {temperature}: {length:.3f} tokens a round; by position {positions}")
        return lines

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write safetensors and `config.json` whose `specdec_drafter` names the drafter that reads them.

        The tokenizer is written beside them by the framework. `folder` exists.
        """

    @classmethod
    def export(cls, source: Path, out: Path, layout: str) -> None:
        """Write the drafter saved in `source` to `out` in another project's layout, one of `layouts`."""
        raise InputError(f"{cls.kind} drafters have no {layout!r} layout to export to")


@dataclass
class Acceptance:
    """Held-out acceptance by drafted position, gathered over batches.

    Position k is decided only where all positions before it were accepted, so a start weighs there by its chance to
    get that far: alpha_k = sum_n a_n1 … a_nk / sum_n a_n1 … a_n(k-1). With that, 1 + sum_k prod_{i<=k} alpha_i is the
    expected acceptance length itself, not what it would be if positions were independent.
    """

    reached: Tensor | None = None  # [2, K + 1] float64: sums of the products, at temperatures 1 and 0; first: starts
    measured: dict[str, Tensor] = field(default_factory=dict)  # [2] float64: sum and number of other measures

    def add(self, overlap_NK: Tensor, agree_NK: Tensor, measures: Mapping[str, Tensor] | None = None) -> None:
        both = torch.stack((overlap_NK, agree_NK)).to("cpu", torch.float64)
        if not bool(((both >= -1e-6) & (both <= 1 + 1e-5)).all()):
            raise InputError("acceptance has values outside 0..1: the drafter's or the target's outputs are not finite")
        products = both.clamp(0, 1).cumprod(2).sum(1)
        sums = torch.cat((torch.full((2, 1), float(both.shape[1]), dtype=torch.float64), products), 1)
        self.reached = sums if self.reached is None else self.reached + sums
        for name, value_N in (measures or {}).items():
            pair = torch.tensor([value_N.double().sum().item(), value_N.numel()], dtype=torch.float64)
            self.measured[name] = self.measured.get(name, 0) + pair

    def sums(self, measures: Sequence[str]) -> Tensor:
        """Everything in one flat float64 tensor, whose sum over processes `restore` reads."""
        assert self.reached is not None
        nothing = torch.zeros(2, dtype=torch.float64)
        return torch.cat([self.reached.reshape(-1), *(self.measured.get(name, nothing) for name in measures)])

    def restore(self, sums: Tensor, measures: Sequence[str]) -> None:
        assert self.reached is not None
        count = self.reached.numel()
        self.reached = sums[:count].view_as(self.reached)
        self.measured = dict(zip(measures, sums[count:].view(-1, 2), strict=True))

    def means(self) -> dict[str, float]:
        """Of the other measures, over all positions."""
        return {name: (total / count).item() for name, (total, count) in self.measured.items()}

    def by_position(self, temperature: int) -> list[float]:
        """alpha_1 … alpha_K at temperature 1 or 0."""
        row = self._row(temperature)
        return [(row[k + 1] / row[k]).item() if row[k] > 0 else 0.0 for k in range(len(row) - 1)]

    def expected_length(self, temperature: int) -> float:
        """Tokens a round, the target's own included: 1 + sum_k prod_{i<=k} alpha_i."""
        row = self._row(temperature)
        return 1.0 + (row[1:].sum() / row[0]).item()

    def _row(self, temperature: int) -> Tensor:
        if self.reached is None or self.reached[0, 0] == 0:
            raise InputError("no held-out position can be evaluated; use longer rows (--length) or more held-out text")
        return self.reached[0 if temperature else 1]


def defaults(kind: type[Objective]) -> dict[str, Any]:
    """The values of a kind's options when none is given."""
    parser = argparse.ArgumentParser(add_help=False)
    kind.options(parser)
    return vars(parser.parse_args([]))


def create(kind: str | type[Objective], target: Any, tokenizer: Any = None, **options: Any) -> Objective:
    """An objective by name or class, with defaults for the options that are not given."""
    found: type[Objective] = registry.find("trainer", kind) if isinstance(kind, str) else kind
    values = defaults(found)
    unknown = sorted(options.keys() - values.keys())
    if unknown:
        raise InputError(f"{found.kind} training has no option {unknown[0]!r}; it has: {', '.join(sorted(values))}")
    values.update(options)
    objective = found.build(target, tokenizer, values)
    objective.values = values
    return objective
