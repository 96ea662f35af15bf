"""Traversal verification."""

from __future__ import annotations

import torch
from specdec.verifiers.recursive import without
from torch import Tensor

from specdec.chance import Chance
from specdec.proposal import Draw, Proposal
from specdec.verifier import Verdict, Verifier, positive_part


class Traversal(Verifier):
    """From the leaves to the root: the deepest path gets the first chance, and its refusal feeds its parent.

    Each node holds P, Q and a weight a (root: 1). A child's weight is min(1, a P(x)/Q(x)) of its parent's *current*
    values; a leaf is kept with probability a; a refused leaf turns its parent's P into norm(max(aP - Q, 0)), a into
    S/(S + 1 - a) with S = sum max(aP - Q, 0), and leaves Q. (Weng et al., arXiv 2505.12398.) On a chain this is
    block verification.

    Lossless: yes. O(V) per refused node.
    """

    trees = True
    draws = (Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "traversal"

    def verify(self, p: Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        tree = proposal.tree
        rows = {node: p[node + 1] for node in range(-1, len(tree))}  # P of each node, as it stands
        left: dict[int, Tensor] = {}  # Q by number of its row
        weight = {-1: torch.ones((), dtype=p.dtype, device=p.device)}
        waiting = {node: list(tree.children(node)) for node in range(-1, len(tree))}

        def q_of(child: int) -> tuple[int, Tensor]:
            row = proposal.q_rows[child] if proposal.draws[child] is Draw.SAMPLED else -1 - child
            if row not in left:
                left[row] = proposal.distribution(child, p.shape[-1]).to(p)
            return row, left[row]

        node = -1
        while True:
            while waiting[node]:
                child = waiting[node][0]
                x = tree.tokens[child].to(p.device)
                weight[child] = torch.clamp(weight[node] * rows[node][x] / q_of(child)[1][x], max=1.0)
                node = child
            if node < 0 or bool(chance.accept(weight[node], torch.ones_like(weight[node]))):
                return Verdict.of(node, chance.draw(rows[node][None])[0])
            parent = tree.parents[node]
            row, q = q_of(node)
            rest = (weight[parent] * rows[parent] - q).clamp_min(0)
            mass = rest.sum()
            rows[parent] = positive_part(rest, rows[parent])
            rows[parent] = rows[parent] / rows[parent].sum()
            refused = mass + (1 - weight[parent])  # in this order: exactly `mass` when the parent's weight is 1
            weight[parent] = torch.where(refused > 0, mass / refused, 1.0)
            left[row] = without(q, tree.tokens[node].to(p.device))
            waiting[parent].pop(0)
            node = parent
