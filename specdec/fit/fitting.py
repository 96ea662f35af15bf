"""The whole fit: measure, solve, and keep the evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from specdec.fit.costs import measure_costs, probes
from specdec.fit.optimum import RoundCost, best_tree, expected_tokens
from specdec.fit.plan import TreePlan, circumstances
from specdec.fit.ranks import measure_ranks
from specdec.tree import structure

_COST_PROMPTS, _REPETITIONS = 2, 2


def num_texts(num_prompts: int, depth: int, nodes: int) -> int:
    """Calls of `tick` that a fit makes."""
    return num_prompts + (1 + len(probes(depth, nodes))) * min(_COST_PROMPTS, num_prompts) * _REPETITIONS


def fit(
    decoder: Any,
    prompts: Sequence[Any],
    nodes: int = 64,
    depth: int = 6,
    ranks: int = 8,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> TreePlan:
    """The best tree of at most `nodes` nodes for this decoder's pair, with these generation options, on this machine.

    Acceptance comes from all prompts, costs from the first ones, every probe in turns. Quiet machines fit better.
    """
    ranks = min(ranks, max(1, nodes))
    table, _ = measure_ranks(decoder, prompts, depth, ranks, tick=tick, **options)
    costs = measure_costs(decoder, prompts[:_COST_PROMPTS], depth, nodes, _REPETITIONS, tick, **options)
    accept = table.probabilities()
    shape, _ = best_tree(accept, costs, nodes)
    return TreePlan(
        shape,
        circumstances(decoder.target, decoder.drafter),
        float(options.get("temperature", 0.0)),
        {
            "acceptance": accept.round(4).tolist(),
            "reached": table.reached,
            "costs": asdict(costs),
            "candidates": candidates(accept, costs, shape),
        },
    )


def candidates(accept: np.ndarray, costs: RoundCost, shape: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """What the fit predicts of plain decoding, of the best chain, and of the shape that it chose."""
    chains = [tuple(range(-1, k - 1)) for k in range(1, len(accept) + 1)]
    chain = max(chains, key=lambda parents: expected_tokens(parents, accept) / costs.seconds(parents))
    plain = 1.0 / costs.seconds(())
    found = {}
    for name, parents in (("plain", ()), ("best chain", chain), ("fitted", shape)):
        tokens = expected_tokens(parents, accept)
        found[name] = {
            "nodes": len(parents),
            "depth": structure(parents).max_depth,
            "tokens": round(tokens, 4),
            "speedup": round(tokens / costs.seconds(parents) / plain, 4),
        }
    return found
