"""A suffix automaton over the text so far, with counts, and over a corpus if there is one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.chance import Chance
from specdec.drafter import BuildContext, Drafter, Memory, Outcome, Request
from specdec.errors import InputError
from specdec.policy import Plan
from specdec.proposal import Proposal
from specdec.tree import TokenTree

# Occurrences are counted on suffixes up to this many links away: bounds the work per token on repetitive text.
COUNTED_LINKS = 48


class SuffixAutomaton:
    """Blumer et al.'s online automaton: every state is a set of substrings that end at the same places.

    Appending costs amortised O(1) and at most `COUNTED_LINKS` counter updates of either kind; a proposal looks at one
    continuation per token. State 0 is the empty string.
    """

    def __init__(self) -> None:
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.count = [0]
        self.ways = [0]  # occurrences of all continuations together
        self.best: list[int | None] = [None]  # the token of the most frequent one; of equal ones the first to get there
        self.last = 0

    def _state(self, length: int, link: int, like: int | None = None) -> int:
        """A new state, with the continuations and the count of the state that it is `like`."""
        self.next.append({} if like is None else dict(self.next[like]))
        self.ways.append(0 if like is None else self.ways[like])
        self.best.append(None if like is None else self.best[like])
        self.link.append(link)
        self.length.append(length)
        self.count.append(0 if like is None else self.count[like])
        return len(self.next) - 1

    def append(self, token: int) -> None:
        new = self._state(self.length[self.last] + 1, 0)
        before = state = self.last
        while state >= 0 and token not in self.next[state]:
            self.next[state][token] = new
            state = self.link[state]
        if state >= 0:
            target = self.next[state][token]
            if self.length[target] != self.length[state] + 1:
                clone = self._state(self.length[state] + 1, self.link[target], like=target)
                while state >= 0 and self.next[state].get(token) == target:
                    self.next[state][token] = clone
                    state = self.link[state]
                self.link[target] = clone
                target = clone
            self.link[new] = target
        self.last = new
        for _ in range(COUNTED_LINKS):
            if new <= 0:
                break
            self.count[new] += 1
            new = self.link[new]
        # What was counted is the way on from the states that ended the text before.
        for _ in range(COUNTED_LINKS):
            if before < 0:
                break
            self.ways[before] += 1
            best = self.best[before]
            if best is None or self._followers(before, token) > self._followers(before, best):
                self.best[before] = token
            before = self.link[before]

    def _followers(self, state: int, token: int) -> int:
        return self.count[self.next[state][token]]

    def advance(self, state: int, matched: int, token: int) -> tuple[int, int]:
        """Move a cursor (state, matched length) over one token: follow it, from the longest suffix that has it."""
        while state > 0 and token not in self.next[state]:
            state = self.link[state]
            matched = self.length[state]
        if token in self.next[state]:
            return self.next[state][token], matched + 1
        return 0, 0

    def continuation(self, state: int, limit: int, floor: float) -> tuple[list[int], list[float]]:
        """The most frequent way on, while its estimated probability stays at or above `floor`; and that, by depth."""
        draft: list[int] = []
        probabilities: list[float] = []
        probability = 1.0
        while len(draft) < limit and (token := self.best[state]) is not None:
            probability *= min(1.0, self._followers(state, token) / max(self.ways[state], 1))
            if probability < floor:
                break
            draft.append(token)
            probabilities.append(probability)
            state = self.next[state][token]
        return draft, probabilities


@dataclass(eq=False)
class SuffixState:
    eos_ids: frozenset[int]
    own: SuffixAutomaton
    corpus: tuple[int, int] = (0, 0)  # cursor in the corpus automaton


class SuffixDrafter(Drafter):
    """Proposes the most frequent continuation of the longest suffix that occurred before.

    At most `factor * match + offset` tokens, and none whose estimated probability along the way falls below `floor`.
    A corpus (a text file through `corpus=`, or token ids) takes part when its match is longer by `corpus_bias`.
    (SAM-Decoding: Hu et al., arXiv 2411.10666; SuffixDecoding: Oliaro et al., arXiv 2411.04975.)

    Lossless: yes, with every lossless verifier: the proposal is a point mass.
    """

    memory = Memory.TEXT

    def __init__(
        self,
        factor: float = 2.0,
        offset: int = 1,
        floor: float = 0.1,
        corpus_tokens: Iterable[int] = (),
        corpus_bias: int = 2,
    ):
        if factor < 0 or offset < 0 or factor + offset == 0 or not 0 <= floor <= 1:
            raise InputError(f"need factor, offset >= 0 (not both 0) and floor in [0, 1]: {factor}, {offset}, {floor}")
        self.factor, self.offset, self.floor, self.corpus_bias = factor, offset, floor, corpus_bias
        self.corpus = SuffixAutomaton()
        for token in corpus_tokens:
            self.corpus.append(token)

    @classmethod
    def build(cls, context: BuildContext, **options: Any) -> Drafter:
        path = options.pop("corpus", None)
        if path is not None:
            if not Path(path).is_file():
                raise InputError(f"corpus {path}: no such file")
            if context.tokenizer is None:
                raise InputError("a corpus needs the target's tokenizer; pass tokenizer=")
            text = Path(path).read_text(encoding="utf-8")
            options["corpus_tokens"] = context.tokenizer(text, add_special_tokens=False)["input_ids"]
        return cls(**options)

    @property
    def name(self) -> str:
        return "suffix"

    def _append(self, state: SuffixState, tokens: Iterable[int]) -> SuffixState:
        for token in tokens:
            state.own.append(token)
            state.corpus = self.corpus.advance(*state.corpus, token)
        return state

    def start(self, request: Request) -> SuffixState:
        return self._append(SuffixState(request.eos_ids, SuffixAutomaton()), request.prompt)

    def propose(self, state: SuffixState, plan: Plan, chance: Chance) -> Proposal:
        # The whole text is its own longest suffix; the longest one seen *before* is one link up.
        place = max(0, state.own.link[state.own.last])
        automaton, matched = state.own, state.own.length[place]
        if state.corpus[1] > matched + self.corpus_bias:
            automaton, (place, matched) = self.corpus, state.corpus
        if matched == 0:
            return Proposal.empty()
        limit = min(plan.depth, int(self.factor * matched + self.offset))
        draft, probabilities = automaton.continuation(place, limit, self.floor)
        length = next((i for i, token in enumerate(draft, 1) if token in state.eos_ids), len(draft))
        return Proposal.point(TokenTree.chain(draft[:length]), sum(probabilities[:length]))

    def observe(self, state: SuffixState, outcome: Outcome) -> SuffixState:
        return self._append(state, outcome.tokens)
