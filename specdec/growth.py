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
from specdec.draws import Columns, NextToken, draw_children, mixed
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.session import Session, Steps
from specdec.tree import TokenTree, structure

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


def grow(
    expand: Expand,
    plan: Plan,
    request: Request,
    prefix: Sequence[int],
    chance: Chance,
    ids_R: Tensor | None = None,
    session: Session | None = None,
) -> Steps[Grown]:
    """A chain, a tree of fixed branching or shape, or, with a node budget, the most probable tree.

    `prefix`: the text so far, which ends with the root token. At temperature 0 children are the top tokens; above it
    they are drawn as the verifier wants: by the shared race, sampled without replacement, or the top ones.

    `ids_R`: for a drafter whose logits are those of a draft vocabulary, `[F, R]`: the target's id of each column,
    int64, distinct, on the logits' device. Top tokens are then found among R columns; what is drawn, is drawn among V.
    `session`: what `expand` runs on, where that is all it does. A chain is then drafted in one call, if its backend
    does such things, and tokens follow from logits and noise alone.

    Lossless: yes. Which drawn nodes are kept depends on their own tokens only where nodes are not sampled.
    """
    if plan.depth < 1:  # the drafter's context is full
        return Grown(Proposal.empty(), ())
    draw = Draw.POINT if request.sampling.is_greedy else request.draw
    if session is not None and session.chains and plan.is_chain and plan.depth > 1:
        grown = yield from _in_one_call(session, plan, request, len(prefix), chance, draw, ids_R)
        if grown is not None:
            return grown
    if plan.budget:
        draw = Draw.SHARED if draw is Draw.SHARED else Draw.POINT
        return (yield from _Dynamic(expand, plan, request, prefix, chance, draw, ids_R).run())
    return (yield from _Planned(expand, plan, request, prefix, chance, draw, ids_R).run())


def _in_one_call(
    session: Session, plan: Plan, request: Request, position: int, chance: Chance, draw: Draw, ids_R: Tensor | None
) -> Steps[Grown | None]:
    """A chain; None where its tokens, or their number, depend on more than logits and noise."""
    if request.sampling.reads_prefix or plan.stop_below:
        return None
    depth = plan.depth
    draw = Draw.SAMPLED if draw is Draw.MIXED else draw  # of one child, the same
    rule = NextToken(request.sampling.unseeded, draw, request.vocab_size, ids_R)
    noise_KV = None
    if rule.is_noisy:
        noise_KV = rule.noise(chance, position, depth, session.backend.capabilities.device)
        if noise_KV is None:
            return None
    drafted = yield from session.chaining(depth, rule, noise_KV)
    tree, draws = TokenTree.chain(drafted.tokens_K), (draw,) * depth
    ran_as = (*range(depth - 1), -1)
    if drafted.q_KV is None:
        return Grown(Proposal(tree, draws), ran_as)
    return Grown(Proposal(tree, draws, drafted.q_KV, tuple(range(depth))), ran_as)


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
        self.draw, self.columns = draw, Columns(request.sampling, draw, request.vocab_size, ids_R)

    def scores(self, logits: Tensor, tree: TokenTree, frontier: Sequence[int]) -> Tensor:
        """`[F, V]`, or `[F, R]` where the columns of the draft vocabulary will do."""
        return self.request.sampling.scores(self.columns.fit(logits), self.prefix, tree, frontier)


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
            tokens = self.columns.named(columns)
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
            return log_q_FC, self.columns.named(top_FC)
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
