"""One of every registered drafter on one tiny target, right now and then; and policies of every kind.

A new drafter needs a line in `DRAFTERS`, a new policy one in `POLICIES`. Where one name stands for several methods,
each has a line, as "name:method".
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_dflash
import tiny_eagle
import tiny_models
import tiny_pairs
import torch
from specdec.drafters import (
    EagleDrafter,
    EarlyExitDrafter,
    HybridDrafter,
    LookaheadDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    NoDrafter,
    SelfQuantDrafter,
    SuffixDrafter,
)
from specdec.drafters.cross_vocab import CommonTokens, Retokenised

from specdec.drafter import Drafter
from specdec.fit import FittedTree, TreePlan
from specdec.formats.medusa_heads import HeadShape, MedusaHeads
from specdec.policy import Confidence, Fixed, Heuristic, Policy, Throughput
from specdec.translation import Translation
from specdec.tree_policy import AdaptiveTree, DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
NOISE = 0.03  # of the draft's weights: acceptance is partial


@cache
def target() -> torch.nn.Module:
    return tiny_models.tiny("gpt-neox")


@cache
def partial_draft() -> torch.nn.Module:
    return tiny_models.noisy(target(), NOISE)


@cache
def medusa_heads() -> MedusaHeads:
    """Heads that repeat the target's own prediction, more or less: right now and then."""
    heads = MedusaHeads(HeadShape(3, 1, 16, tiny_models.VOCAB, tiny_models.VOCAB, "tied")).double()
    return tiny_models.randomize(heads, NOISE, 0)


@cache
def block_draft() -> torch.nn.Module:
    return tiny_dflash.fitted(target(), PROMPT + tiny_models.reference(target(), PROMPT, 30))


@cache
def eagle_head() -> torch.nn.Module:
    return tiny_eagle.fitted(target(), PROMPT + tiny_models.reference(target(), PROMPT, 40))


@cache
def translation() -> Translation:
    return Translation(*tiny_pairs.tokenizers())


@cache
def renumbered_draft() -> torch.nn.Module:
    return tiny_pairs.draft_of(target(), NOISE, translation().same)


@cache
def plan_file() -> str:
    """A fitted tree, in a file as `specdec tree` writes it."""
    path = Path(tempfile.mkdtemp()) / "tree.json"
    TreePlan((-1, -1, 0, 0, 1), {}).save(path)
    return str(path)


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "cross_vocab": lambda: CommonTokens(renumbered_draft(), translation()),
    "cross_vocab:retokenise": lambda: Retokenised(renumbered_draft(), translation()),
    "eagle": lambda: EagleDrafter(eagle_head()),
    "early_exit": EarlyExitDrafter,
    "hybrid": lambda: HybridDrafter(NgramDrafter(), ModelDrafter(partial_draft()), probe_every=5),
    "lookahead": lambda: LookaheadDrafter(window=3, ngram=3, guesses=3),
    "medusa": lambda: MedusaDrafter(target(), medusa_heads()),
    "model": lambda: ModelDrafter(partial_draft()),
    "ngram": NgramDrafter,
    "none": NoDrafter,
    "parallel": lambda: tiny_dflash.drafter(target(), block_draft()),
    "self_quant": SelfQuantDrafter,
    "suffix": SuffixDrafter,
}
#: Those that know nothing of the target: they draft for any other too.
FREE = ("lookahead", "ngram", "none", "suffix")
POLICIES: dict[str, Callable[[], Policy]] = {
    "fixed-1": lambda: Fixed(1),
    "fixed-4": lambda: Fixed(4),
    "tree": lambda: Fixed(3, (3, 2)),
    "shape": lambda: StaticTree((-1, -1, 0, 0, 1, 2, 2, 5)),
    "dynamic-tree": lambda: DynamicTree(budget=8, k=4, width=3),
    "fitted-tree": lambda: FittedTree(plan_file()),
    "adaptive-tree": lambda: AdaptiveTree(budget=12, k=4, width=3, probe_every=4),
    "confidence": lambda: Confidence(0.5, k=6),
    "heuristic": lambda: Heuristic(3, limit=6),
    "throughput": lambda: Throughput(k=3, limit=6, probe_every=4),
}


def fresh(name: str) -> Drafter:
    if name not in DRAFTERS:
        pytest.fail(f"the drafter {name!r} is registered but has no factory in DRAFTERS: add one, so that it is tested")
    return DRAFTERS[name]()


@cache
def shared(name: str) -> Drafter:
    """The same object for every test: all that changes during a text is in its state."""
    return fresh(name)
