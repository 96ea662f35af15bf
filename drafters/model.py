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
from specdec.drafter import BuildContext, Drafter, ModelRunner, Outcome, Request
from specdec.errors import InputError
from specdec.loading import load_model
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session, Steps
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
    """`[F, count]` tokens in drawing order; -1 where the support is used up, never in the first column."""
    left = q_FV.clone()
    drawn: list[Tensor] = []
    for _ in range(count):
        token = chance.draw(left)[:, None]
        drawn.append(torch.where(left.sum(-1, keepdim=True) > 0, token, -1) if drawn else token)
        left.scatter_(1, token, 0.0)
    return torch.cat(drawn, 1)


class ModelDrafter(ModelRunner):
    """Drafts a chain, or a tree level by level, with any causal LM that shares the target's tokenizer.

    At temperature 0 children are the top tokens; above it they are drawn as the verifier wants: by the shared race,
    sampled without replacement, or the top ones. The draft's cache follows the text by itself: what was accepted but
    never computed (the last token after full acceptance) is computed by the next round's first forward.

    Lossless: yes, with every lossless verifier. (Leviathan et al., arXiv 2211.17192.)
    """

    draws = frozenset(Draw)
    trees = True
    trusted = True

    def __init__(self, model: Any, backend: str | None = None):
        self._backend = open_backend(model, backend)
        self._vocab_size = self._backend.capabilities.vocab_size
        self.model = model

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        if context.source is None:
            raise InputError(
                "the model drafter needs weights: pass a folder or hub id, as in drafter='org/small-model'"
            )
        return cls(
            load_model(context.source, device=context.device, dtype=context.dtype),
            **{"backend": context.backend, **options},
        )

    @property
    def name(self) -> str:
        return "model"

    def _known(self, tokens: Sequence[int]) -> list[int]:
        """Padded ids that only the target has stand as token 0 in the draft's cache: it costs acceptance at most."""
        return [token if token < self._vocab_size else 0 for token in tokens]

    def start(self, request: Request) -> ModelState:
        session = Session(self._backend.fork(0))
        session.append(self._known(request.prompt))
        return ModelState(request, session)

    def proposing(self, state: ModelState, plan: Plan, chance: Chance) -> Steps[Proposal]:
        session, request = state.session, state.request
        session.drop_tree()
        plan = plan.limited(session.context - len(session.tokens) + 1)
        draw = Draw.POINT if request.sampling.is_greedy else request.draw
        tree, growing = TokenTree.empty(), [-1]
        drawn_from: list[Tensor] = []  # one block of rows per level
        q_rows: list[int] = []
        for depth in range(plan.depth):
            rows = yield from session.forwarding(tree)
            nodes = [node for node in rows.nodes if node in growing]
            logits = rows.logits if len(nodes) == len(rows.nodes) else rows.logits[[n in growing for n in rows.nodes]]
            logits = fit_vocabulary(logits, request.vocab_size)
            scores_FV = request.sampling.scores(logits, session.tokens, tree, nodes)
            position = len(session.tokens) + depth
            # Greedy chains that never ask for confidence do without.
            q_FV = scores_FV.softmax(-1) if draw is not Draw.POINT or plan.stop_below > 0 else scores_FV
            tokens_FC = self._draw(scores_FV, q_FV, draw, plan.children(depth), position, chance)
            if tokens_FC.shape[1] == 1:
                row_of, tokens = list(range(len(nodes))), tokens_FC[:, 0]
            else:
                present = tokens_FC >= 0
                row_of, tokens = present.nonzero()[:, 0].tolist(), tokens_FC[present]
            q_rows += [sum(len(block) for block in drawn_from) + row for row in row_of]
            if draw is Draw.SAMPLED:
                drawn_from.append(q_FV)
            growing = list(range(len(tree), len(tree) + len(row_of)))
            tree = tree.extend(tokens, [nodes[row] for row in row_of])
            if plan.stop_below > 0:
                sure = q_FV[row_of, tokens] >= plan.stop_below
                growing = [node for node, keep in zip(growing, sure.tolist(), strict=True) if keep]
            if not growing:
                break
        if draw is Draw.SAMPLED and len(tree):
            return Proposal.sampled(tree, torch.cat(drawn_from), q_rows)
        return Proposal(tree, (draw,) * len(tree))

    @staticmethod
    def _draw(scores_FV: Tensor, q_FV: Tensor, draw: Draw, count: int, position: int, chance: Chance) -> Tensor:
        """`[F, count]` children in drawing order; -1 where there are fewer."""
        if draw is Draw.SHARED:
            return chance.race(q_FV, [position] * len(q_FV), count)
        if draw is Draw.SAMPLED:
            return without_replacement(q_FV, count, chance)
        best, index = scores_FV.topk(min(count, scores_FV.shape[-1]))
        return torch.where(best.isinf(), -1, index) if count > 1 else index

    def observe(self, state: ModelState, outcome: Outcome) -> ModelState:
        state.session.commit(outcome.path, self._known(outcome.tokens))
        return state

    def warmup(self) -> None:
        self._backend.warmup()

    def sessions(self, state: ModelState) -> Sequence[Session]:
        # A text that is longer than the draft's context is never drafted for.
        return (state.session,) if len(state.session.tokens) <= state.session.context else ()

    def bytes_for(self, length: int) -> int:
        return self._backend.bytes_for(min(length, self._backend.capabilities.context))
