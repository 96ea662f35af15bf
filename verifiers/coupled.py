"""The shared-noise race, the default rule."""

from __future__ import annotations

from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.verifier import Verdict, Verifier, walk


class Coupled(Verifier):
    """Every position has one noise row, known to drafter and verifier; the target's choice is the winner of its race.

    The text is a function of (seed, prompt) alone: token-identical to plain decoding at every temperature, whatever
    the drafter proposes. A drafter that races on the same noise is accepted at least (1-TV)/(1+TV) of the time
    (drafter-invariant speculation: Daliri et al., arXiv 2408.07978).

    Lossless: yes, and it keeps the seed. O(N V).
    """

    trees = True
    draws = (Draw.SHARED, Draw.POINT, Draw.SAMPLED)
    keeps_seed = True

    @property
    def name(self) -> str:
        return "coupled"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        tree = proposal.tree
        positions = [position, *(position + depth for depth in tree.depths)]
        return walk(tree, chance.race(p, positions)[:, 0])
