"""What one cell of a sweep is: a pair, a method, and texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from specdec.errors import InputError

EMBEDDED = "embedded"
BUILT_IN = "built-in"
DEFAULT_VERIFIER = "coupled"
FIXED = "fixed"
_KEY_DIGITS = 16


def canonical(content: Any) -> str:
    """JSON that is the same for equal contents. Raises `InputError` for what JSON cannot say."""
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"a setting holds numbers, texts, lists and tables only: {error}") from None


def digest(content: Any) -> str:
    """A short hexadecimal hash of the canonical JSON of `content`."""
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:_KEY_DIGITS]


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting; two that say the same are equal and have the same `key`.

    `draft`: hub id or folder of what drafts, where one was named; `drafter`: the plugin that drafts, or that id.
    `k`, `tree`: of the fixed policy, or of whichever takes them; None where nothing is drafted or the policy decides.
    `limit`, `limit_per_category`: so many prompts of the set, None for all of them. `turns`: of each prompt, None for
    all; `truncate`: long prompts are cut in front. `threads`: None is the program's choice.
    Raises `InputError` for values that no run could have.
    """

    target: str = EMBEDDED
    draft: str | None = None
    drafter: str = "model"
    drafter_options: Mapping[str, Any] = field(default_factory=dict)
    k: int | None = None
    tree: tuple[int, ...] | None = None
    policy: str = FIXED
    policy_options: Mapping[str, Any] = field(default_factory=dict)
    verifier: str = DEFAULT_VERIFIER
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int = 64
    quantize: str | None = None
    draft_quantize: str | None = None
    kv_cache: str | None = None
    dtype: str | None = None
    backend: str | None = None
    numerics: str | None = None
    device: str | None = None
    threads: int | None = None
    batch: int = 1
    prompt_set: str = BUILT_IN
    limit: int | None = None
    limit_per_category: int | None = None
    turns: int | None = None
    truncate: bool = False
    chat: bool = False
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("drafter_options", "policy_options"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise InputError(f"{name} is a table of options, not {value!r}")
            object.__setattr__(self, name, dict(value))
        if self.tree is not None:
            object.__setattr__(self, "tree", _whole(self.tree, "tree"))
        for name in _COUNTS:
            _check_whole(name, getattr(self, name), least=None if name == "seed" else 1)
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        for name in _NAMES:
            value = getattr(self, name)
            if not isinstance(value, str) and (value is not None or name in _NEEDED):
                raise InputError(f"{name} is a name, not {value!r}")
        for name in ("truncate", "chat", "exact"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is true or false, not {getattr(self, name)!r}")
        if self.k is not None and self.tree is not None and self.k != len(self.tree):
            raise InputError(f"k={self.k} and a tree {len(self.tree)} deep contradict each other: give one of them")

    @property
    def key(self) -> str:
        """Hexadecimal; of the setting alone. `keyed` also says on which models and prompts."""
        return digest(self.as_dict())

    def keyed(self, identity: Any) -> str:
        """The key of this setting on models and prompts that `identity` (anything JSON can say) tells apart."""
        return digest([self.as_dict(), identity])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and canonical(self.as_dict()) == canonical(other.as_dict())

    def __hash__(self) -> int:
        return hash(canonical(self.as_dict()))

    def as_dict(self) -> dict[str, Any]:
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**content, "tree": list(self.tree) if self.tree is not None else None}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Setting:
        """The setting that `as_dict` described; what is left out has its default. `InputError` for unknown names."""
        unknown = sorted(set(content) - set(FIELDS))
        if unknown:
            raise InputError(f"a setting has no {unknown[0]!r}; it has {', '.join(FIELDS)}")
        return cls(**content)

    def changed(self, **changes: Any) -> Setting:
        return replace(self, **changes)

    @property
    def shape(self) -> str:
        """What is drafted each round, for tables: `4`, `4x2x1`, the policy with its options, or `–` for nothing."""
        if self.drafter == "none":
            return "–"
        own = "x".join(map(str, self.tree or ())) or str(self.k or "")
        return own if self.policy == FIXED and own else f"{_with(self.policy, self.policy_options)} {own}".strip()

    @property
    def source(self) -> str:
        """What drafts, for tables: the last part of a folder, and options of the drafter."""
        name = Path(self.drafter).name if "/" in self.drafter else self.drafter
        return _with(name, self.drafter_options)

    @property
    def weights(self) -> str:
        """Formats of target and draft, for tables; empty where both are as they came."""
        if self.quantize is None and self.draft_quantize is None:
            return ""
        return "/".join(value or "full" for value in (self.quantize, self.draft_quantize))

    def label(self) -> str:
        """One line that tells settings apart: every field that is not its default. Paths are their last parts."""
        if self.drafter == "none":
            parts = ["none"]
        else:
            parts = [self.source, f"k={self.k}" if self.policy == FIXED and self.tree is None else self.shape]
        if self.verifier != DEFAULT_VERIFIER:
            parts.append(self.verifier)
        parts.append(f"T={self.temperature:g}")
        parts += [self.weights] if self.weights else []
        parts += [f"kv {self.kv_cache}"] if self.kv_cache else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [Path(self.prompt_set).stem] if self.prompt_set != BUILT_IN else []
        said = ((text, getattr(self, name), _DEFAULTS[name]) for name, text in _SAID.items())
        return " ".join([*parts, *(text.format(_short(value)) for text, value, usual in said if value != usual)])


def labels(settings: Sequence[Setting]) -> list[str]:
    """A label for each, without what all of them have in common; drafter, shape and temperature are always said."""
    same = [name for name in ("prompt_set", *_SAID) if len({getattr(setting, name) for setting in settings}) == 1]
    return [setting.changed(**{name: _DEFAULTS[name] for name in same}).label() for setting in settings]


FIELDS = tuple(f.name for f in fields(Setting))
_DEFAULTS = {f.name: f.default for f in fields(Setting)}
# How labels say fields that are seldom given.
_SAID = {
    "target": "on {}",
    "draft": "draft {}",
    "top_k": "top-k {}",
    "top_p": "top-p {}",
    "min_p": "min-p {}",
    "repetition_penalty": "penalty {}",
    "seed": "seed {}",
    "max_new_tokens": "max {}",
    "dtype": "{}",
    "backend": "{}",
    "numerics": "{}",
    "device": "{}",
    "threads": "threads {}",
    "limit": "limit {}",
    "limit_per_category": "limit {} each",
    "turns": "turns {}",
    "truncate": "truncated",
    "chat": "chat",
    "exact": "exact",
}
_COUNTS = ("k", "limit", "limit_per_category", "turns", "threads", "batch", "max_new_tokens", "seed", "top_k")
_NEEDED = ("target", "drafter", "policy", "verifier", "prompt_set")
_NAMES = (*_NEEDED, "draft", "quantize", "draft_quantize", "kv_cache", "dtype", "backend", "numerics", "device")


def _with(name: str, options: Mapping[str, Any]) -> str:
    """`hybrid:neural=eagle,retrieval=suffix`"""
    said = ",".join(f"{key}={_short(value)}" for key, value in sorted(options.items()))
    return f"{name}:{said}" if said else name


def _short(value: Any) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _whole(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence) or not values:
        raise InputError(f"{name} has one whole number >= 1 for each depth, like [4, 2, 1], not {values!r}")
    for value in values:
        _check_whole(name, value, least=1)
    return tuple(values)


def _check_whole(name: str, value: Any, least: int | None) -> None:
    if value is None and name not in ("batch", "max_new_tokens", "seed", "tree"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        raise InputError(f"{name} is a whole number{f' >= {least}' if least is not None else ''}, not {value!r}")


def _number(name: str, value: Any) -> float | None:
    if value is None and name in ("top_p", "min_p"):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise InputError(f"{name} is a number >= 0, not {value!r}")
    return float(value)
