"""Prompt lookup: what followed the last few tokens when they stood here before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from specdec.chance import Chance
from specdec.drafter import Drafter, Memory, Outcome, Request
from specdec.errors import InputError
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.tree import TokenTree


@dataclass(eq=False)
class NgramState:
    eos_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    # n-gram -> index of the token that followed it. Only n-grams with a follower are in: no match with itself.
    index: dict[tuple[int, ...], int] = field(default_factory=dict)


class NgramDrafter(Drafter):
    """Looks up the longest n-gram that ends the text, and proposes what followed it.

    The index grows with the text: O(max_ngram) per token, O(max_ngram + k) per proposal. `match`: "newest" (usually
    better) or "oldest" (as `transformers` does). A match that runs into the end of the text goes on with its own
    copy, which continues a repetition. (Saxena, Prompt Lookup Decoding, 2023.)

    Lossless: yes, with every lossless verifier: the proposal is a point mass.
    """

    memory = Memory.TEXT

    def __init__(self, max_ngram: int = 4, min_ngram: int = 1, match: str = "newest"):
        if not 1 <= min_ngram <= max_ngram:
            raise InputError(f"need 1 <= min_ngram <= max_ngram, not {min_ngram} and {max_ngram}")
        if match not in ("newest", "oldest"):
            raise InputError(f"match is 'newest' or 'oldest', not {match!r}")
        self.max_ngram, self.min_ngram, self.match = max_ngram, min_ngram, match

    @property
    def name(self) -> str:
        return "ngram"

    def _append(self, state: NgramState, tokens: Iterable[int]) -> None:
        for token in tokens:
            end = len(state.tokens)
            for n in range(self.min_ngram, min(self.max_ngram, end) + 1):
                key = tuple(state.tokens[end - n :])
                if self.match == "newest":
                    state.index[key] = end
                else:
                    state.index.setdefault(key, end)
            state.tokens.append(token)

    def start(self, request: Request) -> NgramState:
        state = NgramState(request.eos_ids)
        self._append(state, request.prompt)
        return state

    def propose(self, state: NgramState, plan: Plan, chance: Chance) -> Proposal:
        at = None
        for n in range(min(self.max_ngram, len(state.tokens)), self.min_ngram - 1, -1):
            at = state.index.get(tuple(state.tokens[-n:]))
            if at is not None:
                break
        if at is None:
            return Proposal.empty()
        draft: list[int] = []
        while len(draft) < plan.depth and not (draft and draft[-1] in state.eos_ids):
            source = at + len(draft)
            draft.append(state.tokens[source] if source < len(state.tokens) else draft[source - len(state.tokens)])
        return Proposal.point(TokenTree.chain(draft))

    def observe(self, state: NgramState, outcome: Outcome) -> NgramState:
        self._append(state, outcome.tokens)
        return state
