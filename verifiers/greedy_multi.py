"""Recursive rejection sampling over siblings of which one is sampled and the others are the draft's top tokens."""

from __future__ import annotations

from specdec.verifiers.recursive import Recursive

from specdec.proposal import Draw


class GreedyMulti(Recursive):
    """Test first the child that was sampled from what the top tokens leave of q, then the top tokens as point masses.

    With k children of one node the first meets p over all tokens outside the top k - 1, and the others cover what is
    left: sum over the top of p, plus sum over the rest of min(p, q_rest), is accepted, which is the best that any rule
    can do with such drafts. (Hu et al., arXiv 2502.18779.) Proposals of other kinds are verified as `recursive` does.

    Lossless: yes. O(V) per tested child.
    """

    draws = (Draw.MIXED, Draw.SAMPLED, Draw.POINT)

    @property
    def name(self) -> str:
        return "greedy-multi"
