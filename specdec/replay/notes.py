"""What is written down of one position, and who is listened to for it.

Shape suffixes: N drafted nodes, V vocabulary, M kept entries.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from specdec.chance import Chance, CounterChance
from specdec.drafter import Drafter, Outcome, Prefill, Request, WrappedDrafter
from specdec.proposal import Draw
from specdec.replay.recording import LAYOUT, NEVER
from specdec.runtime.session import Rows, Session, Steps
from specdec.sampling import Sampling
from specdec.text import Chunk, Ending
from specdec.tree import TokenTree

if TYPE_CHECKING:
    from specdec.decoder import Task


@dataclass(frozen=True)
class Listening(Sampling):
    """A drafter's sampling that remembers the scores it was asked for: one row for each node that was expanded."""

    heard: list[Tensor] = field(default_factory=list)

    @property
    def reads_prefix(self) -> bool:
        return True  # so that columns of a draft vocabulary come under the target's ids

    def scores(self, logits: Tensor, prefix: Sequence[int], tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        found = super().scores(logits, prefix, tree, nodes)
        self.heard.append(found)
        return found


class Overheard(WrappedDrafter):
    """A drafter whose rows are listened to."""

    def __init__(self, inner: Drafter):
        super().__init__(inner)
        self.heard: list[Tensor] = []

    def starting(self, request: Request, prefill: Prefill = Session.prefilling) -> Steps[Any]:
        plain = {f.name: getattr(request.sampling, f.name) for f in fields(Sampling)}
        listening = Listening(**plain, heard=self.heard)
        return (yield from self.inner.starting(replace(request, sampling=listening), prefill))

    def rows(self, count: int, vocab_size: int) -> Tensor | None:
        """Scores `[N, V]` behind the last `count` drafted tokens; None where the drafter has none of the target's."""
        heard, self.heard[:] = list(self.heard), []
        rows = [row for block in heard for row in block]
        if len(rows) < count or any(len(row) != vocab_size for row in rows):
            return None
        return torch.stack(rows[:count]) if count else None


class Lingering(Ending):
    """Goes on for `beyond` tokens after an end-of-text or a stop, which rounds that reach over it may accept."""

    beyond = 0
    num_tokens: int | None = None  # of the text proper
    why: str | None = None

    def cut(self, outcome: Outcome, drafter: str, logprobs: Sequence[float] | None = None) -> Chunk:
        chunk = super().cut(outcome, drafter, logprobs)
        if self.reason is not None and self.num_tokens is None:
            self.num_tokens, self.why = len(self.tokens), self.reason
        if self.num_tokens is not None and self.room > 0 and len(self.tokens) < self.num_tokens + self.beyond:
            self.reason = None
        return chunk


class Notes:
    """The second look: writes a position down, and keeps of the round only the target's own token."""

    def __init__(self, drafter: Overheard, depth: int, top_m: int):
        self.drafter, self.depth, self.top_m = drafter, depth, top_m
        self.rows: dict[str, list[Any]] = {name: [] for name, (_, letters) in LAYOUT.items() if letters[0] == "P"}
        self.waiting: deque[Tensor | None] = deque(maxlen=depth)  # rows of q of the last positions, newest last
        self.seconds: list[float] = []  # that this took
        self.expected: dict[int, int] = {}  # position -> the target's choice there, by an earlier round's rows
        self.num_inconsistent = 0
        self.first = 0  # of the present text

    def begin(self) -> None:
        """A new text."""
        self.first = len(self.rows["tokens_P"])
        self.waiting.clear()
        self.expected.clear()
        self.drafter.heard.clear()

    def __call__(self, task: Task, rows: Rows, outcome: Outcome) -> Outcome:
        began = time.perf_counter()
        if outcome.tokens:
            self._write(task, rows, outcome)
            outcome = Outcome(outcome.proposal, (), outcome.tokens[:1], outcome.logits)
        self.seconds.append(time.perf_counter() - began)
        return outcome

    def _write(self, task: Task, rows: Rows, outcome: Outcome) -> None:
        tree, token, sampling = outcome.proposal.tree, outcome.tokens[0], task.request.sampling
        position = len(task.target.tokens)
        log_p_NV = sampling.scores(rows.logits, task.target.tokens, tree, range(-1, len(tree))).log_softmax(-1)
        drafted: list[int] = tree.tokens.tolist()
        scores_NV = self.drafter.rows(len(drafted), log_p_NV.shape[-1])
        self._check(position, outcome)
        self.waiting.append(scores_NV)
        self._row("tokens_P", token)
        self._row("text_p_P", float(log_p_NV[0, token].exp()))
        self._padded("drafted_PK", drafted, -1)
        at = torch.tensor(drafted, dtype=torch.int64, device=log_p_NV.device)[:, None]
        self._padded("drafted_p_PK", log_p_NV[:-1].gather(1, at)[:, 0].exp().tolist(), np.nan)
        self._top("target", log_p_NV[0])
        if scores_NV is None:
            self._padded("drafted_q_PK", [], np.nan)
            self._row("overlap_P", np.nan)
            self._top("draft", None)
        else:
            q_NV = scores_NV.softmax(-1)
            self._padded("drafted_q_PK", q_NV.gather(1, at.to(q_NV.device))[:, 0].tolist(), np.nan)
            self._row("overlap_P", float(torch.minimum(log_p_NV[0].exp(), q_NV[0].to(log_p_NV)).sum()))
            self._top("draft", scores_NV[0].log_softmax(-1))
        for name, fill in (("text_q_PK", np.nan), ("place_PK", -1), ("rank_PK", -1)):
            self._padded(name, [], fill)
        self._compare(token, position, outcome.proposal.draws, sampling)

    def _check(self, position: int, outcome: Outcome) -> None:
        """Does this position's token equal what an earlier round's wider step said about it?"""
        said = self.expected.pop(position, outcome.tokens[0])
        self.num_inconsistent += said != outcome.tokens[0]
        for depth, token in enumerate(outcome.tokens[1:], 1):
            self.expected[position + depth] = token

    def _compare(self, token: int, position: int, draws: Sequence[Draw], sampling: Sampling) -> None:
        """Where the text's token stands in the rows that were drafted for its position, from the positions before."""
        here = len(self.rows["tokens_P"]) - 1
        chance: Chance = sampling.chance("draft")
        for depth, scores_NV in enumerate(reversed(self.waiting)):
            row = here - depth
            first = self.rows["drafted_PK"][row][depth]
            if first < 0:
                continue
            right = first == token
            if scores_NV is None:  # a point mass without a law
                self.rows["place_PK"][row][depth] = self.rows["rank_PK"][row][depth] = 0 if right else NEVER
                continue
            scores_V = scores_NV[depth]
            q_V = scores_V.softmax(-1)
            # A token that a filter took away is no child, however many are asked for. One whose probability alone is
            # rounded to 0 still is among the top tokens, but arrives in no race.
            rank = NEVER if scores_V[token].isinf() else int((scores_V > scores_V[token]).sum())
            place = rank
            if self.drafter_draw is Draw.SHARED and isinstance(chance, CounterChance):
                arrival_V = chance.noise(position, len(q_V), q_V.device) / q_V.double()
                place = NEVER if arrival_V[token].isinf() else int((arrival_V < arrival_V[token]).sum())
            self.rows["text_q_PK"][row][depth] = float(q_V[token])
            self.rows["rank_PK"][row][depth] = rank
            # What was drafted is the first child; equals are drawn in an order of the device's own.
            self.rows["place_PK"][row][depth] = 0 if right else max(1, place)

    drafter_draw = Draw.POINT

    def _row(self, name: str, value: Any) -> None:
        self.rows[name].append(value)

    def _padded(self, name: str, values: Sequence[Any], fill: Any) -> None:
        self.rows[name].append([*values, *[fill] * (self.depth - len(values))])

    def _top(self, who: str, log_V: Tensor | None) -> None:
        count = 0 if log_V is None else min(self.top_m, len(log_V))
        ids, logs, tail = np.zeros(0, np.int32), np.zeros(0, np.float32), 0.0
        if log_V is not None:
            top = log_V.topk(count)
            ids, logs = top.indices.int().cpu().numpy(), top.values.float().cpu().numpy()
            tail = float(log_V.double().exp().index_fill(0, top.indices, 0.0).sum())
        self._row(f"{who}_ids_PM", ids)
        self._row(f"{who}_logp_PM", logs)
        self._row(f"{who}_tail_P", tail)
