"""What an artefact is exported with: plain data that its manifest carries and its cache key hashes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from typing_extensions import Self

from specdec.errors import InputError


@dataclass(frozen=True)
class Method:
    """One graph of fixed width. `one_logit`: it computes the logits of one row, which is named with each call."""

    name: str
    width: int
    one_logit: bool = False


@dataclass(frozen=True)
class Options:
    """What is common to all backends; each has more in a subclass of its own.

    `prefill_len`: rows of the graph that reads prompts (AR-N), in chunks; 1: the decode graph reads them (kv mode).
    `k`: drafted tokens per verification, one graph of k + 1 rows for each; 0 is plain decoding. `max_seq_len`: the
    artefact's context; behind it there is room for the nodes of trees of at most `max_nodes`. `hidden`: states of the
    target that graphs return, for drafters that read them. `recipe`: how weights are stored, None: as they are; each
    backend has names of its own. `parts`: programs that the layers are spread over, which run in turn.
    """

    backend: ClassVar[str] = ""

    prefill_len: int = 32
    k: tuple[int, ...] = (0, 3, 6)
    max_seq_len: int = 512
    max_nodes: int = 32
    hidden: tuple[int, ...] = ()
    recipe: str | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        if self.prefill_len < 1 or self.max_seq_len < 2:
            raise InputError("prefill_len is a whole number >= 1, and max_seq_len one >= 2")
        if self.parts < 1:
            raise InputError(f"parts is a whole number >= 1, not {self.parts}")
        if self.max_nodes < 0:
            raise InputError(f"max_nodes is a whole number >= 0, not {self.max_nodes}")
        if not self.k or any(k < 0 for k in self.k):
            raise InputError(f"k is a list of drafted tokens per verification, such as 0,3,7; not {list(self.k)}")
        if max(self.prefill_len, *(k + 1 for k in self.k)) > self.max_seq_len:
            raise InputError(f"max_seq_len is {self.max_seq_len}: a graph of more rows than that can never be full")
        if 0 not in self.k:
            raise InputError("k has no 0: without a graph of one row there is no plain decoding; write k=0,...")

    def check_choice(self, name: str, choices: Sequence[str]) -> None:
        if getattr(self, name) not in choices:
            raise InputError(f"{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}")

    def check_recipe(self, names: Sequence[str]) -> None:
        """Raise `InputError` for a recipe that the backend does not know."""
        if self.recipe is not None and self.recipe not in names:
            known = f"knows {', '.join(names)}" if names else "knows none: leave it out"
            raise InputError(f"recipe is {self.recipe!r}; the {self.backend} backend {known}")

    @property
    def num_slots(self) -> int:
        """Of the buffers, but for the bin of padding rows behind them."""
        return self.max_seq_len + self.max_nodes

    @property
    def methods(self) -> tuple[Method, ...]:
        """The graphs, narrow ones first."""
        steps = [Method(f"step_{k + 1}", k + 1) for k in sorted(set(self.k))]
        if self.prefill_len > 1:
            steps.append(Method(f"prefill_{self.prefill_len}", self.prefill_len, True))
        return tuple(steps)

    def as_dict(self) -> dict[str, Any]:
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """From `as_dict`. Raises `InputError` for a field that this backend's options do not have."""
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise InputError(f"the {cls.backend} backend has no option {min(unknown)!r}")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return cls(**plain)
