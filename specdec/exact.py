"""`exact=True`: in half precision, decide doubtful positions again as plain decoding would, one row at a time.

Products over several rows round differently from products over one. The difference is measured on this very text; a
position whose two best candidates are further apart than that cannot have been decided differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.chance import CounterChance
from specdec.drafter import Outcome
from specdec.proposal import Proposal
from specdec.runtime.session import Rows, Session
from specdec.sampling import Sampling
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.decoder import Task

Settle = Callable[["Task", Rows, Outcome], Outcome]
# Prompt tokens on which the rounding noise is measured before the first round.
PROBE_ROWS = 8


def keep(task: Task, rows: Rows, outcome: Outcome) -> Outcome:
    """No second look: the default."""
    return outcome


def margins(scores_RV: Tensor, sampling: Sampling, positions: list[int]) -> Tensor:
    """How far apart the two best candidates of each row are, in units of processed logits; float64 `[R]`.

    At temperature 0 candidates race by their scores; above it by score - log(noise): the race in log form.
    """
    value = scores_RV.double()
    if not sampling.is_greedy:
        chance = CounterChance(sampling.seed)
        noise = [chance.noise(n, value.shape[-1], value.device) for n in positions]
        value = value - torch.stack(noise).log()
    best = value.topk(min(2, value.shape[-1])).values
    return best[:, 0] - best[:, -1]


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


class Redecide:
    """Re-decides, at one row, every emitted position whose margin is below twice the noise seen so far.

    Lossless: yes. What remains is the rounding of keys and values that were computed several rows at a time; the
    divergence report of `specdec compare` shows when it matters, and the invariant kernels remove it.
    """

    def __init__(self) -> None:
        self.noise: float | None = None
        self.count = 0

    def __call__(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        if self.noise is None:
            self.noise = measure_noise(task.target)
        path, tree = (-1, *outcome.path)[: len(outcome.tokens)], outcome.proposal.tree
        if not len(tree) or not path:
            return outcome  # one row already
        sampling, context = task.request.sampling, task.target.tokens
        index = [node + 1 for node in path]
        scores = sampling.scores(rows.logits[index], context, tree, path)
        positions = [len(context) + i for i in range(len(path))]
        scale = 1.0 if sampling.is_greedy else 1.0 / sampling.temperature
        for i, margin in enumerate(margins(scores, sampling, positions).tolist()):
            if margin > 2 * self.noise * scale:
                continue
            single = task.target.recompute(path[i])
            self.noise = max(self.noise, float((single.double() - rows.logits[index[i]].double()).abs().max()))
            self.count += 1
            task.trace.num_redecided += 1
            p = sampling.probabilities(single[None], context, tree, [path[i]])
            verdict = task.verifier.verify(p, Proposal.empty(), positions[i], sampling.chance("verify"))
            token = int(verdict.token)
            if token != outcome.tokens[i]:
                return replace(outcome, path=outcome.path[:i], tokens=(*outcome.tokens[:i], token))
        return outcome
