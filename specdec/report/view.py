"""A document as a page needs it: what differs between cells, which is the best, and who gets which colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from specdec.bench.timing import Interval
from specdec.errors import InputError
from specdec.trace import STAGES

NUM_COLOURS = 8
MIN_REACHED = 10
# Cells that are drawn in colour to begin with; the reader chooses others.
_MAX_CHOSEN = 6
_DEFAULTS: dict[str, Any] = {
    "repetition_penalty": 1.0, "batch": 1, "chat": False, "exact": False, "drafter_options": {}, "policy_options": {},
}  # fmt: skip


def _number(value: Any) -> float | None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    return float(value) if good else None


def _interval(content: Any) -> Interval | None:
    if not isinstance(content, Mapping) or (median := _number(content.get("median"))) is None:
        return None
    low, high = _number(content.get("low")), _number(content.get("high"))
    return Interval(median, median if low is None else low, median if high is None else high)


def short(name: Any) -> str:
    """The last part of a folder or of a hub id."""
    return Path(str(name)).name or str(name)


def _options(content: Any) -> str:
    return ",".join(f"{key}={short(value)}" for key, value in sorted((content or {}).items()))


def _shape(setting: Mapping[str, Any]) -> str:
    """What is drafted each round: `4`, `4x2x1`, or the policy's name."""
    if setting.get("drafter") == "none":
        return "–"
    k, tree, policy = setting.get("k"), setting.get("tree"), setting.get("policy") or "fixed"
    own = "x".join(map(str, tree)) if tree else "" if k is None else str(k)
    options = _options(setting.get("policy_options"))
    return own if policy == "fixed" and own else " ".join(filter(None, (policy, own, options)))


def _drafter(setting: Mapping[str, Any]) -> str:
    name, draft = str(setting.get("drafter", "?")), setting.get("draft")
    parts = [short(name)]
    if draft and short(draft) != parts[0] and draft != "embedded":
        parts.append(short(draft))
    return " ".join(parts) + (f":{found}" if (found := _options(setting.get("drafter_options"))) else "")


def _plain(name: str) -> Callable[[Mapping[str, Any]], str]:
    def value(setting: Mapping[str, Any]) -> str:
        found = setting.get(name)
        if found is None or found == _DEFAULTS.get(name, ""):
            return "–" if not isinstance(found, bool) else "no"
        if isinstance(found, bool):
            return "yes"
        return f"{found:g}" if isinstance(found, float) else short(found)

    return value


