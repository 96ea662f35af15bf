"""Toy models: a table of random next-token distributions for each context, small enough to enumerate.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from specdec.runtime.session import Rows
from specdec.tree import TokenTree

# The root token of an empty context. Sessions need one; no distribution depends on it.
ROOT = 0


class Toy:
    """A target p and a draft q over `vocab_size` tokens; both float64, rows made when first asked for.

    q is half p, half noise. `sparse`: below the first position each row of either lacks one token, as after top-k or
    top-p. `greedy`: rows of p are one-hot, as at temperature 0.
    """

    def __init__(self, seed: int, vocab_size: int, *, sparse: bool = False, greedy: bool = False):
        self.seed, self.vocab_size = seed, vocab_size
        self.sparse, self.greedy = sparse, greedy
        self._rows: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def p(self, context: tuple[int, ...]) -> Tensor:
        """The target's next-token distribution after `context`; float64 `[V]`."""
        return self._row(context)[0]

    def q(self, context: tuple[int, ...]) -> Tensor:
        """The draft's; float64 `[V]`."""
        return self._row(context)[1]

    def _row(self, context: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        if context not in self._rows:
            rng = random.Random(f"{self.seed}/{self.vocab_size}/{context}")
            p = _random_row(rng, self.vocab_size)
            q = (p + _random_row(rng, self.vocab_size)) / 2
            if self.sparse and context:
                for row in (p, q):
                    row[rng.randrange(self.vocab_size)] = 0
                    row /= row.sum()
            if self.greedy:
                p = torch.zeros_like(p).scatter_(0, p.argmax(-1, keepdim=True), 1.0)
            self._rows[context] = p, q
        return self._rows[context]

    def target_rows(self, context: tuple[int, ...], tree: TokenTree) -> Tensor:
        """What a forward of the target over `tree` would give the verifier: `[N + 1, V]`, the root's row first."""
        tokens = tree.tokens.tolist()
        paths = [tuple(tokens[n] for n in tree.path(node)) for node in range(-1, len(tree))]
        return torch.stack([self.p(context + path) for path in paths])

    def session(self, context: tuple[int, ...]) -> ToySession:
        return ToySession(self, context)


def _random_row(rng: random.Random, vocab_size: int) -> Tensor:
    row = torch.tensor([rng.expovariate(1.0) for _ in range(vocab_size)], dtype=torch.float64)
    return row / row.sum()


class ToySession:
    """The draft of a `Toy`, with as much of `specdec.runtime.Session` as a drafter's `proposing` uses."""

    context = 1 << 20
    chains = False  # what is drawn is enumerated token by token

    def __init__(self, toy: Toy, context: tuple[int, ...]):
        self._toy, self._text = toy, context
        self.tokens = [ROOT, *context]
        self._num_computed = -1  # nodes returned so far; -1: not even the root

    def drop_tree(self) -> None:
        self._num_computed = -1

    def forwarding(self, tree: TokenTree) -> Generator[Any, Any, Rows]:
        yield from ()
        tokens = tree.tokens.tolist()
        nodes = (() if self._num_computed >= 0 else (-1,)) + tuple(range(max(0, self._num_computed), len(tree)))
        self._num_computed = len(tree)
        rows = [self._toy.q(self._text + tuple(tokens[n] for n in tree.path(node))) for node in nodes]
        return Rows(nodes, torch.stack(rows).log())
