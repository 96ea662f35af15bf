"""How a plan becomes a tree: level by level, from the logits that a drafter gives for the nodes of one level.

Shape suffixes: F nodes of the frontier (those of one level that are expanded), C children of each, V vocabulary, R
draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import Request
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.session import Steps
from specdec.tree import TokenTree, structure

# Logit of a token outside a draft vocabulary.
_OUTSIDE = -1e4

#: `expand(ran)` gives the logits `[F, V]` of the newest level of `ran`, in the order of its nodes; of the root for the
#: empty tree. `ran` holds the nodes that are expanded, no leaves; it grows from call to call.
Expand = Callable[[TokenTree], Steps[Tensor]]


@dataclass(frozen=True, eq=False)
class Grown:
    """A proposal, and for each of its nodes the node of `ran` that it is; -1 for leaves, which were never run."""

    proposal: Proposal
    ran_as: tuple[int, ...]

    def ran_path(self, path: Sequence[int]) -> list[int]:
        """A path of the proposal as nodes that the drafter ran: its beginning, without a leaf."""
        return [self.ran_as[node] for node in path if self.ran_as[node] >= 0]


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Crop or pad the last axis: paddings of one tokenizer's vocabulary differ between models."""
    missing = vocab_size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def spread(logits_FR: Tensor, ids_R: Tensor, vocab_size: int) -> Tensor:
    """Logits of a draft vocabulary in the target's ids, `[F, V]`; of other tokens so low that their probability is 0.

    Not -inf: where processors ban all that the drafter knows, what they allow remains a distribution.
    """
    full_FV = logits_FR.new_full((logits_FR.shape[0], vocab_size), _OUTSIDE)
    return full_FV.index_copy_(1, ids_R, logits_FR)


def without_replacement(q_FV: Tensor, count: int, chance: Chance) -> Tensor:
    """`[F, count]` tokens in drawing order; -1 where the support is used up, never in the first column."""
    left = q_FV.clone()
    drawn: list[Tensor] = []
    for _ in range(count):
        token = chance.draw(left)[:, None]
        drawn.append(torch.where(left.sum(-1, keepdim=True) > 0, token, -1) if drawn else token)
        left.scatter_(1, token, 0.0)
    return torch.cat(drawn, 1)


def mixed(q_FV: Tensor, counts: Sequence[int], chance: Chance) -> tuple[Tensor, Tensor]:
    """Children of which the first is drawn from what the others, the top tokens, leave: `[F, C]`, -1 where there are
    fewer; and the rows `[F, V]` that the first ones were drawn from. (Greedy drafts: Hu et al., arXiv 2502.18779.)"""
    rest_FV = q_FV.clone()
    top_FC = q_FV.topk(max(1, min(max(counts) - 1, q_FV.shape[-1]))).indices
    rank = torch.arange(top_FC.shape[1], device=q_FV.device)
    is_top = rank < torch.tensor(counts, device=q_FV.device)[:, None] - 1
    rest_FV.scatter_reduce_(1, top_FC, torch.where(is_top, 0.0, 1.0).to(q_FV), "prod")
    left = rest_FV.sum(-1, keepdim=True)
    first_F1 = torch.where(left > 0, chance.draw(rest_FV)[:, None], -1)
    top_FC = torch.where(is_top & (q_FV.gather(1, top_FC) > 0), top_FC, -1)
    return torch.cat((first_F1, top_FC), 1)[:, : max(counts)], rest_FV / left.clamp_min(torch.finfo(q_FV.dtype).tiny)


def draw_children(scores_FV: Tensor, q_FV: Tensor, draw: Draw, count: int, position: int, chance: Chance) -> Tensor:
    """`[F, C]` children in drawing order, drawn alike; -1 where there are fewer, never in the first column."""
    if draw is Draw.SHARED:
        return chance.race(q_FV, [position] * len(q_FV), count)
    if draw is Draw.SAMPLED:
        return without_replacement(q_FV, count, chance)
    best, index = scores_FV.topk(min(count, scores_FV.shape[-1]))
    return torch.where(best.isinf(), -1, index) if count > 1 else index


