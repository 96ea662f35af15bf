"""A smaller causal language model drafts.

Shape suffixes: F nodes of the frontier (one level of the tree), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Outcome, Request
from specdec.errors import InputError
from specdec.loading import load_model
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.registry import find
from specdec.runtime.session import Session
from specdec.tree import TokenTree


@dataclass(eq=False)
class ModelState:
    request: Request
    session: Session


def fit_vocabulary(logits: Tensor, vocab_size: int) -> Tensor:
    """Crop or pad the last axis: paddings of one tokenizer's vocabulary differ between models."""
    missing = vocab_size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits


def without_replacement(q_FV: Tensor, count: int, chance: Chance) -> Tensor:
    """`[F, count]` tokens in drawing order; -1 where the support is used up."""
    left, drawn = q_FV.clone(), []
    for _ in range(count):
        token = chance.draw(left)[:, None]
        drawn.append(torch.where(left.sum(-1, keepdim=True) > 0, token, -1))
        left.scatter_(1, token, 0.0)
    return torch.cat(drawn, 1)


class ModelDrafter(Drafter):
    """Drafts a chain, or a tree level by level, with any causal LM that shares the target's tokenizer.

    At temperature 0 children are the top tokens; above it they are drawn as the verifier wants: by the shared race,
    sampled without replacement, or the top ones. The draft's cache follows the text by itself: what was accepted but
    never computed (the last token after full acceptance) is computed by the next round's first forward.

    Lossless: yes, with every lossless verifier. (Leviathan et al., arXiv 2211.17192.)
    """

    draws = frozenset(Draw)
    trees = True

    def __init__(self, model: Any, backend: str = "eager"):
        self._backend = find("backend", backend).open(model)
        self.model = model

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        if context.source is None:
            raise InputError(
                "the model drafter needs weights: pass a folder or hub id, as in drafter='org/small-model'"
            )
        return cls(load_model(context.source, device=context.device, dtype=context.dtype), **options)

    @property
    def name(self) -> str:
        return "model"

    def start(self, request: Request) -> ModelState:
        session = Session(self._backend.fork(0))
        session.append(request.prompt)
        if len(request.prompt) <= session.context:
            session.prefill()
        return ModelState(request, session)

    def propose(self, state: ModelState, plan: Plan, chance: Chance) -> Proposal:
        session, request = state.session, state.request
        session.drop_tree()
        plan = plan.limited(session.context - len(session.tokens) + 1)
        tree, rows_of, q_rows = TokenTree.empty(), [], []
        draw = Draw.POINT if request.sampling.is_greedy else request.draw
        growing: Sequence[int] = (-1,)
        for depth in range(plan.depth):
            rows = session.forward(tree)
            kept = [i for i, node in enumerate(rows.nodes) if node in growing]
            nodes = [rows.nodes[i] for i in kept]
            logits = rows.logits if len(kept) == len(rows.nodes) else rows.logits[kept]
            scores = request.sampling.scores(fit_vocabulary(logits, request.vocab_size), session.tokens, tree, nodes)
            q_FV = scores.softmax(-1)
            position = len(session.tokens) + depth
            tokens_FC = self._draw(q_FV, scores, draw, plan.children(depth), position, chance)
            parents, tokens, confidence = [], [], []
            for row, node in enumerate(nodes):
                present = tokens_FC[row] if plan.children(depth) == 1 else tokens_FC[row][tokens_FC[row] >= 0]
                parents += [node] * len(present)
                q_rows += [sum(map(len, rows_of)) + row] * len(present)
                tokens.append(present)
                confidence.append(q_FV[row, present])
            rows_of.append(q_FV)
            first = len(tree)
            tree = tree.extend(torch.cat(tokens), parents)
            growing = range(first, len(tree))
            if plan.stop_below > 0:
                sure = (torch.cat(confidence) >= plan.stop_below).tolist()
                growing = [node for node, keep in zip(growing, sure, strict=True) if keep]
            if not growing:
                break
        if draw is Draw.SAMPLED and len(tree):
            return Proposal.sampled(tree, torch.cat(rows_of), q_rows)
        return Proposal(tree, (draw,) * len(tree))

    @staticmethod
    def _draw(q_FV: Tensor, scores: Tensor, draw: Draw, count: int, position: int, chance: Chance) -> Tensor:
        if draw is Draw.SHARED:
            return chance.race(q_FV, [position] * len(q_FV), count)
        if draw is Draw.SAMPLED:
            return without_replacement(q_FV, count, chance)
        best, index = scores.topk(min(count, scores.shape[-1]))
        return torch.where(best.isinf(), -1, index) if count > 1 else index

    def observe(self, state: ModelState, outcome: Outcome) -> ModelState:
        state.session.commit(outcome.path, outcome.tokens)
        return state

    def sessions(self, state: ModelState) -> Sequence[Session]:
        return (state.session,)
