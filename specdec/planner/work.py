"""The rounds that a text takes under a setting: cut from rounds that were seen, or expected from a survival curve.

Nothing here runs a model or looks at a clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul

from specdec.errors import InputError
from specdec.fit.optimum import num_expanded
from specdec.policy import cut
from specdec.tree import structure

#: Nodes, levels and nodes with children of a round.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """One round of a chain drafter: tokens proposed, and how many of them were accepted."""

    proposed: int
    accepted: int


@dataclass(frozen=True)
class SeenText:
    """A text that was decoded with chains of at most `limit` tokens. Positions count its new tokens.

    `num_tokens` came out where `max_new_tokens` were allowed; the last round may have been cut by an end.
    """

    limit: int
    num_prompt_tokens: int
    num_tokens: int
    max_new_tokens: int
    rounds: tuple[Seen, ...]


@dataclass(frozen=True)
class Work:
    """What a text takes: how many rounds of each size, for `num_tokens` tokens behind a prompt."""

    num_prompt_tokens: int
    num_tokens: float
    rounds: Mapping[Size, float] = field(default_factory=dict)

    @property
    def num_rounds(self) -> float:
        return sum(self.rounds.values())

    @property
    def tokens_per_round(self) -> float:
        return self.num_tokens / self.num_rounds if self.num_rounds else 0.0


def chain(length: int) -> Size:
    return (length, length, length)


def plain(text: SeenText) -> Work:
    """The text without a drafter."""
    return Work(text.num_prompt_tokens, text.num_tokens)


def _positions(text: SeenText) -> tuple[list[bool], list[int | None]]:
    """For each position: whether the draft was right there, and how many tokens the drafter had from there on (None:
    as many as it is asked for).

    A token after a draft that was accepted to its limit was never drafted; it is taken to have been right, as those
    before it were.
    """
    right: list[bool] = []
    ahead: list[int | None] = []
    for seen in text.rounds:
        asked = max(0, min(text.limit, text.max_new_tokens - len(right) - 1))
        at_limit = seen.proposed >= asked
        for offset in range(seen.accepted + 1):
            right.append(offset < seen.accepted or (at_limit and seen.accepted == seen.proposed))
            ahead.append(None if at_limit else seen.proposed - offset)
    return right, ahead


def recut(text: SeenText, k: int) -> list[Seen]:
    """The rounds that the same text would have taken with chains of at most k tokens.

    Exact at the limit it was decoded with, and below it where a draft token depends on the tokens before it alone, not
    on where its round began (a draft model, at temperature 0 or under a rule that keeps the seed); else as near as the
    two lengths are. Beyond the limit, drafts go on as in the rounds that followed. Raises `InputError` for k < 1.
    """
    if k < 1:
        raise InputError(f"k is the number of drafted tokens per round and must be a whole number >= 1, not {k!r}")
    right, ahead = _positions(text)
    rounds, at = [], 0
    while at < min(text.num_tokens, len(right)):
        proposed = max(0, min(k, text.max_new_tokens - at - 1))
        limit = ahead[at]
        if limit is not None:
            proposed = min(proposed, limit)
        accepted = 0
        while accepted < proposed and at + accepted < len(right) and right[at + accepted]:
            accepted += 1
        rounds.append(Seen(proposed, accepted))
        at += accepted + 1
    return rounds


def work_of(text: SeenText, k: int) -> Work:
    """Of the text with chains of at most k tokens; k = 0 is plain decoding."""
    if k == 0:
        return plain(text)
    sizes = Counter(chain(seen.proposed) for seen in recut(text, k))
    return Work(text.num_prompt_tokens, text.num_tokens, dict(sizes))


def survival_of(texts: Sequence[SeenText], k: int) -> list[float]:
    """P(accepted at each depth and all before it) in rounds of length k of these texts."""
    rounds = []
    for text in texts:
        at = 0
        for seen in recut(text, k):
            rounds.append((max(0, min(k, text.max_new_tokens - at - 1)), seen))
            at += seen.accepted + 1
    return survival(rounds, k)


def survival(rounds: Iterable[tuple[int, Seen]], k: int) -> list[float]:
    """P(accepted at each depth and all before it); each round comes with the length that it was asked for.

    A round that a text's end cut to less than k, and that was accepted to its end, says nothing about what would have
    followed (Kaplan and Meier, 1958); one that ended because the drafter had no more was not accepted any further.
    """
    going, stopped = [0] * k, [0] * k
    for asked, seen in rounds:
        for depth in range(min(seen.accepted, k)):
            going[depth] += 1
        whole = seen.accepted == seen.proposed and seen.proposed >= asked
        if seen.accepted < k and not whole:
            stopped[seen.accepted] += 1
    shares = [a / (a + b) if a + b else 0.0 for a, b in zip(going, stopped, strict=True)]
    return list(accumulate(shares, mul))


def geometric(acceptance: float, k: int) -> list[float]:
    """The survival of drafts whose every token is accepted with the same probability, whatever came before."""
    return [acceptance**depth for depth in range(1, k + 1)]


def tokens_per_round(acceptance: float, k: int) -> float:
    """Expected tokens of a round of k drafted tokens, each accepted with the same probability a, the target's own one
    included: 1 + a + a^2 + … + a^k = (1 - a^(k+1)) / (1 - a). (Leviathan et al., arXiv 2211.17192, equation 1.)"""
    if not 0 <= acceptance <= 1:
        raise InputError(f"acceptance is a probability, not {acceptance}")
    return float(k + 1) if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)


def expected_work(
    survival: Sequence[float], num_tokens: int, num_prompt_tokens: int = 0, shape: Sequence[int] | None = None
) -> Work:
    """Of a text of `num_tokens` whose rounds all have this survival, independently of each other.

    `survival[i]`: P(accepted at depth i + 1 and all before it); as long as the chain, or as deep as the tree `shape`
    (parents). Near the end of the text drafts are cut to what is left of it, as the loop does.
    """
    if any(not 0 <= p <= 1 for p in survival) or any(b > a + 1e-9 for a, b in pairwise(survival)):
        raise InputError(f"a survival curve falls from at most 1 to at least 0, unlike {list(survival)}")
    if not survival:
        return Work(num_prompt_tokens, num_tokens)
    sizes = [_size(shape, depth) if shape is not None else chain(depth) for depth in range(len(survival) + 1)]
    curve = [1.0, *survival]
    reaching = [0.0] * (num_tokens + 1)  # probability that a round starts with so many tokens left
    reaching[num_tokens] = 1.0
    rounds: dict[Size, float] = {}
    for left in range(num_tokens, 0, -1):
        depth = min(len(survival), left - 1)
        rounds[sizes[depth]] = rounds.get(sizes[depth], 0.0) + reaching[left]
        for accepted in range(depth + 1):
            further = curve[accepted + 1] if accepted < depth else 0.0
            reaching[left - accepted - 1] += reaching[left] * (curve[accepted] - further)
    return Work(num_prompt_tokens, num_tokens, rounds)


def _size(shape: Sequence[int], depth: int) -> Size:
    """Of the part of a tree that is at most so deep."""
    parents = cut(tuple(shape), depth)
    return (len(parents), structure(parents).max_depth, num_expanded(parents)) if parents else (0, 0, 0)
