"""Prompts that are prefilled once and forked for every call, so that timed calls begin where the text does.

A fork copies keys and values (and hidden states, for drafters that read them). The copy is part of the call, for plain
and speculative decoding alike.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdec.runtime.backend import Backend
from specdec.runtime.features import FeatureStore
from specdec.runtime.session import Session, Steps

if TYPE_CHECKING:
    from specdec.api import SpeculativeDecoder

# Keys and values of prompts that are kept; those of the prompts at work are kept whatever they take.
DEFAULT_BYTES = 1 << 30


@dataclass(eq=False)
class _Prompt:
    backend: Backend
    features: FeatureStore | None
    epoch: int

    @property
    def num_bytes(self) -> int:
        return self.backend.num_bytes + (self.features.num_bytes if self.features is not None else 0)


class PromptForks:
    """Whole prompts, target's and draft's alike, in about `limit` bytes; the least recently used go first.

    Stands in for a decoder's `PrefixCache` while `serving`. That one keeps beginnings that other prompts may share;
    this one all but the last token, which the first round computes, for calls with this very prompt.

    Lossless: yes; the keys and values are those that the same prompt's prefill gave.
    """

    def __init__(self, limit: int = DEFAULT_BYTES):
        self.limit = limit
        self.num_computed = self.num_forked = 0
        self._prompts: dict[Hashable, _Prompt] = {}
        self._ready: set[Hashable] = set()
        self._epoch = 0

    @contextmanager
    def serving(self, decoder: SpeculativeDecoder) -> Iterator[None]:
        """The decoder takes its prompts from here."""
        before = decoder.prefixes
        decoder.prefixes = self  # type: ignore[assignment]
        try:
            yield
        finally:
            decoder.prefixes = before

    def ready(self, what: Hashable, call: Callable[[], object]) -> None:
        """Make sure that the prompts of `what` are prefilled, by a `call` that decodes a token of them."""
        if what in self._ready:
            return
        self._epoch += 1
        call()
        self._ready.add(what)

    def make_room(self, room: int | None) -> None:
        """As a prefix cache does, for a decoder with a memory budget: prompts at work stay."""
        self._evict(self.limit if room is None else min(room, self.limit))

    def clear(self) -> None:
        self._prompts.clear()
        self._ready.clear()

    @property
    def num_bytes(self) -> int:
        return sum(prompt.num_bytes for prompt in self._prompts.values())

    def prefill(self, session: Session) -> Steps[None]:
        """Fork the session's prompt, or compute and keep it."""
        length = len(session.tokens) - 1
        # The family is part of the key, and lives as long as the backends that are kept.
        key = (id(session.backend.family), session.hidden, session.salt, tuple(session.tokens[:length]))
        known = self._prompts.pop(key, None)
        if known is not None and not session.num_cached:
            self._prompts[key] = known
            known.epoch = self._epoch
            features = known.features.fork(length) if known.features is not None else None
            session.adopt(known.backend.fork(length), length, features)
            self.num_forked += 1
            return
        yield from session.prefilling()
        if session.num_cached != length or not length:
            return
        self.num_computed += 1
        features = session.features.fork(length) if session.features is not None else None
        self._prompts[key] = _Prompt(session.backend.fork(length), features, self._epoch)
        self._evict(self.limit)

    def _evict(self, limit: int) -> None:
        for key in [key for key, prompt in self._prompts.items() if prompt.epoch < self._epoch]:
            if self.num_bytes <= limit:
                return
            del self._prompts[key]
            self._ready.clear()
