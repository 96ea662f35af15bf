"""The n-gram index and the suffix automaton against brute force over the whole text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec.drafters import NgramDrafter, SuffixDrafter
from specdec.drafters.suffix import SuffixAutomaton
from tiny_text import byte_tokenizer

from specdec.chance import GreedyChance
from specdec.drafter import BuildContext, Drafter, Request
from specdec.errors import InputError
from specdec.policy import Plan
from specdec.proposal import Draw
from specdec.sampling import Sampling

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def starts(text: list[int], piece: list[int]) -> list[int]:
    return [i for i in range(len(text) - len(piece) + 1) if text[i : i + len(piece)] == piece]


def longest_earlier_suffix(text: list[int]) -> int:
    """Length of the longest suffix that also stands somewhere else (it may overlap)."""
    return max((n for n in range(1, len(text)) if len(starts(text, text[-n:])) > 1), default=0)


def proposed(drafter: Drafter, text: list[int], depth: int, eos: frozenset[int] = frozenset()) -> list[int]:
    state: Any = drafter.start(Request(tuple(text), Sampling(), Draw.POINT, 9, 999, eos))
    proposal = drafter.propose(state, Plan(depth), GreedyChance())
    assert proposal.tree.is_chain
    assert set(proposal.draws) <= {Draw.POINT}
    return proposal.tree.tokens.tolist()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=texts)
def test_the_automaton_knows_every_substring_its_count_and_what_follows(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    for i in range(len(text)):
        state = 0
        for j in range(i, len(text)):
            state = automaton.next[state][text[j]]
            piece = text[i : j + 1]
            assert automaton.count[state] == len(starts(text, piece))
            following = {text[s + len(piece)] for s in starts(text, piece) if s + len(piece) < len(text)}
            assert set(automaton.next[state]) == following
            assert automaton.length[automaton.link[state]] < len(piece) <= automaton.length[state]
    assert automaton.length[max(0, automaton.link[automaton.last])] == longest_earlier_suffix(text)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(corpus=texts, text=texts)
def test_a_cursor_in_the_corpus_is_at_the_longest_suffix_that_stands_there(corpus: list[int], text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in corpus:
        automaton.append(token)
    state, matched = 0, 0
    for end, token in enumerate(text, 1):
        state, matched = automaton.advance(state, matched, token)
        expected = max((n for n in range(1, end + 1) if starts(corpus, text[end - n : end])), default=0)
        assert matched == expected
        if matched:
            assert automaton.count[state] == len(starts(corpus, text[end - matched : end]))


def brute_continuation(text: list[int], limit: int, floor: float) -> list[int]:
    """The most frequent way on from the longest earlier suffix, by counting."""
    suffix = text[len(text) - longest_earlier_suffix(text) :]
    draft: list[int] = []
    probability = 1.0
    while suffix and len(draft) < limit:
        counts: dict[int, int] = {}
        for s in starts(text, suffix):
            if s + len(suffix) < len(text):
                counts[text[s + len(suffix)]] = counts.get(text[s + len(suffix)], 0) + 1
        if not counts:
            break
        best = max(counts.values())
        probability *= best / sum(counts.values())
        if probability < floor:
            break
        ways = [token for token, count in counts.items() if count == best]
        if len(ways) > 1:
            return [*draft, -1]  # a tie: either way is right
        draft.append(ways[0])
        suffix = [*suffix, ways[0]]
    return draft


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(text=texts, limit=st.integers(1, 6), floor=st.sampled_from([0.0, 0.3, 0.7]))
def test_suffix_proposes_the_most_frequent_continuation(text: list[int], limit: int, floor: float) -> None:
    got = proposed(SuffixDrafter(factor=0, offset=limit, floor=floor), text, 64)
    expected = brute_continuation(text, limit, floor)
    if expected and expected[-1] == -1:
        assert got[: len(expected) - 1] == expected[:-1]
        assert len(got) >= len(expected)
    else:
        assert got == expected


def test_suffix_says_how_many_tokens_it_expects() -> None:
    """By how often each way on was taken: 3 after 1, 2 in two of three places; then 5 behind 3 always."""
    drafter = SuffixDrafter(factor=0, offset=2, floor=0.0)
    text = [1, 2, 3, 5, 1, 2, 3, 5, 1, 2, 4, 9, 1, 2]
    state = drafter.start(Request(tuple(text), Sampling(), Draw.POINT, 16, 64))
    found = drafter.propose(state, Plan(2), GreedyChance())
    assert found.tree.tokens.tolist() == [3, 5]
    assert found.expected == pytest.approx(2 / 3 + 2 / 3)
    assert drafter.propose(state, Plan(1), GreedyChance()).expected == pytest.approx(2 / 3)
    ending = replace(state, eos_ids=frozenset({3}))
    assert drafter.propose(ending, Plan(2), GreedyChance()).expected == pytest.approx(2 / 3)


def test_suffix_limits_its_length_by_the_match() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 2, 3]
    assert proposed(SuffixDrafter(factor=1.0, offset=0), text, 64) == [4, 5]
    assert proposed(SuffixDrafter(factor=1.0, offset=1), text, 64) == [4, 5, 6]
    assert proposed(SuffixDrafter(factor=9.0), text, 2) == [4, 5]
    assert proposed(SuffixDrafter(factor=9.0), text, 64, frozenset({5})) == [4, 5]
    assert proposed(SuffixDrafter(), [1, 2, 3], 64) == []


def test_suffix_uses_a_corpus_when_its_match_is_longer(tmp_path: Path) -> None:
    corpus = [5, 6, 7, 8, 1, 2]
    text = [7, 3, 5, 6, 7]
    assert proposed(SuffixDrafter(corpus_tokens=corpus, corpus_bias=1), text, 3) == [8, 1, 2]
    assert proposed(SuffixDrafter(corpus_tokens=corpus, corpus_bias=2), text, 3) == [3, 5, 6]
    path = tmp_path / "corpus.txt"
    path.write_text("hello world")
    built = SuffixDrafter.build(BuildContext(None, byte_tokenizer()), corpus=path)
    ids = byte_tokenizer()("hello world")["input_ids"]
    request = Request(tuple(ids[:6]), Sampling(), Draw.POINT, 300, 999)
    assert built.propose(built.start(request), Plan(5), GreedyChance()).tree.tokens.tolist() == ids[6:]
    with pytest.raises(InputError, match=r"nothing\.txt: no such file"):
        SuffixDrafter.build(BuildContext(None, byte_tokenizer()), corpus=tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="needs the target's tokenizer"):
        SuffixDrafter.build(BuildContext(None), corpus=path)


def brute_ngram(text: list[int], longest: int, shortest: int, newest: bool, depth: int) -> list[int]:
    for n in range(min(longest, len(text)), shortest - 1, -1):
        followed = [s for s in starts(text, text[-n:]) if s + n < len(text)]
        if followed:
            grown, at = list(text), (followed[-1] if newest else followed[0]) + n
            for i in range(depth):
                grown.append(grown[at + i])
            return grown[len(text) :]
    return []


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    text=texts,
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
    newest=st.booleans(),
    depth=st.integers(1, 8),
)
def test_ngram_finds_what_a_search_finds(text: list[int], sizes: list[int], newest: bool, depth: int) -> None:
    shortest, longest = sizes
    drafter = NgramDrafter(longest, shortest, "newest" if newest else "oldest")
    assert proposed(drafter, text, depth) == brute_ngram(text, longest, shortest, newest, depth)


def test_ngram_options() -> None:
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    assert proposed(NgramDrafter(match="newest"), text, 2) == [4, 1]
    assert proposed(NgramDrafter(match="oldest"), text, 2) == [3, 1]
    assert proposed(NgramDrafter(min_ngram=3), text, 2) == []
    assert proposed(NgramDrafter(), text, 9, frozenset({1})) == [4, 1]
    assert proposed(NgramDrafter(), [7], 4) == []
    for options in ({"min_ngram": 0}, {"min_ngram": 5, "max_ngram": 4}):
        with pytest.raises(InputError, match="1 <= min_ngram <= max_ngram"):
            NgramDrafter(**options)
    with pytest.raises(InputError, match="match is 'newest' or 'oldest', not 'best'"):
        NgramDrafter(match="best")
    with pytest.raises(InputError, match="need factor, offset >= 0"):
        SuffixDrafter(factor=0, offset=0)
