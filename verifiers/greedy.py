"""Greedy acceptance."""

from __future__ import annotations

from torch import Tensor

from specdec.chance import Chance
from specdec.errors import IncompatiblePairError
from specdec.proposal import Draw, Proposal
from specdec.sampling import Sampling
from specdec.verifier import Verdict, Verifier, walk


class Greedy(Verifier):
    """Accept a drafted token when it is the target's most likely one.

    Lossless: at temperature 0 only; other temperatures are refused.
    """

    trees = True
    draws = (Draw.POINT, Draw.SHARED, Draw.SAMPLED)
    keeps_seed = True

    @property
    def name(self) -> str:
        return "greedy"

    def check_sampling(self, sampling: Sampling) -> None:
        if not sampling.is_greedy:
            raise IncompatiblePairError(
                f"the greedy verifier is exact at temperature 0 only, not at {sampling.temperature}; "
                "use verifier='coupled', which is exact at every temperature"
            )

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        return walk(proposal.tree, p.argmax(-1))
