"""A smaller causal language model drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, ModelRunner, Outcome, Request
from specdec.errors import InputError
from specdec.growth import Grown, grow
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
    grown: Grown | None = None  # what was proposed last


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
        session = state.session
        session.drop_tree()
        plan = plan.limited(session.context - len(session.tokens) + 1)

        def expand(ran: TokenTree) -> Steps[Tensor]:
            return (yield from session.forwarding(ran)).logits

        state.grown = yield from grow(expand, plan, state.request, session.tokens, chance)
        return state.grown.proposal

    def observe(self, state: ModelState, outcome: Outcome) -> ModelState:
        path = state.grown.ran_path(outcome.path) if state.grown is not None else []
        state.session.commit(path, self._known(outcome.tokens))
        return state

    def warmup(self) -> None:
        self._backend.warmup()

    def sessions(self, state: ModelState) -> Sequence[Session]:
        # A text that is longer than the draft's context is never drafted for.
        return (state.session,) if len(state.session.tokens) <= state.session.context else ()

    def bytes_for(self, length: int) -> int:
        return self._backend.bytes_for(min(length, self._backend.capabilities.context))
