"""A drafter may fail; the text must not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.chance import Chance
from specdec.drafter import Drafter, Outcome, Prefill, Request, WrappedDrafter
from specdec.errors import DrafterError, DrafterWarning
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.runtime.session import Session, Steps, run
from specdec.trace import Trace
from specdec.verifier import Verifier


@dataclass(eq=False)
class _Failed:
    """The state after a failure: nothing is proposed any more."""


class GuardedDrafter(WrappedDrafter):
    """Checks every proposal, and finishes the text by plain decoding when the drafter raises or returns nonsense.

    `strict` raises `DrafterError` instead. Lossless: yes; a failed drafter only costs speed.
    """

    def __init__(self, inner: Drafter, verifier: Verifier, trace: Trace, strict: bool = False):
        super().__init__(inner)
        self.verifier, self.trace, self.strict = verifier, trace, strict

    def _fail(self, doing: str, error: Exception) -> _Failed:
        message = f"drafter {self.inner.name!r} failed in {doing}: {type(error).__name__}: {error}"
        if self.strict:
            raise DrafterError(message) from error
        if self.trace.drafter_error is None:
            warnings.warn(f"{message}; the text is finished by plain decoding", DrafterWarning, stacklevel=4)
        self.trace.drafter_error = message
        return _Failed()

    def start(self, request: Request) -> list[Any]:
        return run(self.starting(request))

    def starting(self, request: Request, prefill: Prefill = Session.prefilling) -> Steps[list[Any]]:
        self.vocab_size = request.vocab_size
        try:
            return [(yield from self.inner.starting(request, prefill))]
        except Exception as error:
            return [self._fail("start", error)]

    def proposing(self, state: list[Any], plan: Plan, chance: Chance) -> Steps[Proposal]:
        # The state is a box, so that a failure here is remembered without the loop's help.
        if isinstance(state[0], _Failed) or plan.deepest == 0:
            return Proposal.empty()
        try:
            proposal = yield from self.inner.proposing(state[0], plan, chance)
            if not isinstance(proposal, Proposal):
                raise TypeError(f"propose returned {type(proposal).__name__}, not a Proposal")
            # A distribution is looked at in any case: a draft's NaN must not reach a rule that uses it.
            if proposal.q is not None or not self.inner.trusted:
                proposal.check(self.vocab_size)
            self.verifier.check_proposal(proposal)
            if proposal.tree.max_depth > plan.deepest:
                raise ValueError(f"proposed {proposal.tree.max_depth} deep where the plan allows {plan.deepest}")
            return proposal
        except Exception as error:
            state[0] = self._fail("propose", error)
            return Proposal.empty()

    def observe(self, state: list[Any], outcome: Outcome) -> list[Any]:
        if not isinstance(state[0], _Failed):
            try:
                state[0] = self.inner.observe(state[0], outcome)
            except Exception as error:
                state[0] = self._fail("observe", error)
        return state

    def sessions(self, state: list[Any]) -> Sequence[Session]:
        return () if isinstance(state[0], _Failed) else self.inner.sessions(state[0])
