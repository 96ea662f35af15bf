"""Typical acceptance (lossy)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.errors import InputError
from specdec.proposal import Draw, Proposal
from specdec.verifier import Verdict, Verifier


class Typical(Verifier):
    """Accept x when p(x) > min(epsilon, delta exp(-H(p))); the longest accepted path wins, then draw from p.

    (Medusa: Cai et al., arXiv 2401.10774; defaults as released, delta = sqrt(epsilon).) The first token of a round
    is always drawn from the target, so a rejection costs nothing but time.

    Lossless: no. It needs allow_lossy=True, and every result is stamped.
    """

    lossless = False
    trees = True
    draws = (Draw.POINT, Draw.SAMPLED, Draw.SHARED)

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3):
        if not 0 < epsilon <= 1 or delta <= 0:
            raise InputError(f"epsilon must lie in (0, 1] and delta above 0, not {epsilon} and {delta}")
        self.epsilon, self.delta = epsilon, delta

    @property
    def name(self) -> str:
        return "typical"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        tree = proposal.tree
        best, best_key = -1, (0, 0.0)
        if len(tree):
            entropy = -(p * p.clamp_min(1e-12).log()).sum(-1)
            floor = torch.clamp(self.delta * torch.exp(-entropy), max=self.epsilon)
            parents = torch.tensor(tree.parents, device=p.device) + 1
            px = p[parents].gather(1, tree.tokens.to(p.device)[:, None])[:, 0]
            reached = ((px > floor[parents]) | ~tree.ancestors_NN.to(p.device)).all(-1).tolist()
            log_px = px.log().tolist()
            for node in range(len(tree)):
                if reached[node]:  # ties by likelihood
                    key = (tree.depths[node], sum(log_px[n] for n in tree.path(node)))
                    if best < 0 or key > best_key:
                        best, best_key = node, key
        return Verdict.of(best, chance.draw(p[best + 1][None])[0])
