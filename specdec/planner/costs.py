"""What rounds cost on this device, measured in seconds: probes with the drafter, bare forwards, the memory's speed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench import bare
from specdec.bench.machine import ReadProbe, streamed_bytes
from specdec.bench.timing import others_share, read_load
from specdec.costs import cost_at
from specdec.fit.costs import PLAIN, Sample, TimedText, fit_costs, probes, time_texts
from specdec.fit.optimum import RoundCost
from specdec.fit.ranks import comb, falling
from specdec.planner.predict import Once, TextCost
from specdec.tree_policy import StaticTree

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder
    from specdec.policy import Policy

#: Rows of the target's forward that are timed; those between lie on lines.
WIDTHS = (*range(1, 18), 20, 24, 28, 32, 40, 48, 51, 56, 64)
#: The longest chain that is decoded; what longer ones cost follows from the line.
LIMIT = 16
# Combs tell what a node with children costs beside a level, and what else a branching round costs.
_COMBS = ((2, 2), (2, 6), (5, 2))
_MOST_NODES = 64
_COST_PROMPTS, _REPETITIONS, _COST_TOKENS = 2, 2, 40
_RESAMPLES = 60
_WARMUP_TOKENS = 12

Tick = Callable[[], None]


@dataclass(frozen=True)
class Costs:
    """Costs as measured: `texts` decoded plainly and under every probe, `bare` forwards behind `length` tokens.

    `bandwidth`: bytes per second that this device reads at best; `step_bytes`: what a plain step has to read. `others`:
    cores' worth of CPU that other processes used meanwhile.
    """

    texts: tuple[TimedText, ...]
    bare: Mapping[int, float]  # seconds of a target's forward by its rows
    bare_draft: float  # of the draft model's step; 0: none
    length: int
    bandwidth: float
    step_bytes: int
    others: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(found: Mapping[str, Any]) -> Costs:
        """Back from JSON."""
        texts = tuple(
            TimedText(**{**text, "rounds": tuple(Sample(**sample) for sample in text["rounds"])})
            for text in found["texts"]
        )
        widths = {int(width): seconds for width, seconds in found["bare"].items()}
        return Costs(**{**found, "texts": texts, "bare": widths})

    def text_cost(self) -> TextCost:
        return _text_cost(self.texts, self.bare)

    def resampled(self, number: int = _RESAMPLES, seed: int = 0) -> list[TextCost]:
        """The same from texts drawn with replacement among those of the same probe."""
        groups: dict[str, list[TimedText]] = {}
        for text in self.texts:
            groups.setdefault(text.probe, []).append(text)
        draw = random.Random(seed)
        return [
            _text_cost([text for group in groups.values() for text in draw.choices(group, k=len(group))], self.bare)
            for _ in range(number)
        ]


def _text_cost(texts: Sequence[TimedText], widths: Mapping[int, float]) -> TextCost:
    cost = with_curve(fit_costs(texts), widths)
    plain = [text for text in texts if text.probe == PLAIN]
    return TextCost(cost, _once(plain, cost), _once([text for text in texts if text.probe != PLAIN], cost))


def with_curve(cost: RoundCost, bare_seconds: Mapping[int, float]) -> RoundCost:
    """The verification at every width of the bare forwards: theirs, and what the loop adds at the widths it had.

    More rows are never cheaper: where measurements say so, neighbours share what they took.
    """
    if not bare_seconds:
        return cost
    added = {width: seconds - cost_at(bare_seconds, width) for width, seconds in cost.verify.items()}
    widths = sorted({*bare_seconds, *cost.verify})
    seconds = np.array([max(1e-9, cost_at(bare_seconds, w) + cost_at(added, w)) for w in widths])
    return replace(cost, verify=dict(zip(widths, (-falling(-seconds)).tolist(), strict=True)))


def _once(texts: Sequence[TimedText], cost: RoundCost) -> Once:
    """What texts took beyond their rounds, of which the first is priced as the others: a constant, and a rate for
    the prompt's tokens; neither below 0."""
    if not texts:
        return Once()
    seconds = []
    for text in texts:
        first = text.rounds[0]
        usual = cost.plain_round() if first.levels < 0 else cost.round(first.nodes, first.levels, first.expanded)
        seconds.append(text.seconds - sum(sample.seconds for sample in text.rounds[1:]) - usual)
    y, x = np.array(seconds), np.array([text.num_prompt_tokens for text in texts], dtype=np.float64)
    if np.ptp(x):
        rate, fixed = np.polyfit(x, y, 1)
        if rate >= 0 and fixed >= 0:
            return Once(float(fixed), float(rate))
    return Once(0.0, float(max(0.0, np.median(y / x))))


def grows_trees(decoder: SpeculativeDecoder) -> bool:
    return decoder.drafter.trees and decoder.verifier.trees


def cost_policies(decoder: SpeculativeDecoder, trees: bool) -> dict[str, Policy]:
    """Chains, and with trees a few combs, whose rounds tell the costs apart."""
    found = probes(LIMIT, _MOST_NODES, trees=False)
    if trees:
        found.update({f"comb {depth}x{ranks}": StaticTree(comb(depth, ranks)) for depth, ranks in _COMBS})
    return found


def num_cost_texts(decoder: SpeculativeDecoder, num_prompts: int, trees: bool) -> int:
    """Calls of `tick` in `measure_costs`."""
    return (1 + len(cost_policies(decoder, trees))) * min(_COST_PROMPTS, num_prompts) * _REPETITIONS


def measure_costs(
    decoder: SpeculativeDecoder, prompts: Sequence[Any], options: Mapping[str, Any], trees: bool, tick: Tick
) -> Costs:
    """Decode the first prompts plainly and under every probe, in turns; then bare forwards, and the memory's speed."""
    policies = cost_policies(decoder, trees)
    options = {**options, "reuse_prefix": False, "max_new_tokens": min(_COST_TOKENS, int(options["max_new_tokens"]))}
    for policy in (None, *policies.values()):  # what is compiled or cached at first use is not measured
        short = {**options, "max_new_tokens": min(_WARMUP_TOKENS, options["max_new_tokens"])}
        if policy is None:
            decoder.generate_plain(prompts[0], **short)
        else:
            decoder.generate(prompts[0], policy=policy, **short)
    before = read_load()
    texts = time_texts(decoder, prompts[:_COST_PROMPTS], policies, _REPETITIONS, tick, **options)
    ids = decoder.prepare(prompts[0], **options).request.prompt
    found = bare.measure(decoder, ids, WIDTHS)
    others = others_share(before, read_load())
    device = decoder.backend.capabilities.device
    return Costs(
        tuple(texts), dict(found.target), found.draft, found.length, ReadProbe(device)(),
        streamed_bytes(decoder.target, found.length), others,
    )  # fmt: skip