def _counted(name: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda setting: "–" if setting.get(name) is None else f"{setting[name]:g}"


@dataclass(frozen=True)
class Axis:
    """One thing in which settings may differ."""

    name: str
    title: str
    value: Callable[[Mapping[str, Any]], str]


# In the order of columns, and in which one is chosen for colours (the first that varies).
AXES = (
    Axis("drafter", "drafter", _drafter),
    Axis("shape", "k", _shape),
    Axis("verifier", "verifier", lambda s: str(s.get("verifier") or "coupled")),
    Axis("temperature", "temperature", lambda s: f"{s.get('temperature') or 0:g}"),
    Axis("quantize", "weights", _plain("quantize")),
    Axis("draft_quantize", "draft weights", _plain("draft_quantize")),
    Axis("kv_cache", "kv cache", _plain("kv_cache")),
    Axis("batch", "batch", _counted("batch")),
    Axis("prompt_set", "prompts", _plain("prompt_set")),
    Axis("target", "target", _plain("target")),
    *(Axis(name, name.replace("_", "-"), _plain(name)) for name in ("top_k", "top_p", "min_p")),
    Axis("repetition_penalty", "penalty", _plain("repetition_penalty")),
    Axis("dtype", "dtype", _plain("dtype")),
    Axis("backend", "backend", _plain("backend")),
    Axis("numerics", "numerics", _plain("numerics")),
    Axis("device", "device", _plain("device")),
    Axis("threads", "threads", _counted("threads")),
    Axis("max_new_tokens", "new tokens", _counted("max_new_tokens")),
    Axis("chat", "chat", _plain("chat")),
    Axis("exact", "exact", _plain("exact")),
    Axis("limit", "prompts up to", _counted("limit")),
    Axis("seed", "seed", _counted("seed")),
)


class Cell:
    """One cell; whatever it lacks is None or empty, never a guess."""

    def __init__(self, index: int, raw: Mapping[str, Any]):
        self.index, self.raw = index, raw
        self.setting: Mapping[str, Any] = raw.get("setting") or {}
        self.done = raw.get("status", "done") == "done"
        self.rows: list[Mapping[str, Any]] = list(raw.get("rows") or ()) if self.done else []
        self.stats: Mapping[str, Any] = (raw.get("stats") or {}) if self.done else {}
        self.story: list[Mapping[str, Any]] = list(raw.get("story") or ())
        self.timed = self.done and (raw.get("timing") or {}).get("measured", True) is not False
        self.label = self.slot = ""  # given by the view
        self.colour = self.dash = 0

    @property
    def error(self) -> str:
        found = self.raw.get("error")
        return ": ".join(str(found[k]) for k in ("type", "message") if found.get(k)) if isinstance(found, dict) else ""

    @cached_property
    def speedup(self) -> Interval | None:
        return _interval(self.raw.get("speedup")) if self.timed else None

    def rate(self, method: str = "speculative") -> Interval | None:
        """Tokens per second."""
        return _interval((self.raw.get(method) or {}).get("tokens_per_second")) if self.timed else None

    @property
    def per_round(self) -> float | None:
        return _number(self.stats.get("mean_acceptance_length"))

    @property
    def acceptance(self) -> float | None:
        return _number(self.stats.get("draft_acceptance_rate")) if self.stats.get("num_draft_tokens") else None

    @property
    def lossless(self) -> bool:
        return bool(self.stats.get("lossless", True))

    @property
    def depth(self) -> int:
        """Positions that at least `MIN_REACHED` rounds decided about: fewer say little of any other text."""
        evaluated = [n for row in self.rows for n in (row.get("rounds") or {}).get("evaluated", ())]
        known = len(self.stats.get("conditional_acceptance") or ())
        if not evaluated:
            return known
        return next((d for d in range(known) if sum(n > d for n in evaluated) < MIN_REACHED), known)

    @property
    def num_bytes(self) -> float | None:
        """Weights of target and draft, keys and values."""
        values = [_number(v) for v in (self.raw.get("memory") or {}).values()]
        known = [v for v in values if v is not None]
        return sum(known) if known else None

    @property
    def loss(self) -> float | None:
        return _number((self.raw.get("quality") or {}).get("loss"))

    def milliseconds(self, plain: bool = False) -> dict[str, float]:
        """Per token, by stage; empty where nothing was timed."""
        seconds = (self.raw.get("plain") or {}).get("seconds") if plain else self.raw.get("seconds")
        tokens = _number(self.stats.get("num_tokens"))
        if not self.timed or not isinstance(seconds, Mapping) or not tokens:
            return {}
        return {stage: 1e3 * (_number(seconds.get(stage)) or 0.0) / tokens for stage in STAGES}

    @property
    def merit(self) -> tuple[float, float]:
        """The larger, the better: speed-up where there is one, else tokens per round."""
        return (self.speedup.median if self.speedup else 0.0, self.per_round or 0.0)


class View:
    """Everything that the sections share. Raises `InputError` for a document without cells."""

    def __init__(self, document: Mapping[str, Any]):
        raw = document.get("cells")
        if not isinstance(raw, Sequence) or isinstance(raw, str) or not raw:
            raise InputError(
                "a report needs at least one cell, and this document has none; run `specdec sweep --store FILE` or "
                "`specdec compare --html FILE`"
            )
        if not all(isinstance(cell, Mapping) for cell in raw):
            raise InputError("the cells of a document are tables; is the file damaged?")
        self.environment: Mapping[str, Any] = document.get("environment") or {}
        self.cells = [Cell(i, cell) for i, cell in enumerate(raw)]
        self.done = [cell for cell in self.cells if cell.done]
        self.failed = [cell for cell in self.cells if not cell.done]
        self.axes = [axis for axis in AXES if len(self.values(axis)) > 1]
        self.colour_axis = next((axis for axis in self.axes if axis.name != "shape"), None)
        self.colours = self.values(self.colour_axis) if self.colour_axis else [""]
        for cell in self.cells:
            cell.label = self._label(cell)
            cell.colour = self.colours.index(self.colour_axis.value(cell.setting)) if self.colour_axis else 0
        self.rivals = [c for c in self.done if c.lossless] or self.done
        self.best = max(self.rivals, key=lambda c: c.merit, default=None)
        self.chosen = self._choose()

    def values(self, axis: Axis) -> list[str]:
        """Distinct values, in the order of the cells; numbers in theirs."""
        found = list(dict.fromkeys(axis.value(cell.setting) for cell in self.cells))
        return sorted(found, key=float) if all(_is_number(v) for v in found) else found

    def _label(self, cell: Cell) -> str:
        named = [axis for axis in self.axes if axis.name not in ("drafter", "shape")]
        drafter, shape = AXES[0].value(cell.setting), AXES[1].value(cell.setting)
        parts = [drafter]
        if shape != "–":
            parts.append(f"k {shape}" if shape.isdigit() else f"tree {shape}" if shape[:1].isdigit() else shape)
        for axis in named:
            value = axis.value(cell.setting)
            parts.append(f"T {value}" if axis.name == "temperature" else _said(axis, value))
        return " · ".join(parts)

    def _choose(self) -> list[Cell]:
        """The best of each colour, best first; all cells where there are few."""
        if len(self.done) <= 4:
            return list(self.done)
        best: dict[int, Cell] = {}
        for cell in self.done:
            if cell.colour not in best or cell.merit > best[cell.colour].merit:
                best[cell.colour] = cell
        first = [self.best] if self.best else []
        others = sorted((c for c in best.values() if c is not self.best), key=lambda c: c.merit, reverse=True)
        return (first + others)[:_MAX_CHOSEN]

    @property
    def timed(self) -> bool:
        return any(cell.speedup for cell in self.done)

    @property
    def fixed(self) -> list[tuple[str, str]]:
        """What is the same in all cells, where it is not a default."""
        first = self.cells[0].setting
        same = [(axis, axis.value(first)) for axis in AXES if axis not in self.axes]
        said = [
            (axis, value) for axis, value in same if value not in ("–", "no") and (axis.name, value) != ("batch", "1")
        ]
        return [
            ("policy" if axis.name == "shape" and not value[:1].isdigit() else axis.title, value)
            for axis, value in said
        ]


def _said(axis: Axis, value: str) -> str:
    plain = {"quantize": "full weights", "draft_quantize": "full draft", "kv_cache": "full kv"}
    if value == "–":
        return plain.get(axis.name, f"no {axis.title}")
    if axis.name in ("verifier", "quantize", "target", "prompt_set", "dtype", "backend", "device"):
        return value
    return f"{axis.title} {value}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