def grow(
    expand: Expand,
    plan: Plan,
    request: Request,
    prefix: Sequence[int],
    chance: Chance,
    ids_R: Tensor | None = None,
) -> Steps[Grown]:
    """A chain, a tree of fixed branching or shape, or, with a node budget, the most probable tree.

    `prefix`: the text so far, which ends with the root token. At temperature 0 children are the top tokens; above it
    they are drawn as the verifier wants: by the shared race, sampled without replacement, or the top ones.

    `ids_R`: for a drafter whose logits are those of a draft vocabulary, `[F, R]`: the target's id of each column,
    int64, distinct, on the logits' device. Top tokens are then found among R columns; what is drawn, is drawn among V.

    Lossless: yes. Which drawn nodes are kept depends on their own tokens only where nodes are not sampled.
    """
    if plan.depth < 1:  # the drafter's context is full
        return Grown(Proposal.empty(), ())
    draw = Draw.POINT if request.sampling.is_greedy else request.draw
    if plan.budget:
        draw = Draw.SHARED if draw is Draw.SHARED else Draw.POINT
        return (yield from _Dynamic(expand, plan, request, prefix, chance, draw, ids_R).run())
    return (yield from _Planned(expand, plan, request, prefix, chance, draw, ids_R).run())


class _Growth:
    """What both ways to grow a tree share: `tree` is what is proposed, `ran` the part of it that is expanded."""

    def __init__(
        self,
        expand: Expand,
        plan: Plan,
        request: Request,
        prefix: Sequence[int],
        chance: Chance,
        draw: Draw,
        ids_R: Tensor | None,
    ):
        self.expand, self.plan, self.request, self.prefix, self.chance = expand, plan, request, prefix, chance
        self.draw, self.ids_R = draw, ids_R
        # Noise, rows of q and processors know tokens by the target's ids; a top token is found without them.
        self.narrow = ids_R is not None and draw is Draw.POINT and not request.sampling.reads_prefix

    def scores(self, logits: Tensor, tree: TokenTree, frontier: Sequence[int]) -> Tensor:
        """`[F, V]`, or `[F, R]` where the columns of the draft vocabulary will do."""
        if self.ids_R is None:
            logits = fit_vocabulary(logits, self.request.vocab_size)
        elif not self.narrow:
            logits = spread(logits, self.ids_R, self.request.vocab_size)
        return self.request.sampling.scores(logits, self.prefix, tree, frontier)

    def named(self, columns: Tensor) -> Tensor:
        """The target's ids of columns of `scores`; -1 stays."""
        if not self.narrow:
            return columns
        assert self.ids_R is not None
        return torch.where(columns < 0, columns, self.ids_R[columns])


