"""Recipes: which layer of a model is stored in which format, and by which method its values are chosen."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.quant.format import Format, format_names, parse
from specdec.quant.layers import Candidates, is_head

ROUND = "rtn"  # the method that looks at nothing but the weights
SAME, KEEP, ERROR = "default", "keep", "error"  # words that stand where a format's name may
_VERSION = 1

# Errors of the first layers pass through all others. Of the embedded target (18 layers, 4.5 bits in INT4: KL to full
# precision 0.032) they and the head in 8 bits leave 0.011 at 5.2 bits; all down projections and the head 0.020 at 5.6.
_EARLY = r"(^|\.)(layers|h|blocks?)\.[01]\."
# Whose inputs are products of two activations, a few of them hundreds of times larger than the rest ("massive
# activations", Sun et al., arXiv 2402.17762).
_DOWN = r"(^|\.)(down_proj|w2|fc2|c_proj|dense_4h_to_h|ffn_down)$"

# As dictionaries: formats may come from a package that is installed beside this one. MXINT8 rounds weights alone, so
# that activations keep their 16 bits; INT8 would round the inputs of just the layers that are most sensitive.
_NAMED: dict[str, dict[str, Any]] = {
    "w4a16": {"default": "int4", "head": "mxint8", "rules": [[_EARLY, "mxint8"]], "optional": True},
    "w4a16-head8": {"default": "int4", "head": "mxint8"},
    "w4a16-down8": {"default": "int4", "head": "mxint8", "rules": [[_DOWN, "mxint8"]], "optional": True},
    "w8a16": {"default": "mxint8"},
    "w8a8": {"default": "int8"},
    # E2M3 is 5.6 dB nearer to weights than E3M2.
    "mx6": {"default": "mxfp6_e2m3"},
    "mx4": {"default": "mxfp4", "head": "mxfp6_e2m3", "rules": [[_EARLY, "mxfp6_e2m3"]], "optional": True},
}


def recipe_names() -> list[str]:
    return sorted(_NAMED)


@dataclass(frozen=True)
class Recipe:
    """What becomes of each linear layer. Embeddings and norms are never touched.

    For a layer count, in this order: the first of `rules` whose regular expression is found in its module name
    (`re.search`); `head` for the output layer; `default`. Formats go by name, and None keeps a layer as it is.

    `head`: "default" for the same as all others. `fallback` is for layers whose shape their format cannot take:
    "error", "keep", or another format. `optional`: a rule may match nothing. `method`, with its `options`, chooses
    the stored values (`specdec.quant.methods`); both are looked at by whoever applies it.
    """

    default: str | None
    rules: tuple[tuple[str, str | None], ...] = ()
    head: str | None = SAME
    method: str = ROUND
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    fallback: str = ERROR
    optional: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        rules = tuple((pattern, _known(format)) for pattern, format in _pairs(self.rules))
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "default", _known(self.default))
        object.__setattr__(self, "options", _json_options(self.options))
        if self.head != SAME:
            object.__setattr__(self, "head", _known(self.head))
        if self.fallback not in (ERROR, KEEP):
            object.__setattr__(self, "fallback", _known(self.fallback))
        for pattern, _ in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"rule {pattern!r} is not a regular expression: {error}") from error
        wanted = [self.default, self.head if self.head != SAME else None, *(format for _, format in rules)]
        if not any(wanted):
            raise InputError("this recipe keeps every layer as it is; name a format, as default, head or in a rule")

    @classmethod
    def of(cls, recipe: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A format's name, a named recipe, a JSON file of `to_dict`'s layout, such a dictionary, or a recipe.

        Formats of the sparse family leave the head as it is, for which pruning is ruinous.
        Raises `InputError` with the nearest names for one that is unknown, and for damaged files.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Mapping):
            return cls.from_dict(recipe)
        if not isinstance(recipe, str | Path):
            raise InputError(f"a recipe is a name, a file, a dictionary or a Recipe, not {type(recipe).__name__}")
        text = str(recipe)
        if text.lower() in _NAMED:
            return cls.from_dict({**_NAMED[text.lower()], "name": text.lower()})
        if isinstance(recipe, Path) or text.endswith(".json") or "/" in text:
            return cls.from_dict(_read(Path(text)))
        family = text.lower().split("-")[0]
        if family not in format_names():
            known = [*recipe_names(), *format_names()]
            near = difflib.get_close_matches(text.lower(), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"no recipe or format is called {text!r}; {hint}there are: {', '.join(known)}; or give a JSON file"
            )
        format = parse(text)
        return cls(format.name, head=None if family == "sparse" else SAME, name=format.name)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Of `to_dict`, or written by hand, where only `default` or `rules` are needed. `InputError` for the rest."""
        given = {str(key): value for key, value in content.items()}
        version = given.pop("version", _VERSION)
        if version != _VERSION:
            raise InputError(f"this recipe has version {version!r}; this specdec reads version {_VERSION}")
        known = [f.name for f in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise InputError(f"a recipe has no {key!r}; {hint}it has: version, {', '.join(known)}")
        for key, kind in (("method", str), ("fallback", str), ("optional", bool), ("name", str)):
            if key in given and not isinstance(given[key], kind):
                raise InputError(f"a recipe's {key!r} is a {kind.__name__}, not {given[key]!r}")
        return cls(**{"default": None, **given})

    def to_dict(self) -> dict[str, Any]:
        """JSON; `from_dict` gives an equal recipe."""
        content = {**asdict(self), "rules": [list(rule) for rule in self.rules], "options": dict(self.options)}
        return {"version": _VERSION, **content}

    def assign(self, shapes: Mapping[str, tuple[int, int]] | Candidates, head: str | None = None) -> dict[str, Format]:
        """The format of each layer that is quantised, of linear layers `{module name: (N, K)}`.

        `head`: the output layer's name; else `Candidates` or the usual names tell. Raises `InputError` for rules that
        match nothing or are never reached, for a shape that its format cannot take, naming the layer, and when no
        layer would be quantised.
        """
        if isinstance(shapes, Candidates):
            head = head or shapes.head
            shapes = shapes.shapes
        if not shapes:
            raise InputError("there are no linear layers to quantise")
        self._check_rules(list(shapes))
        chosen: dict[str, Format] = {}
        for name, (N, K) in shapes.items():
            wanted = self.format_name(name, name == head if head is not None else is_head(name))
            format = self._fitting(name, wanted, N, K) if wanted is not None else None
            if format is not None:
                chosen[name] = format
        if not chosen:
            raise InputError(
                f"this recipe quantises none of {len(shapes)} linear layers, for example {next(iter(shapes))}; "
                "give it a default format"
            )
        return chosen

    def format_name(self, name: str, head: bool = False) -> str | None:
        """What a layer of this name, or the head, is to be stored in; None to keep it."""
        for pattern, format in self.rules:
            if re.search(pattern, name):
                return format
        return self.head if head and self.head != SAME else self.default

    def _fitting(self, name: str, wanted: str, N: int, K: int) -> Format | None:
        tried = [wanted] if self.fallback in (ERROR, KEEP) else [wanted, self.fallback]
        for format in map(parse, tried):
            try:
                format.parts(N, K)
            except InputError as error:
                problem = error
                continue
            return format
        if self.fallback == KEEP:
            return None
        raise InputError(
            f"{name} [{N}, {K}] cannot be stored as {tried[-1]}: {problem}. Give it a rule of its own, or say "
            "fallback='keep' to leave such layers as they are"
        ) from problem

    def _check_rules(self, names: list[str]) -> None:
        if self.optional:
            return
        left = list(names)
        for pattern, _ in self.rules:
            found = [name for name in names if re.search(pattern, name)]
            if not found:
                raise InputError(
                    f"rule {pattern!r} matches none of {len(names)} linear layers, which are called like {names[0]}"
                )
            if not set(found) & set(left):
                raise InputError(f"rule {pattern!r} is never reached: earlier rules match all that it does")
            left = [name for name in left if name not in found]


def _pairs(rules: Any) -> list[tuple[str, Any]]:
    if isinstance(rules, str) or not isinstance(rules, list | tuple):
        raise InputError(f"a recipe's rules are a list of [regular expression, format], not {rules!r}")
    for rule in rules:
        if (
            isinstance(rule, str)
            or not isinstance(rule, list | tuple)
            or len(rule) != 2
            or not isinstance(rule[0], str)
        ):
            raise InputError(f"a rule is [regular expression, format or null], not {rule!r}")
    return [(pattern, format) for pattern, format in rules]


def _known(format: Any) -> str | None:
    """The name as the format itself writes it."""
    if format is None or isinstance(format, str):
        return None if format is None or format == KEEP else parse(format).name
    raise InputError(f"a recipe names formats by strings, or null to keep a layer; found {format!r}")


def _json_options(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping):
        raise InputError(f"a recipe's options are a dictionary, not {options!r}")
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(options)))
    except (TypeError, ValueError) as error:
        raise InputError(f"a recipe's options must be writable as JSON: {error}") from error
    return plain


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"the recipe {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the recipe {path} is not a JSON object")
    return content
