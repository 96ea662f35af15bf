"""What rounds cost here, from rounds: verification by its rows, drafting by its levels and its expanded nodes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost, num_expanded
from specdec.fit.ranks import comb
from specdec.policy import Fixed, Policy
from specdec.trace import Round
from specdec.tree_policy import StaticTree

PLAIN = "plain"
# A width that was seen less often says little: the last rounds of a text are cut to what is left of it.
_LEAST_SEEN = 3


@dataclass(frozen=True)
class Sample:
    """One round: its drafted nodes, levels, nodes with children; seconds of its parts. Levels is -1 in a plain one."""

    nodes: int
    levels: int
    expanded: int
    draft: float
    verify: float
    other: float

    @property
    def seconds(self) -> float:
        return self.draft + self.verify + self.other


@dataclass(frozen=True)
class TimedText:
    """A text that was decoded for its costs: by which probe, after how long a prompt, the whole call's seconds."""

    probe: str
    num_prompt_tokens: int
    seconds: float
    rounds: tuple[Sample, ...]


def probes(depth: int, max_nodes: int, trees: bool = True) -> dict[str, Policy]:
    """Policies whose rounds tell the costs apart: chains, and combs of several sizes where there are trees."""
    found: dict[str, Policy] = {f"chain {k}": Fixed(k) for k in sorted({1, 2, 4, 8, depth}) if k <= depth}
    if not trees:
        return found
    for levels, ranks in ((2, 2), (2, 6), (depth, 2), (depth, max(3, max_nodes // depth)), (1, max_nodes // 2)):
        if 1 < levels * ranks <= max_nodes:
            found[f"comb {levels}x{ranks}"] = StaticTree(comb(levels, ranks))
    return found


def time_texts(
    decoder: Any,
    prompts: Sequence[Any],
    policies: Mapping[str, Policy],
    repetitions: int = 2,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[TimedText]:
    """Decode every prompt plainly and under every policy, in turns; `tick` is called after every text."""
    found = []
    names = [PLAIN, *policies]
    for repetition in range(repetitions):
        for number, prompt in enumerate(prompts):
            turn = (repetition + number) % len(names)
            for name in names[turn:] + names[:turn]:
                policy = policies.get(name)
                started = time.perf_counter()
                if policy is None:
                    made = decoder.generate_plain(prompt, **options)
                else:
                    made = decoder.generate(prompt, policy=policy, **options)
                seconds = time.perf_counter() - started
                rounds = tuple(_sample(policy, record) for record in made.trace.rounds)
                found.append(TimedText(name, len(made.prompt), seconds, rounds))
                tick()
    return found


def measure_costs(
    decoder: Any,
    prompts: Sequence[Any],
    depth: int = 6,
    max_nodes: int = 64,
    repetitions: int = 2,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> RoundCost:
    """Decode the prompts plainly and under every probe, interleaved; medians. `tick` is called after every text."""
    return fit_costs(time_texts(decoder, prompts, probes(depth, max_nodes), repetitions, tick, **options))


def _sample(policy: Policy | None, record: Round) -> Sample:
    took = record.seconds
    levels = record.depth_proposed if policy is not None else -1
    return Sample(
        record.num_nodes,
        levels,
        _expanded(policy, record),
        took["draft"],
        took["verify"],
        took["commit"] + took["other"],
    )


def _expanded(policy: Policy | None, record: Round) -> int:
    """Nodes whose children were drafted, the root included."""
    if isinstance(policy, StaticTree) and record.num_nodes == len(policy.shape):
        return num_expanded(policy.shape)
    return record.depth_proposed


def fit_costs(texts: Sequence[TimedText]) -> RoundCost:
    """Medians by width; drafting by least squares over the medians of each (levels, expanded nodes).

    The first round of a text is left out: it pays for what is done once. Raises `InputError` where no text had a
    second one.
    """
    samples = [sample for text in texts for sample in text.rounds[1:]]
    if not samples:
        raise InputError("no text had a second round, so there are no costs to fit: raise max_new_tokens")
    verify: dict[int, list[float]] = defaultdict(list)
    draft: dict[tuple[int, int], list[float]] = defaultdict(list)
    for sample in samples:
        verify[sample.nodes + 1].append(sample.verify)
        if sample.levels >= 0:
            draft[sample.levels, sample.expanded if sample.levels else 0].append(sample.draft)
    empty = draft.pop((0, 0), [])
    start, level, node = _fit_drafting({key: statistics.median(times) for key, times in _seen(draft).items()})
    drafted = [sample.other for sample in samples if sample.levels >= 0]
    plain = [sample.other for sample in samples if sample.levels < 0]
    return RoundCost(
        {width: statistics.median(times) for width, times in sorted(_seen(verify).items())},
        level,
        node,
        statistics.median(drafted or plain),
        start,
        statistics.median(empty) if empty else 0.0,
        statistics.median(plain) if plain else None,
    )


def _seen(found: Mapping[Any, list[float]]) -> dict[Any, list[float]]:
    """What was seen often enough; all of it when nothing was."""
    often = {key: times for key, times in found.items() if len(times) >= _LEAST_SEEN}
    return often or dict(found)


def _fit_drafting(medians: Mapping[tuple[int, int], float]) -> tuple[float, float, float]:
    """Seconds whatever is drafted, of a level, and of an expanded node: none below 0, least squares of relative errors.

    Of equal fits the one with fewer parts is taken, so chains alone, whose levels are their expanded nodes, have
    levels.
    """
    best: tuple[float, tuple[float, float, float]] = (float("inf"), (0.0, 0.0, 0.0))
    if not medians:
        return best[1]
    y = np.maximum(np.array(list(medians.values())), 1e-12)
    columns = np.array([(1.0, levels, expanded) for levels, expanded in medians]) / y[:, None]
    # `level` before `start` before `node`: where one size was seen, its time is taken to grow with the levels.
    for number in (1, 2, 3):
        for parts in combinations((1, 0, 2), number):
            a = columns[:, parts]
            solution, *_ = np.linalg.lstsq(a, np.ones(len(y)), rcond=None)
            if (solution < 0).any() or np.linalg.matrix_rank(a) < number:
                continue
            error = float(((a @ solution - 1) ** 2).sum())
            if error < best[0] - 1e-12:
                found = dict(zip(parts, solution.tolist(), strict=True))
                best = error, (found.get(0, 0.0), found.get(1, 0.0), found.get(2, 0.0))
    return best[1]
