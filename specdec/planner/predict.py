"""Predicted speed-up: rounds times what they cost, over plain rounds times what they cost, text by text.

Nothing here runs a model or looks at a clock.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost
from specdec.planner.work import Size, Work, chain, tokens_per_round

RESAMPLES = 300
_BISECTIONS = 60
# Speed-ups that differ by less are the same one.
_AS_FAST = 0.01


@dataclass(frozen=True)
class Setting:
    """How to draft: chains of k tokens, 0 being plain decoding, or a tree (`shape`: its parents) with a name."""

    k: int = 0
    shape: tuple[int, ...] = ()
    name: str = ""

    @property
    def label(self) -> str:
        return self.name or (f"k = {self.k}" if self.k else "plain")


@dataclass(frozen=True)
class Once:
    """Seconds that a text pays once: its prompt, and what happens outside of rounds; `per_token` of the prompt."""

    fixed: float = 0.0
    per_token: float = 0.0

    def seconds(self, num_prompt_tokens: int) -> float:
        return self.fixed + self.per_token * num_prompt_tokens


@dataclass(frozen=True)
class TextCost:
    """What texts cost here: rounds, and what is paid once, plainly and with the drafter."""

    round: RoundCost = field(default_factory=RoundCost)
    plain_once: Once = field(default_factory=Once)
    once: Once = field(default_factory=Once)

    def plain_seconds(self, work: Work) -> float:
        return self.plain_once.seconds(work.num_prompt_tokens) + work.num_tokens * self.round.plain_round()

    def seconds(self, work: Work) -> float:
        rounds = sum(count * self.round.round(*size) for size, count in work.rounds.items())
        return self.once.seconds(work.num_prompt_tokens) + rounds


@dataclass(frozen=True)
class Prediction:
    """One row of a plan. `speedup`: of all texts together, whole calls, prompts included; `low` and `high`: 95 %.

    `median`: the speed-up of the text in the middle, which `specdec compare` reports. `tokens_per_round`, `accepted`
    (of the drafted tokens) and `milliseconds_per_token` are of all texts together.
    `break_even`: the acceptance of every drafted token, if it were the same for all, at which a round of this size is
    worth what it costs; None where no acceptance is enough, or none is needed. `acceptance`: the uniform one that would
    give the same tokens per round.
    """

    setting: Setting
    speedup: float
    low: float
    high: float
    median: float
    tokens_per_round: float
    accepted: float
    milliseconds_per_token: float
    acceptance: float | None = None
    break_even: float | None = None
    cost: float = 1.0  # seconds of a full round over those of a plain one

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        setting = found.pop("setting")
        return {"label": self.setting.label, "k": setting["k"], "shape": list(setting["shape"]), **found}


def bisect(rises: Callable[[float], float], aim: float) -> float | None:
    """Where on [0, 1] a rising function meets `aim`; None beyond its ends."""
    if not rises(0.0) <= aim <= rises(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) < aim else (low, middle)
    return (low + high) / 2


def break_even(cost: RoundCost, k: int) -> float | None:
    """The acceptance, the same for every token, at which chains of k tokens are as fast as plain decoding.

    None when they are slower even if every token is accepted.
    """
    return bisect(lambda a: tokens_per_round(a, k), cost.round(*chain(k)) / cost.plain_round())


def uniform_acceptance(tokens: float, k: int) -> float | None:
    """The acceptance of every token that gives so many tokens per round of k drafted ones; None if none does."""
    return bisect(lambda a: tokens_per_round(a, k), tokens)


def speedup_at(cost: RoundCost, acceptance: float, k: int) -> float:
    """Of decoding alone, prompts aside, when every drafted token is accepted with this probability."""
    return tokens_per_round(acceptance, k) * cost.plain_round() / cost.round(*chain(k)) if k else 1.0


def plan(
    costs: TextCost,
    works: Mapping[Setting, Sequence[Work]],
    resampled: Sequence[TextCost] = (),
    seed: int = 0,
) -> list[Prediction]:
    """A row for every setting. `works[setting][i]` is text i's; all settings have the same texts.

    Intervals: 95 % percentile bootstrap over texts, and over `resampled` costs where there are some. Raises
    `InputError` without texts.
    """
    counts = {len(texts) for texts in works.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError("a plan needs the same texts, at least one, for every setting")
    draw, texts = random.Random(seed), range(counts.pop())
    tried = [costs, *resampled]
    # Seconds of every text at every cost, plainly and under the setting.
    seconds = {setting: [[_seconds(cost, work) for work in of] for cost in tried] for setting, of in works.items()}
    found: dict[Setting, list[float]] = {setting: [] for setting in works}
    for _ in range(RESAMPLES):
        which, chosen = draw.randrange(len(tried)), draw.choices(texts, k=len(texts))
        for setting, values in seconds.items():
            found[setting].append(_ratio([values[which][text] for text in chosen]))
    return [_row(setting, costs, list(works[setting]), seconds[setting][0], found[setting]) for setting in works]


def _seconds(cost: TextCost, work: Work) -> tuple[float, float]:
    plain = cost.plain_seconds(work)
    return plain, cost.seconds(work) if work.rounds else plain


def _ratio(seconds: Sequence[tuple[float, float]]) -> float:
    return sum(plain for plain, _ in seconds) / sum(fast for _, fast in seconds)


def _row(
    setting: Setting,
    costs: TextCost,
    works: Sequence[Work],
    seconds: Sequence[tuple[float, float]],
    resampled: Sequence[float],
) -> Prediction:
    rounds = sum(work.num_rounds for work in works)
    tokens = sum(work.num_tokens for work in works)
    drafted = sum(size[0] * count for work in works for size, count in work.rounds.items())
    ordered, speedup = sorted(resampled), _ratio(seconds)
    row: dict[str, Any] = {
        "tokens_per_round": tokens / rounds if rounds else 1.0,
        "accepted": (tokens - rounds) / drafted if drafted else 0.0,
        "milliseconds_per_token": 1e3 * sum(fast for _, fast in seconds) / tokens,
        "median": statistics.median(plain / fast for plain, fast in seconds),
    }
    if setting.k:
        full = costs.round.round(*chain(setting.k))
        row["cost"] = full / costs.round.plain_round()
        row["break_even"] = break_even(costs.round, setting.k)
        row["acceptance"] = uniform_acceptance(row["tokens_per_round"], setting.k)
    elif setting.shape:
        row["cost"] = costs.round.seconds(setting.shape) / costs.round.plain_round()
    low, high = ordered[int(0.025 * (len(ordered) - 1))], ordered[int(0.975 * (len(ordered) - 1) + 0.5)]
    return Prediction(setting, speedup, min(low, speedup), max(high, speedup), **row)


def best(rows: Sequence[Prediction]) -> Prediction:
    """The first row of those that are as fast as the fastest, or nearly: settings come in the order of their size."""
    top = max(row.speedup for row in rows)
    return next(row for row in rows if row.speedup >= (1 - _AS_FAST) * top)


__all__ = [
    "Once", "Prediction", "Setting", "Size", "TextCost", "best", "bisect", "break_even", "plan", "speedup_at",
    "uniform_acceptance",
]  # fmt: skip