class _Planned(_Growth):
    """Every node has as many children as the plan says."""

    def run(self) -> Steps[Grown]:
        plan, draw, tree, ran = self.plan, self.draw, TokenTree.empty(), TokenTree.empty()
        shape = structure(plan.shape).children
        frontier, planned = [-1], [-1]  # nodes of the tree, and of the plan's shape, that are expanded next
        ran_as: list[int] = []
        draws: list[Draw] = []
        blocks: list[Tensor] = []  # of distribution rows, one per level
        q_rows: list[int] = []
        for depth in range(plan.depth):
            counts = [len(shape[at + 1]) for at in planned] if plan.shape else [plan.children(depth)] * len(frontier)
            logits = yield from self.expand(ran)
            scores_FV = self.scores(logits, tree, frontier)
            # Greedy chains that never ask for confidence do without probabilities.
            q_FV = scores_FV.softmax(-1) if draw is not Draw.POINT or plan.stop_below > 0 else scores_FV
            position = len(self.prefix) + depth
            drawn_from_FV = q_FV
            if draw is Draw.MIXED:
                columns_FC, drawn_from_FV = mixed(q_FV, counts, self.chance)
            else:
                columns_FC = draw_children(scores_FV, q_FV, draw, max(counts), position, self.chance)
            row_of, ranks, columns = _present(columns_FC, counts)
            tokens = self.named(columns)
            kinds = [_kind(draw, rank) for rank in ranks]
            draws += kinds
            before = sum(len(block) for block in blocks)
            q_rows += [before + row if kind is Draw.SAMPLED else -1 for row, kind in zip(row_of, kinds, strict=True)]
            if draw in (Draw.SAMPLED, Draw.MIXED):
                blocks.append(drawn_from_FV)
            first = len(tree)
            tree = tree.extend(tokens, [frontier[row] for row in row_of])
            goes_on = [True] * len(row_of)
            if plan.shape:
                below = [shape[planned[row] + 1][rank] for row, rank in zip(row_of, ranks, strict=True)]
                goes_on = [bool(shape[at + 1]) for at in below]
                planned = [at for at, on in zip(below, goes_on, strict=True) if on]
            if plan.stop_below > 0:
                sure: list[bool] = (q_FV[row_of, columns] >= plan.stop_below).tolist()
                goes_on = [a and b for a, b in zip(goes_on, sure, strict=True)]
            if depth + 1 == plan.depth:
                goes_on = [False] * len(row_of)
            chosen = [i for i, on in enumerate(goes_on) if on]
            parents = [ran_as[frontier[row_of[i]]] if frontier[row_of[i]] >= 0 else -1 for i in chosen]
            numbers = iter(range(len(ran), len(ran) + len(chosen)))
            ran_as += [next(numbers) if on else -1 for on in goes_on]
            if not chosen:
                break
            ran = ran.extend(tokens if len(chosen) == len(row_of) else tokens[chosen], parents)
            frontier = [first + i for i in chosen]
        q = torch.cat(blocks) if blocks and len(tree) else None
        return Grown(Proposal(tree, tuple(draws), q, tuple(q_rows) if q is not None else ()), tuple(ran_as))


def _kind(draw: Draw, rank: int) -> Draw:
    """How a child of this rank is drawn where its parent's children are drawn like this."""
    if draw is not Draw.MIXED:
        return draw
    return Draw.SAMPLED if rank == 0 else Draw.POINT


def _present(tokens_FC: Tensor, counts: Sequence[int]) -> tuple[list[int], list[int], Tensor]:
    """Row, rank and token of every child that there is: at most `counts[f]` in row f, fewer where the support ends."""
    if tokens_FC.shape[1] == 1:
        return list(range(len(tokens_FC))), [0] * len(tokens_FC), tokens_FC[:, 0]
    wanted = torch.arange(tokens_FC.shape[1], device=tokens_FC.device) < torch.tensor(
        counts, device=tokens_FC.device
    ).unsqueeze(1)
    present = wanted & (tokens_FC >= 0)
    rows, ranks = present.nonzero().T.tolist()
    return rows, ranks, tokens_FC[present]


def worthwhile(plan: Plan, probabilities: Sequence[float], levels: int) -> int:
    """How many of these nodes, the most probable first, bring the most expected tokens per second; at least one."""
    if plan.costs is None or not probabilities:
        return len(probabilities)
    gained = accumulate(plan.trust * p for p in probabilities)
    rates = [(1 + g) / plan.costs.round(n, levels) for n, g in enumerate(gained, 1)]
    return rates.index(max(rates)) + 1


