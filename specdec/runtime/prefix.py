"""Prefilled prompts, kept for prompts that begin alike: the beginning is copied instead of computed.

Prefill chunks end at places that do not depend on the prompt (`chunk_end`), and reuse ends at such a place too. So what
is reused is, bit for bit, what a prefill would have computed, on every backend and in every dtype.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Hashable
from dataclasses import dataclass

import torch

from specdec.errors import InputError
from specdec.runtime.backend import Backend
from specdec.runtime.features import FeatureStore
from specdec.runtime.session import Session, Steps, chunk_end

# By default at most this many bytes, and at most this share of the device's memory.
DEFAULT_BYTES = 256 << 20
_DEFAULT_SHARE = 0.05


def default_bytes(device: torch.device) -> int:
    """How much the prefixes of one decoder may take when nobody says."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(os.sysconf_names):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return DEFAULT_BYTES
    return min(DEFAULT_BYTES, int(_DEFAULT_SHARE * total))


@dataclass(eq=False)
class _Entry:
    """The keys and values of a prompt's beginning; `keys[i]` stands for its first i + 1 chunks."""

    owner: Hashable
    backend: Backend
    features: FeatureStore | None
    tokens: tuple[int, ...]
    keys: tuple[int, ...]
    num_bytes: int


def _owner(session: Session) -> Hashable:
    """What keys, values and hidden states depend on besides the tokens."""
    return id(session.backend.family), session.hidden, session.salt


def _chunks(session: Session, length: int) -> tuple[list[int], list[int]]:
    """Where the whole chunks within `length` tokens end, and a key for each beginning up to there. O(length)."""
    tokens = session.tokens
    ends: list[int] = []
    keys: list[int] = []
    start, key = 0, hash(_owner(session))
    while (end := chunk_end(start)) <= length:
        key = hash((key, tuple(tokens[start:end])))
        ends.append(end)
        keys.append(key)
        start = end
    return ends, keys


class PrefixCache:
    """Beginnings of prompts, target's and draft's alike, in `limit` bytes; the least recently used go first.

    A beginning that a longer one contains is not kept twice. `num_hits` counts the prompts that reused something,
    `num_reused_tokens` how much. Safe to share between threads.

    Lossless: yes; reused keys and values have the bits that a prefill would have given them.
    """

    def __init__(self, limit: int):
        if not isinstance(limit, int) or limit < 0:
            raise InputError(f"prefix_cache is a number of bytes, 0 for none, not {limit!r}")
        self.limit = limit
        self.num_hits = 0
        self.num_reused_tokens = 0
        self._room = limit  # what the memory budget leaves; at most `limit` counts
        self._entries: dict[int, _Entry] = {}  # by last key, the least recently used first
        self._by_key: dict[int, _Entry] = {}  # every beginning of every entry
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def prefill(self, session: Session) -> Steps[None]:
        """Take over the longest known beginning of the session's tokens, compute the rest, and remember it."""
        self._adopt(session)
        yield from session.prefilling()
        self._keep(session)

    def make_room(self, room: int | None) -> None:
        """Hold at most `room` bytes from now on (None: up to the limit again): what texts need goes before."""
        with self._lock:
            self._room = self.limit if room is None else max(0, room)
            self._evict(0)

    def clear(self) -> None:
        """Forget every prompt."""
        with self._lock:
            self._entries.clear()
            self._by_key.clear()

    def _adopt(self, session: Session) -> None:
        if session.num_cached:
            return
        with self._lock:
            # The last token is never part of it: its forward is the first round's.
            ends, keys = _chunks(session, len(session.tokens) - 1)
            for end, key in zip(reversed(ends), reversed(keys), strict=True):
                entry = self._by_key.get(key)
                if entry is None or entry.owner != _owner(session):
                    continue
                if entry.tokens[:end] == tuple(session.tokens[:end]):
                    self._touch(entry)
                    features = entry.features.fork(end) if entry.features is not None else None
                    session.adopt(entry.backend.fork(end), end, features)
                    self.num_hits += 1
                    self.num_reused_tokens += end
                    return

    def _keep(self, session: Session) -> None:
        with self._lock:
            ends, keys = _chunks(session, session.num_cached)
            if not ends:
                return
            known = self._by_key.get(keys[-1])
            if known is not None:
                self._touch(known)
                return
            # A fork has the capacity of what it was forked from.
            need = session.num_bytes
            if need > min(self.limit, self._room):
                return
            self._evict(need)
            for key in keys[:-1]:  # what this one continues is part of it
                shorter = self._entries.get(key)
                if shorter is not None:
                    self._drop(shorter)
            backend = session.backend.fork(ends[-1])
            features = session.features.fork(ends[-1]) if session.features is not None else None
            size = backend.num_bytes + (features.num_bytes if features is not None else 0)
            entry = _Entry(_owner(session), backend, features, tuple(session.tokens[: ends[-1]]), tuple(keys), size)
            self._entries[keys[-1]] = entry
            self._by_key.update(dict.fromkeys(keys, entry))

    def _touch(self, entry: _Entry) -> None:
        self._entries[entry.keys[-1]] = self._entries.pop(entry.keys[-1])

    def _evict(self, need: int) -> None:
        while self._entries and self.num_bytes + need > min(self.limit, self._room):
            self._drop(next(iter(self._entries.values())))

    def _drop(self, entry: _Entry) -> None:
        del self._entries[entry.keys[-1]]
        for i, key in enumerate(entry.keys):
            if self._by_key[key] is entry:
                other = next((e for e in self._entries.values() if e.keys[: i + 1] == entry.keys[: i + 1]), None)
                if other is None:
                    del self._by_key[key]
                else:
                    self._by_key[key] = other
