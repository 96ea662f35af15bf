"""`exact=True`: in half precision, decide doubtful positions again exactly as plain decoding would.

Products over several rows round differently from products over one, and the keys and values that they leave in the
cache carry the difference on. A position is doubtful when a difference as large as the largest one seen could change
its token. There, the rows since the last point at which the cache was plain decoding's own are computed again one at
a time; the decision is then made on plain decoding's own logits, and the cache is its own again.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.chance import CounterChance
from specdec.drafter import Outcome
from specdec.runtime.session import Rows, Session
from specdec.sampling import Sampling
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.decoder import Task

Settle = Callable[["Task", Rows, Outcome], Outcome]
# Noise allowed for, in multiples of the largest difference seen so far and of a unit in the last place.
SAFETY = 2
# Prompt tokens on which the rounding noise is measured before the first round.
PROBE_ROWS = 8


def keep(task: Task, rows: Rows, outcome: Outcome) -> Outcome:
    """No second look: the default."""
    return outcome


def margins(scores_RV: Tensor, sampling: Sampling, positions: Sequence[int]) -> Tensor:
    """How far apart the two best candidates of each row are, in units of processed logits; float64 `[R]`.

    At temperature 0 candidates race by their scores; above it by score - log(noise): the race in log form. Infinite
    when the filters leave one candidate.
    """
    value = scores_RV.double()
    if not sampling.is_greedy:
        chance = CounterChance(sampling.seed)
        noise = [chance.noise(n, value.shape[-1], value.device) for n in positions]
        value = value - torch.stack(noise).log()
    best = value.topk(min(2, value.shape[-1])).values
    return best[:, 0] - best[:, -1] if best.shape[-1] > 1 else torch.full_like(best[:, 0], torch.inf)


def ulp(logits_RV: Tensor) -> Tensor:
    """The spacing of the dtype's numbers at each row's largest logit; float64 `[R]`. Noise is rarely below it."""
    top = logits_RV.double().abs().masked_fill(logits_RV.isinf(), 0).amax(-1)
    smallest = torch.finfo(logits_RV.dtype).tiny
    return torch.exp2(top.clamp_min(smallest).log2().floor()) * torch.finfo(logits_RV.dtype).eps


def measure_noise(session: Session) -> float:
    """Largest difference in logits between several rows at once and one row at a time, on the end of the text."""
    count = min(PROBE_ROWS, len(session.tokens) - 1)
    if count < 1:
        return 0.0
    probe = session.fork()
    tail = probe.tokens[-count:]
    probe.rewind(len(probe.tokens) - count)
    wide = probe.forward(TokenTree.chain(tail)).logits
    single = []
    for token in tail:
        probe.drop_tree()
        single.append(probe.forward().logits[-1])
        probe.append([token])
    return float((wide[:-1].double() - torch.stack(single).double()).abs().max())


def choices(
    logits_RV: Tensor, sampling: Sampling, context: Sequence[int], tree: TokenTree, nodes: Sequence[int]
) -> Tensor:
    """The token that each row decides for, under a rule that keeps the seed; int64 `[R]`."""
    p = sampling.probabilities(logits_RV, context, tree, nodes)
    positions = [len(context) + (0 if node < 0 else tree.depths[node]) for node in nodes]
    return sampling.chance("verify").race(p, positions)[:, 0]


def doubtful(
    logits_RV: Tensor,
    noise_R: Tensor,
    sampling: Sampling,
    context: Sequence[int],
    tree: TokenTree,
    nodes: Sequence[int],
) -> Tensor:
    """Which rows might decide otherwise if every logit moved by up to `noise`; bool `[R]`.

    Three worst cases go through the whole of `sampling`, so that temperature, penalties and filters count as they
    are: the winner falls and all others rise; the winner falls out of a top-p set as what beats it rises and the rest
    falls; what the filters removed comes back. (The third is the worst case of top-k, top-p and min-p up to the
    second order of the noise.) Without filters the first alone is the test `margin <= 2 noise / temperature`.
    """
    logits = logits_RV.double()
    step = (noise_R * (1 + 1e-6))[:, None]  # an exact tie after the move is a doubt
    winner = choices(logits, sampling, context, tree, nodes)[:, None]
    up, down = step.expand_as(logits), -step.expand_as(logits)
    moves = [up.scatter(1, winner, down)]
    scores = sampling.scores(logits, context, tree, nodes)
    kept = ~scores.isinf()
    if not bool(kept.all()):
        moves.append(torch.where(scores > scores.gather(1, winner), up, down))
        moves.append(torch.where(kept, down, up))
    doubt = torch.zeros(len(nodes), dtype=torch.bool, device=logits.device)
    for move in moves:
        doubt |= choices(logits + move, sampling, context, tree, nodes) != winner[:, 0]
    return doubt


class Redecide:
    """Decides every doubtful position again on plain decoding's own logits.

    Guaranteed: the text is that of `generate_plain` with the same options, provided that at no position that was
    not re-decided a logit differs by more than the noise allowed for: twice the largest difference seen so far in this
    text (measured on the prompt's end first, then at every re-decided row), and at least two units in the last place
    of the row's largest logit. Not guaranteed: that a difference larger than that does not meet a near-tie first.

    The price: every row since the last doubt is computed again alone. Near-ties are frequent in half precision (in
    bfloat16 a tenth of all positions is usual), so this comes close to one plain step per token on top of the rounds:
    the mode is for checking and for reproducing a text, not for speed. Less does not do: deciding doubtful positions
    at one row over the cache as it is leaves as many texts different as before. `stats` has `num_redecided`
    (positions), `num_recomputed_rows`, and `redecide_seconds` (a part of the verify stage).

    Lossless: yes.
    """

    def __init__(self) -> None:
        self.noise: float | None = None
        self.clean = 0  # leading slots whose keys and values are plain decoding's own

    def __call__(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        started = time.perf_counter()
        try:
            return self._settle(task, rows, outcome)
        finally:
            task.trace.redecide_seconds += time.perf_counter() - started

    def _settle(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        target, sampling, tree = task.target, task.request.sampling, outcome.proposal.tree
        context = target.tokens
        if self.noise is None:
            self.noise = measure_noise(target)
            self.clean = len(task.request.prompt) - 1
        if not len(tree) and self.clean >= len(context) - 1:
            self.clean = len(context)  # one row on a clean cache: plain decoding itself
            return outcome
        nodes = (-1, *outcome.path)[: len(outcome.tokens)]
        if not nodes:
            return outcome
        wide = rows.logits[[node + 1 for node in nodes]]
        noise = SAFETY * ulp(wide).clamp_min(self.noise)
        doubts = doubtful(wide, noise, sampling, context, tree, nodes).tolist()
        return self._again(task, outcome, nodes, wide, doubts) if any(doubts) else outcome

    def _again(
        self, task: Task, outcome: Outcome, nodes: Sequence[int], wide: Tensor, doubts: Sequence[bool]
    ) -> Outcome:
        """Compute the rows up to the last doubtful one again, and cut where one decides otherwise."""
        target, sampling, tree, trace = task.target, task.request.sampling, outcome.proposal.tree, task.trace
        base, last = len(target.tokens), max(i for i, doubt in enumerate(doubts) if doubt)
        trace.num_recomputed_rows += base - 1 - self.clean
        with closing(target.replay(self.clean, nodes[1 : last + 1])) as singles:
            for i, single in enumerate(singles):
                self.clean = base + i
                trace.num_recomputed_rows += 1
                trace.num_redecided += doubts[i]
                if not bool(torch.isfinite(single.amax())):
                    return replace(outcome, path=outcome.path[:i], tokens=outcome.tokens[:i], broken=True)
                difference = (single.double() - wide[i].double()).nan_to_num(0.0)  # -inf on both sides
                self.noise = max(self.noise or 0.0, float(difference.abs().max()))
                token = int(choices(single[None], sampling, target.tokens, tree, [nodes[i]]))
                if token != outcome.tokens[i]:
                    tokens = (*outcome.tokens[:i], token)
                    return replace(outcome, path=outcome.path[:i], tokens=tokens, broken=False)
        return outcome