class _Dynamic(_Growth):
    """Expand the `width` most probable paths of each level, then keep the `budget` most probable nodes of all.

    (EAGLE-2: Li et al., arXiv 2406.16858.) Children are the top tokens, or under shared noise the first of the race;
    the probability that the n-th of a race is the target's own is taken to be the n-th largest of the row, which needs
    no noise. Sampled nodes may not be dropped for what they are, so that rules for them get point masses here.
    One transfer from the device per level.
    """

    expected = 0.0  # of the expanded nodes: accepted ones
    expanded = 0

    def run(self) -> Steps[Grown]:
        plan = self.plan
        ran = TokenTree.empty()
        frontier = [-1]  # candidates that are expanded next
        path_score: Tensor | None = None  # of the frontier
        parents: list[int] = []  # of each candidate
        ran_as: list[int] = []
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        candidates = TokenTree.empty()
        for depth in range(plan.depth):
            logits = yield from self.expand(ran)
            scores_FV = self.scores(logits, candidates, frontier)
            log_q_FC, tokens_FC = self._children(scores_FV, len(self.prefix) + depth)
            path_FC = log_q_FC if path_score is None else log_q_FC + path_score[:, None]
            width = tokens_FC.shape[1]
            first = len(parents)
            parents += [node for node in frontier for _ in range(width)]
            ran_as += [-1] * (len(frontier) * width)
            tokens.append(tokens_FC.reshape(-1))
            scores.append(path_FC.reshape(-1))
            candidates = candidates.extend(tokens[-1], parents[first:])
            if depth + 1 == plan.depth:
                break
            at = scores[-1].topk(min(plan.width, len(scores[-1]))).indices.sort().values
            chosen = self._worth_expanding(at.tolist(), scores[-1][at].exp().tolist(), depth + 1)
            if not chosen:
                break
            at = at if len(chosen) == len(at) else torch.tensor(chosen, device=at.device)
            for number, i in enumerate(chosen):
                ran_as[first + i] = len(ran) + number
            ran = ran.extend(tokens[-1][at], [ran_as[p] if (p := parents[first + i]) >= 0 else -1 for i in chosen])
            frontier, path_score = [first + i for i in chosen], scores[-1][at]
        return self._best(parents, ran_as, torch.cat(tokens), torch.cat(scores), depth + 1)

    def _worth_expanding(self, nodes: list[int], probabilities: list[float], levels: int) -> list[int]:
        """Those of a level's nodes that are to be expanded: none when another level costs more than it can bring."""
        chosen = [node for node, p in zip(nodes, probabilities, strict=True) if p > 0]
        self.expected += self.plan.trust * sum(probabilities)
        self.expanded += len(chosen)
        costs = self.plan.costs
        if costs is None or not chosen:
            return chosen
        # The children of a node are as probable as it is, all together.
        gain = self.plan.trust * sum(probabilities)
        rate = (1 + self.expected) / costs.round(min(self.expanded, self.plan.budget), levels)
        return chosen if gain > rate * costs.draft_average else []

    def _children(self, scores_FV: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and tokens `[F, C]` of each node's children, falling."""
        count = min(self.plan.width, scores_FV.shape[-1])
        log_q_FC, top_FC = scores_FV.log_softmax(-1).topk(count)
        if self.draw is Draw.POINT:
            return log_q_FC, self.named(top_FC)
        raced_FC = draw_children(scores_FV, scores_FV.softmax(-1), self.draw, count, position, self.chance)
        return log_q_FC.masked_fill(raced_FC < 0, -torch.inf), raced_FC

    def _best(self, parents: list[int], ran_as: list[int], tokens: Tensor, scores: Tensor, levels: int) -> Grown:
        """The most probable candidates. None is more probable than its parent, which stands before it."""
        ordered, order = scores.sort(descending=True, stable=True)
        probabilities: list[float] = ordered[: self.plan.budget].exp().tolist()
        count = sum(p > 0 for p in probabilities)
        count = worthwhile(self.plan, probabilities[:count], levels)
        kept: list[int] = order[:count].sort().values.tolist()
        number = {-1: -1, **{candidate: i for i, candidate in enumerate(kept)}}
        tree = TokenTree(tokens[kept], tuple(number[parents[candidate]] for candidate in kept))
        proposal = Proposal(tree, (self.draw,) * len(kept), expected=sum(probabilities[:count]))
        return Grown(proposal, tuple(ran_as[candidate] for candidate in kept))
