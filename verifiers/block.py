"""Block verification."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.transfer import to_device
from specdec.verifier import Verdict, Verifier, positive_part


class Block(Verifier):
    """The longest acceptance that a chain allows: all k tokens are judged together.

    With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i)/q(x_i)), prefix i is kept with probability
    h_i = S_i / (S_i + 1 - w_i), S_i = sum max(w_i p - q, 0) (h_k = w_k), and the *longest* kept prefix wins: there is
    no early break. (Sun et al., arXiv 2403.10444.) Never accepts less than the ratio test.

    Lossless: yes. O(k V).
    """

    draws = (Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "block"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        k = len(proposal.tree)
        if not k:
            return Verdict(torch.tensor(-1, device=p.device), chance.draw(p)[0])
        q = proposal.chain_distributions(p)
        x = to_device(proposal.tree.tokens, p.device)[:, None]
        px, qx = p[:-1].gather(1, x)[:, 0], q.gather(1, x)[:, 0]
        weights = [torch.ones_like(px[0])]
        for i in range(k):
            weights.append(torch.clamp(weights[-1] * px[i] / qx[i], max=1.0))
        w = torch.stack(weights)
        residual = (w[:-1, None] * p[:-1] - q).clamp_min(0)
        mass = residual.sum(-1)
        keep = torch.where(w[:-1] < 1, mass / (mass + 1 - w[:-1]), 1.0)
        h = torch.cat((keep[1:], w[-1:]))  # of prefixes 1 .. k; the empty one is always kept
        kept = chance.accept(h, torch.ones_like(h)).long()
        n = (kept * torch.arange(1, k + 1, device=p.device)).max()
        rows = torch.cat((positive_part(residual, p[:-1]), p[-1:]))
        return Verdict(n - 1, chance.draw(rows.index_select(0, n[None]))[0])
