"""Drafting laws: the ways in which proposals come about, each paired with every verifier that takes it.

Most run the model drafter's own code on a toy session, so that what is certified is what decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from specdec.chance import Chance
from specdec.drafter import Request
from specdec.oracle.toy import ROOT, Toy
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.registry import find
from specdec.sampling import Sampling
from specdec.tree import TokenTree

Context = tuple[int, ...]
Propose = Callable[[Toy, Context, Chance], Proposal]


@dataclass(frozen=True)
class Law:
    """How a toy's proposals are drawn, and on which toys: `depth` + 1 tokens are the most that a round can emit.

    `length`: emitted prefixes are completed (or cut) to this many tokens before the joint laws are compared.
    `rounds`: rounds decoded in sequence, so that what one emits conditions the next. `thin`: a shape with so many
    outcomes that only toys whose rows lack a token are enumerated.
    """

    name: str
    propose: Propose
    draws: frozenset[Draw]
    vocab_size: int
    depth: int
    trees: bool = False
    rounds: int = 1
    thin: bool = False
    greedy: bool = False

    @property
    def length(self) -> int:
        return self.depth + self.rounds

    @property
    def shares_noise(self) -> bool:
        return Draw.SHARED in self.draws

    def toy(self, number: int) -> Toy:
        """The pair of this number: even ones have full rows (unless `thin`), odd ones lack tokens."""
        return Toy(number, self.vocab_size, sparse=self.thin or number % 2 == 1, greedy=self.greedy)


class _State:
    """What `ModelDrafter.proposing` reads of its state."""

    def __init__(self, request: Request, session: Any):
        self.request, self.session = request, session


@lru_cache(maxsize=1)
def _model_drafter() -> Any:
    drafter = find("drafter", "model")
    return drafter.__new__(drafter)  # no weights: `propose` works on the session alone


@dataclass(frozen=True)
class ModelLaw:
    """The model drafter at work on the toy's draft."""

    draw: Draw
    plan: Plan
    greedy: bool = False

    def __call__(self, toy: Toy, context: Context, chance: Chance) -> Proposal:
        sampling = Sampling(temperature=0.0 if self.greedy else 1.0)
        request = Request((ROOT,), sampling, self.draw, toy.vocab_size, max_length=1 << 20)
        proposal: Proposal = _model_drafter().propose(_State(request, toy.session(context)), self.plan, chance)
        return proposal


class BestFirst:
    """Two siblings: the draft's best token, and one drawn from the rest; below each, one sampled child.

    Mixed siblings in the other order: also exact, and less is accepted.
    """

    def __call__(self, toy: Toy, context: Context, chance: Chance) -> Proposal:
        rest = toy.q(context).clone()
        best = int(rest.argmax())
        rest[best] = 0
        rows = [rest / rest.sum()]
        sampled = int(chance.draw(rows[0][None]))
        rows += [toy.q((*context, best)), toy.q((*context, sampled))]
        below = [int(chance.draw(row[None])) for row in rows[1:]]
        tree = TokenTree.of([best, sampled, *below], [-1, -1, 0, 1])
        return Proposal(tree, (Draw.POINT, *[Draw.SAMPLED] * 3), torch.stack(rows), (-1, 0, 1, 2))


def _no_draft(toy: Toy, context: Context, chance: Chance) -> Proposal:
    return Proposal.empty()


def _model(name: str, draw: Draw, plan: Plan, vocab_size: int = 3, greedy: bool = False, **more: Any) -> Law:
    trees = any(count > 1 for count in plan.branching) or bool(plan.shape) or plan.budget > 0
    kinds = {Draw.SAMPLED, Draw.POINT} if draw is Draw.MIXED else {draw}
    return Law(
        name, ModelLaw(draw, plan, greedy), frozenset(kinds), vocab_size, plan.depth, trees, greedy=greedy, **more
    )


LAWS: tuple[Law, ...] = (
    Law("no draft", _no_draft, frozenset(), 3, 0),
    _model("sampled chain", Draw.SAMPLED, Plan(3)),
    _model("sampled chain, stop-after", Draw.SAMPLED, Plan(3, stop_below=0.4)),
    _model("sampled chain, two rounds", Draw.SAMPLED, Plan(2), rounds=2, thin=True),
    _model("top-1 chain", Draw.POINT, Plan(3)),
    _model("shared-noise chain", Draw.SHARED, Plan(3)),
    _model("shared-noise chain, two rounds", Draw.SHARED, Plan(2), rounds=2, thin=True),
    _model("sampled siblings (3)", Draw.SAMPLED, Plan(1, (3,)), 4),
    _model("sampled tree (2,1)", Draw.SAMPLED, Plan(2, (2, 1))),
    _model("sampled tree (2,2)", Draw.SAMPLED, Plan(2, (2, 2)), thin=True),
    _model("sampled tree (2,1), stop-after", Draw.SAMPLED, Plan(2, (2, 1), stop_below=0.4)),
    _model("sampled tree of a shape", Draw.SAMPLED, Plan(2, shape=(-1, -1, 1, 1))),
    _model("mixed siblings (3)", Draw.MIXED, Plan(1, (3,)), 4),
    _model("mixed tree (2,1)", Draw.MIXED, Plan(2, (2, 1))),
    _model("mixed tree (2,2)", Draw.MIXED, Plan(2, (2, 2)), thin=True),
    Law("mixed siblings, best first", BestFirst(), frozenset({Draw.SAMPLED, Draw.POINT}), 3, 2, trees=True),
    _model("top-k tree (2,2)", Draw.POINT, Plan(2, (2, 2))),
    _model("top-k tree, best 4", Draw.POINT, Plan(3, budget=4, width=2)),
    _model("shared-noise tree (2,2)", Draw.SHARED, Plan(2, (2, 2)), thin=True),
    _model("shared-noise tree, best 3", Draw.SHARED, Plan(2, budget=3, width=2), thin=True),
    _model("temperature 0: chain", Draw.POINT, Plan(3), greedy=True),
    _model("temperature 0: tree (2,2)", Draw.POINT, Plan(2, (2, 2)), greedy=True),
)
