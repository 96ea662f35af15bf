"""The drafter that never drafts: plain decoding."""

from __future__ import annotations

from specdec.chance import Chance
from specdec.drafter import Drafter, Memory, Outcome, Request
from specdec.policy import Plan
from specdec.proposal import Draw, Proposal


class NoDrafter(Drafter):
    """Always the empty proposal. Lossless: yes."""

    draws = frozenset(Draw)
    trees = True
    memory = Memory.PATH

    @property
    def name(self) -> str:
        return "none"

    def start(self, request: Request) -> None:
        return None

    def propose(self, state: None, plan: Plan, chance: Chance) -> Proposal:
        return Proposal.empty()

    def observe(self, state: None, outcome: Outcome) -> None:
        return None
