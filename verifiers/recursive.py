"""Recursive rejection sampling over the children of each node."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.verifier import Verdict, Verifier, positive_part


def without(q: Tensor, token: Tensor) -> Tensor:
    """The row after drawing `token` from it without replacement."""
    rest = q.clone()
    rest[token] = 0
    total = rest.sum()
    return rest / total if total > 0 else rest


class Recursive(Verifier):
    """Test the children in drawing order, each against what the earlier ones left of p.

    R = p, D = q; child x is accepted with probability min(1, R(x)/D(x)); on rejection R = norm(max(R - D, 0)) and x
    leaves D (siblings are drawn without replacement). Descend into the accepted child and start anew. Deterministic
    children are point masses. (Sequoia: Chen et al., arXiv 2402.12374; SpecInfer: arXiv 2305.09781.)

    Lossless: yes. O(V) per tested child.
    """

    trees = True
    draws: ClassVar[tuple[Draw, ...]] = (Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "recursive"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        tree, node = proposal.tree, -1
        residual = p[0]
        while True:
            accepted, residual = self._one_level(residual, proposal, node, chance)
            if accepted is None:
                return Verdict.of(node, chance.draw(residual[None])[0])
            node, residual = accepted, p[accepted + 1]
            if not tree.children(node):
                return Verdict.of(node, chance.draw(residual[None])[0])

    def _one_level(
        self, residual: Tensor, proposal: Proposal, parent: int, chance: Chance
    ) -> tuple[int | None, Tensor]:
        left: dict[int, Tensor] = {}  # what is left of each distribution row, by its number
        for child in proposal.tree.children(parent):
            token = proposal.tree.tokens[child].to(residual.device)
            sampled = proposal.draws[child] is Draw.SAMPLED
            row = proposal.q_rows[child] if sampled else -1 - child
            q = left.get(row)
            if q is None:
                q = proposal.distribution(child, len(residual)).to(residual)
            if bool(chance.accept(residual[token], q[token])):
                return child, residual
            rest = positive_part(residual - q, residual)
            residual = rest / rest.sum()
            left[row] = without(q, token)
        return None, residual
