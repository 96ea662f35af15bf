"""From axes to settings: the Cartesian product, made sensible, filtered, and without repetitions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from specdec.errors import InputError
from specdec.sweep.filters import Filter
from specdec.sweep.setting import DEFAULT_VERIFIER, FIELDS, FIXED, Setting

DEFAULT_K = (1, 2, 4, 8)
# Of a cell that is written out without a shape: the fixed policy's own.
_USUAL_K = 5
NONE = "none"
# Fields that are axes as they stand. The first ones change models, so that cells of one model follow each other.
PLAIN_AXES = (
    "target",
    "quantize",
    "dtype",
    "kv_cache",
    "draft_quantize",
    "prompt_set",
    "max_new_tokens",
    "temperature",
    "seed",
    "batch",
    "verifier",
)
AXES = (*PLAIN_AXES, "drafter", "k", "tree", "policy")


@dataclass(frozen=True)
class Named:
    """A plugin's name and its options: `hybrid:retrieval=ngram;neural=eagle`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Named:
        """From a text, or a table with `name` and options."""
        if isinstance(value, Named):
            return value
        if isinstance(value, Mapping):
            options = dict(value)
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise InputError(f"a table of a drafter or policy has a name: {{name = 'hybrid', …}}, not {value!r}")
            return cls(name, options)
        if not isinstance(value, str) or not value:
            raise InputError(f"a drafter or policy is a name, not {value!r}")
        name, colon, rest = value.partition(":")
        if not colon or "=" not in rest:
            return cls(value)
        return cls(name, dict(_key_value(part, value) for part in rest.split(";")))


def _key_value(part: str, whole: str) -> tuple[str, Any]:
    key, equals, value = part.partition("=")
    if not equals or not key:
        raise InputError(f"{whole!r}: options are written NAME:key=value;key=value")
    try:
        return key.replace("-", "_"), json.loads(value)
    except json.JSONDecodeError:
        return key.replace("-", "_"), value


def split_names(text: str) -> list[str]:
    """The parts of `model,hybrid:neural=eagle;x=[1,2]`; commas within brackets belong to an option."""
    parts = [part.strip() for part in re.split(r",(?![^\[]*\])", text)]
    if not all(parts):
        raise InputError(f"{text!r} is not a list of names like model,ngram")
    return parts


def split_optional(text: str) -> list[str | None]:
    """Names of which `none` is nothing."""
    return [None if part == NONE else part for part in split_names(text)]


def split_counts(text: str) -> list[int]:
    """`1,2,4` or `1-8`, or both."""
    counts: list[int] = []
    for part in split_names(text):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not found:
            raise InputError(f"{text!r} is not a list of whole numbers like 1,2,4 or 1-8")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first or last - first > 1000:
            raise InputError(f"{part!r}: from a smaller number to a larger one, at most 1000 further")
        counts += range(first, last + 1)
    return counts


def split_numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{text!r} is not a list of numbers like 0,0.7,1") from None


def split_trees(text: str) -> list[tuple[int, ...]]:
    """`4,2,1;2,2`: children per depth, trees separated by semicolons."""
    try:
        return [tuple(int(part) for part in tree.split(",")) for tree in text.split(";")]
    except ValueError:
        raise InputError(f"{text!r} is not a list of trees like 4,2,1;2,2") from None


def _unique(settings: Iterable[Setting]) -> list[Setting]:
    return list(dict.fromkeys(settings))


def _shapes(k: Sequence[int] | None, trees: Sequence[Sequence[int]] | None) -> list[dict[str, Any]]:
    """Of the fixed policy: every k and every tree."""
    ks = DEFAULT_K if k is None and trees is None else k or ()
    return [{"k": depth} for depth in ks] + [{"tree": tuple(tree)} for tree in trees or ()]


