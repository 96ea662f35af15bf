"""Tree rules side by side: expected tokens of a round on the same toy pairs and the same shapes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from specdec.chance import CounterChance
from specdec.oracle.certificate import measure
from specdec.oracle.laws import Law, ModelLaw
from specdec.policy import Plan
from specdec.proposal import Draw
from specdec.verifier import Verifier

#: Shapes, each with its vocabulary. The wide one has pairs without a token in some rows, or it would take minutes.
SHAPES: tuple[tuple[str, Plan, int, bool], ...] = (
    ("chain of 2", Plan(2), 3, False),
    ("3 siblings", Plan(1, (3,)), 4, False),
    ("2, then 1 each", Plan(2, (2, 1)), 3, False),
    ("2, then 2 each", Plan(2, (2, 2)), 3, True),
)
#: How siblings are drawn, and the rules that take them so.
WAYS: tuple[tuple[str, Draw], ...] = (
    ("recursive", Draw.SAMPLED),
    ("traversal", Draw.SAMPLED),
    ("greedy-multi", Draw.MIXED),
    ("match", Draw.POINT),
    ("coupled", Draw.SHARED),
)
_SIMULATED = 800


@dataclass(frozen=True)
class Cell:
    """Mean over pairs of the expected tokens per round; `error`: standard error where it was simulated, else 0."""

    tokens: float
    error: float = 0.0


def _law(name: str, draw: Draw, plan: Plan, vocab_size: int, thin: bool) -> Law:
    kinds = {Draw.SAMPLED, Draw.POINT} if draw is Draw.MIXED else {draw}
    return Law(name, ModelLaw(draw, plan), frozenset(kinds), vocab_size, plan.depth, True, thin=thin)


def _simulated(verifier: Verifier, law: Law, number: int, repetitions: int) -> tuple[float, float]:
    """Mean tokens of a round with the noise that decoding uses, one seed after the other, and its variance."""
    toy = law.toy(number)
    tokens = []
    for seed in range(repetitions):
        proposal = law.propose(toy, (), CounterChance(seed, "draft"))
        p = toy.target_rows((), proposal.tree)
        verdict = verifier.verify(p, proposal, 1, CounterChance(seed, "verify"))
        tokens.append(len(proposal.tree.path(int(verdict.node))) + 1)
    return statistics.fmean(tokens), statistics.variance(tokens) / repetitions


def compare_trees(
    verifiers: Mapping[str, Verifier], pairs: int = 4, repetitions: int = _SIMULATED
) -> dict[str, dict[str, Cell]]:
    """By shape, then by rule: enumerated, but for shared noise, whose real law is sampled over `repetitions` seeds."""
    table: dict[str, dict[str, Cell]] = {}
    for shape, plan, vocab_size, thin in SHAPES:
        row: dict[str, Cell] = {}
        for name, draw in WAYS:
            if name not in verifiers:
                continue
            law = _law(shape, draw, plan, vocab_size, thin)
            if draw is Draw.SHARED:
                found = [_simulated(verifiers[name], law, n, repetitions // pairs) for n in range(pairs)]
                row[name] = Cell(statistics.fmean(mean for mean, _ in found), sum(v for _, v in found) ** 0.5 / pairs)
            else:
                row[name] = Cell(statistics.fmean(_exact(verifiers[name], law, range(pairs))))
        table[shape] = row
    return table


def _exact(verifier: Verifier, law: Law, numbers: Sequence[int]) -> list[float]:
    return [measure(verifier, law, law.toy(number)).expected_tokens for number in numbers]
