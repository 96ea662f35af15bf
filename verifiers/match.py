"""Sample and match."""

from __future__ import annotations

from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.verifier import Verdict, Verifier, walk


class Match(Verifier):
    """Draw the target's own token at every node, follow the children that equal it, emit the first that has none.

    Exact for any source of candidates, and optimal for deterministic ones; a sampled draft is accepted with
    probability sum(p q), so drafters are asked for their most likely tokens.

    Lossless: yes. O(N V).
    """

    trees = True
    draws = (Draw.POINT, Draw.SAMPLED, Draw.SHARED)

    @property
    def name(self) -> str:
        return "match"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        return walk(proposal.tree, chance.draw(p))
