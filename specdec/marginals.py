"""From one distribution per position to a chain or tree: for drafters whose rows do not depend on what they drafted.

Shape suffixes: K positions, C children of a node, V vocabulary, R draft vocabulary, N nodes.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import Request
from specdec.draws import draw_children, fit_vocabulary, spread
from specdec.growth import grow, worthwhile
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.session import Steps, run
from specdec.tree import TokenTree


def grow_marginals(
    logits_KR: Tensor,
    plan: Plan,
    request: Request,
    prefix: Sequence[int],
    chance: Chance,
    ids_R: Tensor | None = None,
) -> Proposal:
    """What `grow` makes of rows that are the same for all nodes of a level, at once instead of level by level.

    `logits_KR`: of the first K positions behind the root, the last token of `prefix`. `ids_R`: the target's id of each
    column of a draft vocabulary. A chain is drawn from all rows in one go. With a node budget the tree is the most
    probable one of that many nodes that the rows allow, whatever the plan's `width`: each node is one step of a heap
    (DDTree, arXiv 2604.12989), and the device is waited for once. Where penalties or processors make a row depend on
    the tokens before it, and for other shapes, it is `grow`.

    Lossless: yes. Every position's draw is independent of the others, which is the law that its row states; with a
    budget no node is sampled, so that nodes may be chosen for their probability.
    """
    plan = plan.limited(len(logits_KR))
    if not plan.depth:
        return Proposal.empty()
    draw = Draw.POINT if request.sampling.is_greedy else request.draw
    if not request.sampling.reads_prefix:
        if plan.budget:
            draw = Draw.SHARED if draw is Draw.SHARED else Draw.POINT
            return _most_probable(logits_KR, plan, request, len(prefix), draw, chance, ids_R)
        if plan.is_chain:
            # The first of mixed siblings is a sample.
            draw = Draw.SAMPLED if draw is Draw.MIXED else draw
            return _chain(logits_KR, plan, request, len(prefix), draw, chance, ids_R)

    def expand(ran: TokenTree) -> Steps[Tensor]:
        yield from ()
        depth = ran.max_depth
        return logits_KR[depth].expand(ran.depths.count(depth) if depth else 1, -1)

    return run(grow(expand, plan, request, prefix, chance, ids_R)).proposal


def _scores(logits_KR: Tensor, plan: Plan, request: Request, draw: Draw, ids_R: Tensor | None) -> Tensor:
    """`[K, V]`; `[K, R]` for top tokens of a draft vocabulary."""
    logits = logits_KR[: plan.depth]
    if ids_R is None:
        logits = fit_vocabulary(logits, request.vocab_size)
    elif draw is not Draw.POINT:
        logits = spread(logits, ids_R, request.vocab_size)
    return request.sampling.scores(logits, (), TokenTree.empty(), [-1] * len(logits))


def _named(columns: Tensor, draw: Draw, ids_R: Tensor | None) -> Tensor:
    return columns if ids_R is None or draw is not Draw.POINT else ids_R[columns]


def _chain(
    logits_KR: Tensor, plan: Plan, request: Request, length: int, draw: Draw, chance: Chance, ids_R: Tensor | None
) -> Proposal:
    scores_KV = _scores(logits_KR, plan, request, draw, ids_R)
    q_KV = scores_KV.softmax(-1) if draw is not Draw.POINT or plan.stop_below > 0 else scores_KV
    if draw is Draw.SHARED:
        columns_K = chance.race(q_KV, range(length, length + plan.depth))[:, 0]
    else:
        columns_K = chance.draw(q_KV) if draw is Draw.SAMPLED else scores_KV.argmax(-1)
    if plan.stop_below > 0:
        # After the first weak token, which is kept.
        sure_K = q_KV.gather(1, columns_K[:, None])[:, 0] >= plan.stop_below
        kept = min(plan.depth, int(sure_K.long().cumprod(0).sum()) + 1)
        columns_K, q_KV = columns_K[:kept], q_KV[:kept]
    tree = TokenTree.chain(_named(columns_K, draw, ids_R))
    return Proposal.sampled(tree, q_KV) if draw is Draw.SAMPLED else Proposal(tree, (draw,) * len(tree))


def _most_probable(
    logits_KR: Tensor, plan: Plan, request: Request, length: int, draw: Draw, chance: Chance, ids_R: Tensor | None
) -> Proposal:
    """Under shared noise, children are the first of the race; that the n-th of it is the target's own is taken to be
    as probable as the n-th most probable token of the row."""
    scores_KV = _scores(logits_KR, plan, request, draw, ids_R)
    width = min(plan.budget, scores_KV.shape[-1])
    log_q_KC, columns_KC = scores_KV.log_softmax(-1).topk(width)
    if draw is Draw.SHARED:
        q_KV = scores_KV.softmax(-1)
        raced = [draw_children(scores_KV, q_KV[k : k + 1], draw, width, length + k, chance) for k in range(plan.depth)]
        columns_KC = torch.cat(raced)
        log_q_KC = log_q_KC.masked_fill(columns_KC < 0, -torch.inf)
    log_q = log_q_KC.tolist()
    places, parents = best_first(log_q, plan.budget)
    paths: list[float] = []
    for (depth, rank), parent in zip(places, parents, strict=True):
        paths.append(log_q[depth][rank] + (paths[parent] if parent >= 0 else 0.0))
    probabilities = [math.exp(path) for path in paths]
    kept = worthwhile(plan, probabilities, 1)
    depths, ranks = torch.tensor(places[:kept], dtype=torch.int64, device=columns_KC.device).T
    tree = TokenTree(_named(columns_KC[depths, ranks], draw, ids_R), tuple(parents[:kept]))
    return Proposal(tree, (draw,) * len(tree), expected=sum(probabilities[:kept]))


def best_first(log_q_KC: Sequence[Sequence[float]], budget: int) -> tuple[list[tuple[int, int]], list[int]]:
    """The `budget` nodes whose paths have the largest sums, as (position, rank), and their parents; -1 is the root.

    Rows fall, and -inf stands for no child. Nodes come by falling probability, hence after their parents and their
    better siblings. O(budget log budget).
    """
    places: list[tuple[int, int]] = []
    parents: list[int] = []
    order = count()  # of equals, the first found
    heap: list[tuple[float, int, int, int, int, float]] = []

    def offer(depth: int, rank: int, parent: int, before: float) -> None:
        if depth < len(log_q_KC) and rank < len(log_q_KC[depth]) and log_q_KC[depth][rank] > float("-inf"):
            heapq.heappush(heap, (-(before + log_q_KC[depth][rank]), next(order), depth, rank, parent, before))

    offer(0, 0, -1, 0.0)
    while heap and len(places) < budget:
        cost, _, depth, rank, parent, before = heapq.heappop(heap)
        offer(depth + 1, 0, len(places), -cost)
        offer(depth, rank + 1, parent, before)
        places.append((depth, rank))
        parents.append(parent)
    return places, parents
