"""One recorded text as a drafter of its memory sees it, and what is in doubt about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from specdec.drafter import Memory
from specdec.replay.recording import Recording, Text


@dataclass
class Doubts:
    """What the walk met that the trace does not determine."""

    unknown: int = 0  # decisions
    decisions: int = 0
    tails: float = 0.0  # mass of p and q that is not in the recorded rows, where a decision needed them
    counts: bool = False  # the number of drafted tokens
    clock: bool = False  # the policy read a round's seconds


@dataclass(frozen=True, eq=False)
class View:
    """One recorded text as a drafter of this memory sees it: lookups for depth `d` behind position `at`.

    `assume`: what becomes of decisions that were not recorded: "near" takes the row of the position itself, which has
    the same text before it; "never" and "always" bracket it.
    """

    recording: Recording
    text: Text
    doubts: Doubts
    assume: str = "near"

    @cached_property
    def memory(self) -> Memory:
        found = self.recording.memory
        return Memory.TEXT if found is Memory.ROUNDS else found

    @cached_property
    def tokens(self) -> list[int]:
        first = self.text.first
        return list(self.recording.arrays["tokens_P"][first : first + self.text.num_positions].tolist())

    def _column(self, name: str) -> list[list[float]]:
        first = self.text.first
        return list(self.recording.arrays[name][first : first + self.text.num_positions].tolist())

    @cached_property
    def drafted(self) -> list[list[float]]:
        return self._column("drafted_PK")

    @cached_property
    def drafted_q(self) -> list[list[float]]:
        return self._column("drafted_q_PK")

    @cached_property
    def place(self) -> list[list[float]]:
        return self._column("place_PK")

    @cached_property
    def rank(self) -> list[list[float]]:
        return self._column("rank_PK")

    @cached_property
    def text_q(self) -> list[list[float]]:
        return self._column("text_q_PK")

    @cached_property
    def text_p(self) -> list[float]:
        first = self.text.first
        return list(self.recording.arrays["text_p_P"][first : first + self.text.num_positions].tolist())

    def num_drafted(self, at: int) -> int:
        row = self.drafted[at]
        return next((i for i, token in enumerate(row) if token < 0), len(row))

    def follows(self, at: int, depth: int) -> bool:
        """Whether the chain that was drafted at `at` is the text, for `depth` tokens."""
        return depth <= len(self.drafted[at]) and self.drafted[at][:depth] == self.tokens[at : at + depth]

    def cell(self, at: int, depth: int) -> tuple[int, int] | None:
        """Where the row stands that a node `depth` tokens behind `at`, on the text, draws its children from."""
        if at + depth >= len(self.tokens):
            return None
        if self.memory is Memory.DEPTH:
            return (at, depth) if depth < self.recording.depth else None
        if depth < self.recording.depth and self.follows(at, depth):
            return at, depth
        return (at + depth, 0) if self.memory is Memory.PATH else None

    def nearest(self, at: int, depth: int) -> tuple[int, int] | None:
        """The cell, or the one most like it; None where there is nothing like it, or nothing is to be assumed."""
        self.doubts.decisions += 1
        found = self.cell(at, depth)
        if found is not None:
            return found
        self.doubts.unknown += 1
        if self.assume != "near" or at + depth >= len(self.tokens):
            return None
        return at + depth, 0

    def whole_row(self, at: int, depth: int) -> int | None:
        """The position whose whole row of q a node `depth` tokens behind `at` has; deeper ones are single numbers."""
        self.doubts.decisions += 1
        if at + depth >= len(self.tokens) or not self.recording.has_rows:
            return None
        if depth and self.memory is not Memory.PATH:
            self.doubts.unknown += 1
            if self.assume != "near":
                return None
        return at + depth
