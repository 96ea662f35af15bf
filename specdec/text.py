"""Tokens to text, and where a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.drafter import Outcome, Request
from specdec.errors import InputError

# Tokens of context that a piece is decoded with, so that spaces and multi-byte characters come out right.
_CONTEXT = 6


@dataclass(frozen=True)
class Chunk:
    """One round's worth of a stream. `origins[i]` names who produced `tokens[i]`: a drafter, or "target"."""

    text: str
    tokens: tuple[int, ...]
    origins: tuple[str, ...]
    logprobs: tuple[float, ...] | None = None


class Detokenizer:
    """Incremental, safe for multi-byte characters: bytes that are no character yet are held back."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        self.tokenizer = tokenizer
        self.tokens = list(prompt[-_CONTEXT:])
        self.start, self.read = 0, len(self.tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Text that has become certain; `last` gives out what was held back."""
        if self.tokenizer is None:
            return ""
        self.tokens.extend(tokens)
        before = self._decode(self.tokens[self.start : self.read])
        after = self._decode(self.tokens[self.start :])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and not last:
            return ""
        self.start, self.read = max(self.start, min(self.read, len(self.tokens) - _CONTEXT)), len(self.tokens)
        return after[len(before) :]


@dataclass
class Ending:
    """Cuts each round's tokens where the text ends: end-of-sequence ids, stop strings, length, context.

    `text` is cut before a stop string; `tokens` include the one that completed it, as in `transformers`.
    """

    request: Request
    tokenizer: Any
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer; pass tokenizer=")
        if any(not s for s in self.stop):
            raise InputError("a stop string is empty")
        self._detokenizer = Detokenizer(self.tokenizer, self.request.prompt)
        self._held = ""
        self._pieces: list[str] = []
        self._check_room()

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def room(self) -> int:
        """Tokens that may still be emitted."""
        left = self.request.max_length - len(self.request.prompt) - len(self.tokens)
        return min(self.max_new_tokens - len(self.tokens), left)

    def _check_room(self) -> None:
        if self.reason is None and self.room <= 0:
            self.reason = "length" if len(self.tokens) >= self.max_new_tokens else "context"

    def _push_text(self, tokens: Sequence[int]) -> str:
        """Text that may be shown: all but a tail that could be the beginning of a stop string."""
        self._held += self._detokenizer.push(tokens, last=self.reason is not None)
        hits = [at for at in (self._held.find(s) for s in self.stop) if at >= 0]
        if hits:
            self.reason = "stop"
            shown, self._held = self._held[: min(hits)], ""
        elif self.reason is not None:
            shown, self._held = self._held, ""
        else:
            keep = max((n for s in self.stop for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
            cut = len(self._held) - keep
            shown, self._held = self._held[:cut], self._held[cut:]
        self._pieces.append(shown)
        return shown

    def cut(self, outcome: Outcome, drafter: str, logprobs: Sequence[float] | None = None) -> Chunk:
        """Take in one round's tokens; returns what is new and sets `reason` when the text is over."""
        fresh: list[int] = []
        shown = ""
        for token in outcome.tokens:
            fresh.append(token)
            self.tokens.append(token)
            if token in self.request.eos_ids:
                self.reason = "eos"
            self._check_room()
            if self.stop:
                shown += self._push_text([token])
            if self.reason is not None:
                break
        if not self.stop:
            shown = self._push_text(fresh)
        origin = outcome.proposal.origin or drafter
        origins = tuple(origin if i < outcome.num_accepted else "target" for i in range(len(fresh)))
        self.origins += origins
        return Chunk(shown, tuple(fresh), origins, tuple(logprobs[: len(fresh)]) if logprobs is not None else None)
