"""What rounds cost here, from rounds: verification by its rows, drafting by its levels and its expanded nodes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specdec.errors import InputError
from specdec.fit.optimum import RoundCost
from specdec.fit.ranks import comb
from specdec.policy import Fixed, Policy
from specdec.trace import Round
from specdec.tree_policy import StaticTree


def probes(depth: int, max_nodes: int) -> dict[str, Policy]:
    """Policies whose rounds tell the costs apart: chains and combs of several sizes."""
    found: dict[str, Policy] = {f"chain {k}": Fixed(k) for k in sorted({1, 2, 4, depth})}
    for levels, ranks in ((2, 2), (2, 6), (depth, 2), (depth, max(3, max_nodes // depth)), (1, max_nodes // 2)):
        if 1 < levels * ranks <= max_nodes:
            found[f"comb {levels}x{ranks}"] = StaticTree(comb(levels, ranks))
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
    rounds: list[Round] = []
    expanded: list[int] = []
    policies = probes(depth, max_nodes)
    for _ in range(repetitions):
        for prompt in prompts:
            rounds += decoder.generate_plain(prompt, **options).trace.rounds[1:]
            expanded += [0] * (len(rounds) - len(expanded))
            for policy in policies.values():
                # The first rounds of a text pay for what is done once.
                made = decoder.generate(prompt, policy=policy, **options).trace.rounds[1:]
                rounds += made
                expanded += [_expanded(policy, record) for record in made]
                tick()
    return fit_costs(rounds, expanded)


def _expanded(policy: Policy, record: Round) -> int:
    """Nodes whose children were drafted, the root included."""
    if isinstance(policy, StaticTree) and record.num_nodes == len(policy.shape):
        return len(set(policy.shape))
    return record.depth_proposed


def fit_costs(rounds: Sequence[Round], expanded: Sequence[int]) -> RoundCost:
    """Medians by width; drafting by least squares over the medians of each (levels, expanded nodes).

    Raises `InputError` without rounds: those of one-round texts do not count.
    """
    if not rounds:
        raise InputError("no text had a second round, so there are no costs to fit: raise max_new_tokens")
    verify: dict[int, list[float]] = defaultdict(list)
    draft: dict[tuple[int, int], list[float]] = defaultdict(list)
    other = []
    for record, nodes in zip(rounds, expanded, strict=True):
        seconds = record.seconds
        verify[record.num_nodes + 1].append(seconds["verify"])
        other.append(seconds["commit"] + seconds["other"])
        if record.depth_proposed:
            draft[record.depth_proposed, nodes].append(seconds["draft"])
    level, node = 0.0, 0.0
    if draft:
        keys = list(draft)
        a = np.array(keys, dtype=np.float64)
        y = np.array([statistics.median(draft[key]) for key in keys])
        (level, node), *_ = np.linalg.lstsq(a, y, rcond=None)
        if node < 0 or level < 0:  # noise: one price for a level, as if nodes were free
            level, node = float((a[:, 0] @ y) / (a[:, 0] @ a[:, 0])), 0.0
    widths = {width: statistics.median(times) for width, times in verify.items()}
    return RoundCost(widths, float(level), float(node), statistics.median(other))
