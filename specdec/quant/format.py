"""How the weights of a linear layer are stored: the interface, and formats by name.

Shape suffixes: N outputs, K inputs, M rows of activations.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.quant.bits import row_chunks

#: The tensors that one weight `[N, K]` is stored in, by name ("codes", "scales", ...).
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Format(ABC):
    """One way of storing a weight matrix `[N, K]` in fewer bytes. Stateless and comparable by `name`.

    What a product with stored weights gives: that of the same rows with `unpack(parts, x.dtype)`, so only the weights
    are rounded; or, where `rounds_rows` says so, of rows that are rounded to int8 too, each by a scale of its own.
    Either way no row depends on another.
    """

    #: Whether products round each row of activations too, to int8.
    rounds_rows: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As users write it, with every option that is not the default: `parse(format.name) == format`."""

    @abstractmethod
    def parts(self, N: int, K: int) -> dict[str, Part]:
        """What is stored of a weight `[N, K]`. `InputError` when the shape does not fit, saying which size would."""

    @abstractmethod
    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """Of a float weight. `InputError` for shapes that do not fit, and for NaN or infinite weights."""

    @abstractmethod
    def unpack(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[N, K]` that the parts stand for: exact in float32, then rounded to `dtype` once."""

    def num_bytes(self, N: int, K: int) -> int:
        """Bytes stored of a weight `[N, K]`, exactly."""
        return sum(part.num_bytes for part in self.parts(N, K).values())

    def bits(self, N: int = 4096, K: int = 4096) -> float:
        """Stored bits per weight of a matrix of this size."""
        return 8 * self.num_bytes(N, K) / (N * K)

    def check(self, parts: Parts, N: int, K: int) -> None:
        """`InputError` when tensors that came from outside are not what this format stores of `[N, K]`."""
        for name, part in self.parts(N, K).items():
            if name not in parts:
                raise InputError(f"{self.name} weights [{N}, {K}] store '{name}', which is missing")
            found = parts[name]
            if tuple(found.shape) != part.shape or found.dtype != part.dtype:
                raise InputError(
                    f"'{name}' of {self.name} weights [{N}, {K}] is {part.dtype} {list(part.shape)}; "
                    f"found {found.dtype} {list(found.shape)}"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<format {self.name}>"


class GridFormat(Format):
    """A format that chooses scales for groups of weights first, and then the nearest point of each group's grid.

    Methods that choose points themselves, one column after another, use the two steps apart.
    """

    @abstractmethod
    def group(self, K: int) -> int:
        """Inputs that share one scale within an output's row; divides K."""

    @abstractmethod
    def fit(self, weight_NK: Tensor) -> dict[str, Tensor]:
        """The stored parts but "codes": scales (and zeros) for a float weight."""

    @abstractmethod
    def encode(self, weight_NK: Tensor, fitted: Parts) -> Tensor:
        """The part "codes": nearest points to any float weight on the grid of `fitted`, saturating at its ends."""

    def nearest(self, columns_NM: Tensor, fitted: Parts) -> Tensor:
        """The points `[N, M]`, in float32, that `encode` chooses for M columns of the one group of `fitted`.

        By default the columns are filled up to a whole group.
        """
        M = columns_NM.shape[1]
        group = self.group(M)
        whole_NK = torch.nn.functional.pad(columns_NM, (0, -M % group))
        return self.unpack({"codes": self.encode(whole_NK, fitted), **fitted})[:, :M]

    def pack(self, weight_NK: Tensor) -> dict[str, Tensor]:
        self.parts(*weight_NK.shape)
        fitted = self.fit(finite(weight_NK))
        return {"codes": self.encode(weight_NK, fitted), **fitted}


def finite(weight_NK: Tensor) -> Tensor:
    """The weight, or an `InputError` that counts what cannot be stored."""
    bad = sum(int((~torch.isfinite(weight_NK[rows])).sum()) for rows in row_chunks(weight_NK))
    if bad:
        raise InputError(f"{bad} of {weight_NK.numel()} weights are NaN or infinite; such a weight cannot be quantised")
    return weight_NK


# What stands before the first "-" of a name, and how the options behind it are read.
_FAMILIES: dict[str, Callable[[tuple[str, ...]], Format]] = {}


def register_format(name: str, make: Callable[[tuple[str, ...]], Format]) -> None:
    """Make names `name` and `name-option-...` known; `make(options)` raises `InputError` for options it does not know.

    `InputError` when the name is taken.
    """
    if name in _FAMILIES:
        raise InputError(f"there is a format {name!r} already; choose another name")
    _FAMILIES[name] = make


def format_names() -> list[str]:
    return sorted(_FAMILIES)


@lru_cache(maxsize=256)
def parse(name: str) -> Format:
    """The format of a name such as "mxfp6_e2m3" or "int4-g64-asym-a8". `InputError` that lists those there are."""
    family, *options = name.lower().split("-")
    if options and options[-1] == "a8" and family in _FAMILIES:
        from specdec.quant.rows import with_rounded_rows

        return with_rounded_rows(parse("-".join((family, *options[:-1]))))
    if family not in _FAMILIES:
        near = difflib.get_close_matches(family, _FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"no weight format is called {name!r}; {hint}there are: {', '.join(format_names())}")
    return _FAMILIES[family](tuple(options))
