"""The ratio test."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.transfer import to_device
from specdec.verifier import Verdict, Verifier, positive_part


class Ratio(Verifier):
    """Accept x with probability min(1, p(x)/q(x)); after the first rejection draw from norm(max(p - q, 0)).

    Speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). Chains.
    Deterministic drafts count as point masses.

    Lossless: yes. O(k V), no data-dependent branch.
    """

    draws = (Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "ratio"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        q = proposal.chain_distributions(p)
        x = to_device(proposal.tree.tokens, p.device)[:, None]
        accepted = chance.accept(p[:-1].gather(1, x)[:, 0], q.gather(1, x)[:, 0])
        n = accepted.long().cumprod(0).sum()
        rows = torch.cat((positive_part(p[:-1] - q, p[:-1]), p[-1:]))
        return Verdict(n - 1, chance.draw(rows.index_select(0, n[None]))[0])
