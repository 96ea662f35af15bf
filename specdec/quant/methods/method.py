"""What a post-training method is: scales that move error elsewhere, and a way of rounding.

Shape suffixes: N outputs, K inputs, T tokens.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.kernels import packed
from specdec.quant.format import Format, Parts

#: What a method may ask to be told about the inputs of a layer: fields of `Stats`.
KNOWN_STATS = frozenset({"mean_abs_K", "amax_K", "norm_K", "hessian_KK", "rows_TK"})


@dataclass
class Stats:
    """What the calibration text did to one input `[.., K]`; only what the method asked for is there.

    mean_abs_K, amax_K, norm_K: mean and largest magnitude, and root of the sum of squares, of each channel. hessian_KK:
    2 X^T X / tokens, that of the squared error of a product. rows_TK: a sample of the rows, evenly spaced. float32, or
    float64 where the model is.
    """

    count: int = 0
    mean_abs_K: Tensor | None = None
    amax_K: Tensor | None = None
    norm_K: Tensor | None = None
    hessian_KK: Tensor | None = None
    rows_TK: Tensor | None = None

    def divided(self, s_K: Tensor) -> Stats:
        """Of the input divided by `s_K`, channel by channel."""

        def by(value: Tensor | None, s: Tensor) -> Tensor | None:
            return None if value is None else value / s.to(value)

        hessian = None if self.hessian_KK is None else by(by(self.hessian_KK, s_K), s_K[:, None])
        mean, amax, norm, rows = (by(v, s_K) for v in (self.mean_abs_K, self.amax_K, self.norm_K, self.rows_TK))
        return Stats(self.count, mean, amax, norm, hessian, rows)


def have(value: Tensor | None, name: str) -> Tensor:
    """A statistic that a method declared in `needs`."""
    if value is None:
        raise AssertionError(f"the method reads {name} and does not name it in `needs`")
    return value


@dataclass(frozen=True)
class Linear:
    """One layer of a group: its name, its weight `[N, K]` in float32 (float64 where the model is), its format."""

    name: str
    weight_NK: Tensor
    format: Format


class Method(ABC):
    """One way of choosing stored values. Subclasses are frozen dataclasses whose fields are the options of a recipe."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Stats` that it reads. Empty: it needs no calibration text."""
        return frozenset()

    def check(self, formats: Mapping[str, Format]) -> None:  # noqa: B027 - most can work on anything
        """`InputError` when the method cannot work on modules in these formats, by module name."""

    def scales(
        self, layers: list[Linear], stats: Stats, into: str, shared: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Positive `s_K`: the input that these layers share is divided by it and their weights multiplied.

        Asked only where the division can be folded exactly: `into` a "norm" or a "linear" layer. `shared` makes scales
        equal for channels that one channel of that layer feeds. None: leave the input as it is.
        """
        return None

    @abstractmethod
    def round(self, weight_NK: Tensor, format: Format, stats: Stats) -> dict[str, Tensor]:
        """The stored parts of a weight."""


@dataclass
class Prepared:
    """What a method made of a model.

    `parts`: the stored tensors of each module that the recipe chose. `formats`: theirs. `changed`: float tensors of
    the model by their names in its state dict (weights and biases of norms, and biases, that took up scales), which
    must be stored and loaded in place of the model's own; all others are as they were. `notes`: what was left out, and
    why. Parts without `changed`, or the other way round, are another model.
    """

    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, other: Prepared) -> None:
        self.parts.update(other.parts)
        self.formats.update(other.formats)
        self.changed.update(other.changed)
        self.notes += [note for note in other.notes if note not in self.notes]


_METHODS: dict[str, type[Method]] = {}


def register_method(name: str, method: type[Method]) -> None:
    """Make `method=name` known to recipes. `InputError` when the name is taken, or it is no dataclass."""
    if not is_dataclass(method):
        raise InputError(f"the method {name!r} is no dataclass: its fields are what a recipe may set")
    if _METHODS.setdefault(name, method) is not method:
        raise InputError(f"there is a method {name!r} already; choose another name")


def method_names() -> list[str]:
    return sorted(_METHODS)


def create(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by name. `InputError` with the nearest names for an unknown one, or for an unknown option."""
    if name not in _METHODS:
        raise InputError(f"no method is called {name!r}; {_nearest(name, _METHODS)}there are: {names_of(_METHODS)}")
    known = [f.name for f in fields(_METHODS[name]) if f.init]  # type: ignore[arg-type]
    for option in options or {}:
        if option not in known:
            there = f"it has: {names_of(known)}" if known else "it has none"
            raise InputError(f"the method {name!r} has no option {option!r}; {_nearest(option, known)}{there}")
    return _METHODS[name](**(options or {}))


def names_of(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def number(name: str, value: Any, low: float, high: float) -> None:
    """`InputError` unless an option is a number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{name} is a number from {low:g} to {high:g}, not {value!r}")


def product(rows_TK: Tensor, format: Format, parts: Parts) -> Tensor:
    """`[T, N]`: what a layer with these parts gives, in the dtype of the rows, by one product of many rows."""
    if format.rounds_rows:
        return packed.reference(rows_TK, format, parts)
    return rows_TK @ format.unpack(parts, rows_TK.dtype).t()


def working(tensor: Tensor) -> Tensor:
    """As methods compute with it: float32, or float64 as it is."""
    return tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().float()
