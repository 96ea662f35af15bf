"""What would make a host wait for its device, seen at the level of operators: also where no Python code reads a tensor.

`y[node]` with a tensor `node` reads it, and so does an index by truth values; on a GPU each stops the host.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from specdec.policy import Fixed
from specdec.tree import TokenTree
from specdec.verifier import walk

aten = torch.ops.aten
_READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


class Reads(TorchDispatchMode):
    """Counts operators whose result the host has to know. (`tolist` on a CPU is none: one a round is meant.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _READS:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drafter", ["model", "ngram"])
@pytest.mark.parametrize(
    ("verifier", "temperature"), [("greedy", 0.0), ("coupled", 0.0), ("coupled", 0.8), ("match", 0.8)]
)
def test_chains_are_drafted_and_verified_without_a_hidden_read(drafter: str, verifier: str, temperature: float) -> None:
    target = tiny_models.tiny()
    drafts: Any = ModelDrafter(tiny_models.noisy(target, 0.02), "eager") if drafter == "model" else drafter
    decoder = specdec.SpeculativeDecoder(target, drafter=drafts, verifier=verifier, policy=Fixed(4), backend="eager")
    filters: dict[str, Any] = {"top_p": 0.9, "repetition_penalty": 1.1} if temperature else {}
    with Reads() as reads:
        out = decoder.generate(PROMPT, max_new_tokens=24, temperature=temperature, seed=1, **filters)
    assert out.stats.num_draft_tokens > 8
    assert not reads.counts


@pytest.mark.parametrize("verifier", ["ratio", "block"])
def test_bets_are_judged_without_a_hidden_read(verifier: str) -> None:
    """Rules for samples, on point masses. (Of a sampled proposal, the rows are checked: one read more a round.)"""
    target = tiny_models.tiny()
    decoder = specdec.SpeculativeDecoder(target, drafter="ngram", verifier=verifier, policy=Fixed(4), backend="eager")
    with Reads() as reads:
        out = decoder.generate(PROMPT, max_new_tokens=24, temperature=0.8, seed=1)
    assert out.stats.num_draft_tokens
    assert not reads.counts


def test_the_walk_over_a_tree_reads_nothing() -> None:
    tree = TokenTree.of([4, 5, 6, 7], [-1, -1, 1, 2])
    y = torch.tensor([5, 0, 6, 9, 0])
    with Reads() as reads:
        verdict = walk(tree, y)
    assert not reads.counts
    assert (int(verdict.node), int(verdict.token)) == (2, 9)


def test_a_read_is_seen() -> None:
    """The control: an index by a tensor of no dimensions."""
    with Reads() as reads:
        torch.arange(4)[torch.tensor(2)]
    assert reads.counts
