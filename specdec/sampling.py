"""The only place where logits become probabilities; target and draft go through the same object.

Shape suffixes: N tree nodes (rows = N + 1, the root first), V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.chance import Chance, CounterChance, GreedyChance
from specdec.errors import InputError
from specdec.history import History
from specdec.transfer import to_device
from specdec.tree import TokenTree

# Below this, division would overflow; the limit is a one-hot row all the same.
_GREEDY_BELOW = 1e-5


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, in the order of `transformers`: processors, temperature, top-k, top-p, min-p.

    temperature 0 is greedy. `processors` are `transformers` `LogitsProcessor`s; each sees the token prefix of every
    tree node, and must be a function of (prefix, scores). Filters are `transformers`' own.

    Lossless: yes (the processed target distribution *is* the target).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    processors: tuple[LogitsProcessor, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        t, penalty = self.temperature, self.repetition_penalty
        _check(math.isfinite(t) and t >= 0, f"temperature must be a number >= 0, not {t}; 0 is greedy decoding")
        k, p, m = self.top_k, self.top_p, self.min_p
        _check(k is None or (k >= 1 and k == int(k)), f"top_k must be a whole number >= 1 or None, not {k}")
        _check(p is None or 0 < p <= 1, f"top_p must lie in (0, 1], not {p}; leave it out to keep every token")
        _check(m is None or 0 <= m <= 1, f"min_p must lie in [0, 1], not {m}; leave it out to keep every token")
        _check(math.isfinite(penalty) and penalty > 0, f"repetition_penalty must be > 0, not {penalty}; 1 is none")
        _check(isinstance(self.seed, int), f"seed must be a whole number, not {self.seed!r}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    @property
    def reads_prefix(self) -> bool:
        """Whether scores depend on the tokens before them, and so on which id a column has."""
        return self.repetition_penalty != 1.0 or bool(self.processors)

    @cached_property
    def unseeded(self) -> Sampling:
        """The same distributions; equal for texts that differ in their seeds alone."""
        return replace(self, seed=0)

    @cached_property
    def _by_prefix(self) -> LogitsProcessorList:
        return LogitsProcessorList(self.processors)

    @cached_property
    def _warpers(self) -> LogitsProcessorList:
        items: list[LogitsProcessor] = []
        if not self.is_greedy:
            if self.temperature != 1.0:
                items.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k is not None:
                items.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None and self.top_p < 1:
                items.append(TopPLogitsWarper(self.top_p))
            if self.min_p:
                items.append(MinPLogitsWarper(self.min_p))
        return LogitsProcessorList(items)

    def scores(self, logits: Tensor, prefix: Sequence[int], tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        """Processed logits for `nodes` of the tree (-1 = root), float32 (float64 stays); `[len(nodes), V]`.

        `prefix` ends with the root token. Work for it is O(its growth) when it is a `History`, as a session's tokens
        are; processors other than the repetition penalty are given all of it, and spend on it what they spend.
        """
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.reads_prefix:
            history = prefix if isinstance(prefix, History) else History(prefix)
            if self.repetition_penalty != 1.0:
                scores = self._penalized(scores, history, tree, nodes)
            if self.processors:
                scores = self._processed(scores, history, tree, nodes)
        empty = torch.empty((scores.shape[0], 0), dtype=torch.int64, device=logits.device)
        warped: Tensor = self._warpers(empty, scores)
        return warped

    def _penalized(self, scores: Tensor, history: History, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        """Scores of tokens that stand before a row, divided by the penalty where positive, else multiplied by it.

        (Keskar et al., arXiv 1909.05858, as `transformers` has it.)
        """
        seen_V = history.seen(scores.shape[-1], scores.device)
        seen_NV = seen_V.expand_as(scores)
        paths = [(row, on) for row, node in enumerate(nodes) for on in tree.path(node)]
        if paths:
            rows, path = to_device(torch.tensor(paths), scores.device).T
            seen_NV = seen_NV.clone()
            seen_NV[rows, to_device(tree.tokens, scores.device)[path]] = True
        penalty = self.repetition_penalty
        return torch.where(seen_NV, torch.where(scores < 0, scores * penalty, scores / penalty), scores)

    def _processed(self, scores: Tensor, history: History, tree: TokenTree, nodes: Sequence[int]) -> Tensor:
        scores = scores.clone()
        tokens = tree.tokens.to(scores.device)
        by_depth: dict[int, list[int]] = defaultdict(list)
        for row, node in enumerate(nodes):
            by_depth[0 if node < 0 else tree.depths[node]].append(row)
        for rows in by_depth.values():  # rows of one depth have prefixes of one length
            prefixes = [history.followed_by(tokens[list(tree.path(nodes[row]))]) for row in rows[:1]]
            prefixes += [torch.cat((prefixes[0][: len(history)], tokens[list(tree.path(nodes[r]))])) for r in rows[1:]]
            ids = prefixes[0][None] if len(prefixes) == 1 else torch.stack(prefixes)
            scores[rows] = self._by_prefix(ids, scores[rows]).to(scores.dtype)
        return scores

    def probabilities(
        self, logits: Tensor, prefix: Sequence[int], tree: TokenTree, nodes: Sequence[int] | None = None
    ) -> Tensor:
        """Rows that sum to 1, one-hot at temperature 0; `nodes` defaults to the root and every node."""
        if nodes is None:
            nodes = range(-1, len(tree))
        scores = self.scores(logits, prefix, tree, nodes)
        if self.is_greedy:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        return scores.softmax(-1)

    def chance(self, stream: str) -> Chance:
        return GreedyChance() if self.is_greedy else CounterChance(self.seed, stream)