def _methods(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """What `policy`, `k` and `tree` give together. Only the fixed policy takes k and trees from their axes."""
    policies = [Named.of(value) for value in axes.get("policy", (FIXED,))]
    shapes = _shapes(axes.get("k"), axes.get("tree"))
    fixed = [policy for policy in policies if policy.name == FIXED]
    if not fixed and ("k" in axes or "tree" in axes):
        first = policies[0].name
        raise InputError(
            f"k and tree are shapes of the fixed policy: add it (--policy fixed,{first}), or give the policy its own "
            f"options (--policy '{first}:k=4')"
        )
    found: list[dict[str, Any]] = []
    for policy in policies:
        if policy.name != FIXED:
            found.append({"policy": policy.name, "policy_options": dict(policy.options), "k": None, "tree": None})
            continue
        if policy.options:
            raise InputError("the fixed policy takes its shapes from k and tree (--k 1,2,4 --tree '4,2,1;2,2')")
        found += [{"policy": FIXED, "k": None, "tree": None, **shape} for shape in shapes]
    return found


def combine(
    axes: Mapping[str, Sequence[Any]],
    base: Mapping[str, Any] | None = None,
    *,
    quantizes: Callable[[str], bool] | None = None,
) -> list[Setting]:
    """The product of `axes` (a list of values for each of `AXES`) around what `base` says for all of them.

    What makes no sense is put right, and settings that are then the same are merged: nothing has a shape, a verifier
    or a drafted format where nothing is drafted; `draft_quantize` goes where a drafter loads no model
    (`quantizes(name)`). Raises `InputError` for axes that contradict each other.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise InputError(f"{name!r} is no axis; these are: {', '.join(AXES)}")
        if isinstance(values, (str, Mapping)) or not isinstance(values, Sequence) or not values:
            raise InputError(f"the axis {name} is a list of values, not {values!r}")
    methods = _methods(axes)
    drafters = [Named.of(value) for value in axes.get("drafter", ("model",))]
    plain = [name for name in PLAIN_AXES if name in axes]
    early = [name for name in plain if name in PLAIN_AXES[: PLAIN_AXES.index("prompt_set")]]
    late = [name for name in plain if name not in early]
    found = []
    for models in product(*(axes[name] for name in early)):
        for drafter in drafters:
            for texts in product(*(axes[name] for name in late)):
                for method in methods:
                    given = {**(base or {}), **dict(zip(early, models, strict=True))}
                    given.update(zip(late, texts, strict=True))
                    given.update(method, drafter=drafter.name, drafter_options=dict(drafter.options))
                    found.append(sensible(Setting.of(given), quantizes))
    return _unique(found)


def listed(
    cells: Iterable[Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    quantizes: Callable[[str], bool] | None = None,
) -> list[Setting]:
    """Settings that were written out one by one; `drafter` and `policy` may be names with options.

    Without k, tree and policy, a cell has k = 5.
    """
    return _unique(sensible(_one({**(base or {}), **cell}), quantizes) for cell in cells)


def _one(content: Mapping[str, Any]) -> Setting:
    given = dict(content)
    for name in ("drafter", "policy"):
        if name in given:
            named = Named.of(given[name])
            given[name] = named.name
            if named.options:
                given[f"{name}_options"] = {**named.options, **given.get(f"{name}_options", {})}
    return Setting.of(given)


def sensible(setting: Setting, quantizes: Callable[[str], bool] | None = None) -> Setting:
    """The same setting without what has no meaning in it."""
    if setting.drafter == NONE:
        names = ("k", "tree", "policy", "policy_options", "verifier", "draft_quantize", "drafter_options")
        empty: tuple[Any, ...] = (None, None, FIXED, {}, DEFAULT_VERIFIER, None, {})
        return setting.changed(**dict(zip(names, empty, strict=True)), exact=False)
    if setting.policy == FIXED and setting.tree is not None:
        setting = setting.changed(k=None)
        if all(width == 1 for width in setting.tree or ()):  # a chain by another name
            setting = setting.changed(k=len(setting.tree or ()), tree=None)
    elif setting.policy != FIXED and (setting.k is not None or setting.tree is not None):
        raise InputError(
            f"k and tree are shapes of the fixed policy; the {setting.policy} policy takes options of its own "
            f"(policy_options, or --policy '{setting.policy}:k=4')"
        )
    elif setting.policy == FIXED and setting.k is None:
        setting = setting.changed(k=_USUAL_K)
    if setting.draft_quantize is not None and quantizes is not None and not quantizes(setting.drafter):
        setting = setting.changed(draft_quantize=None)
    return setting


def select(settings: Iterable[Setting], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Setting]:
    """Those that every expression of `only` and none of `skip` is true of. `InputError` when nothing is left."""
    keep, leave = [Filter(text) for text in only], [Filter(text) for text in skip]
    given = list(settings)
    found = [s for s in given if all(f(s) for f in keep) and not any(f(s) for f in leave)]
    if not found:
        raise InputError(f"none of {len(given)} settings is left by --only and --skip" if given else "no settings")
    return found


def check_known(names: Iterable[str], where: str) -> None:
    """Raise `InputError` for the first of `names` that no setting has."""
    unknown = [name for name in names if name not in FIELDS]
    if unknown:
        raise InputError(f"{where}: a setting has no {unknown[0]!r}; it has {', '.join(FIELDS)}")
