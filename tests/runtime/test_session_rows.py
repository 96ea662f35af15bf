"""Every logit row of a session equals a forward without any cache over the same prefix, whatever happened before."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec.runtime import cache as cache_module
from specdec.runtime import session as session_module
from specdec.runtime.session import Rows, Session
from specdec.tree import TokenTree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# Eager attention takes its softmax in float32 whatever the model's dtype, so float64 means sdpa.
EVERY_MODEL = [
    (name, attention, dtype, backend)
    for name in tiny_models.ARCHITECTURES
    for attention, dtype, backend in (
        ("eager", torch.float32, "eager"),
        ("sdpa", torch.float64, "eager"),
        ("sdpa", torch.float32, "eager"),
        ("eager", torch.float32, "compiled"),
        ("sdpa", torch.float64, "compiled"),
    )
    if not (name == "gemma2" and attention == "sdpa")  # transformers refuses it
]

tokens = st.integers(0, tiny_models.VOCAB - 1)
prompts = st.lists(tokens, min_size=1, max_size=24)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 6) -> TokenTree:
    parents = [draw(st.integers(-1, node - 1)) for node in range(draw(st.integers(0, max_nodes)))]
    return TokenTree.of(draw(st.lists(tokens, min_size=len(parents), max_size=len(parents))), parents)


@dataclass(frozen=True)
class Move:
    """One round of a random life: grow a tree in stages, recompute a row, then accept, rewind or fork."""

    tree: TokenTree
    stages: list[int] = field(default_factory=list)
    again: int = 0
    accept: int = 0
    extra: list[int] = field(default_factory=list)
    rewind: int | None = None
    fork: bool = False


moves = st.builds(
    Move,
    tree=trees(),
    stages=st.lists(st.integers(0, 6), max_size=2),
    again=st.integers(-1, 5),
    accept=st.integers(-1, 5),
    extra=st.lists(tokens, min_size=1, max_size=3),
    rewind=st.none() | st.integers(0, 30),
    fork=st.booleans(),
)


@pytest.fixture(autouse=True)
def _small_chunks_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "PREFILL_CHUNK", 5)
    monkeypatch.setattr(cache_module, "BUCKETS", (8, 16, 24))


def assert_rows(model: torch.nn.Module, session: Session, tree: TokenTree, rows: Rows) -> None:
    for node, row in zip(rows.nodes, rows.logits, strict=True):
        assert_row(model, [*session.tokens, *tree.tokens[list(tree.path(node))].tolist()], row)


def assert_row(model: torch.nn.Module, prefix: list[int], row: torch.Tensor) -> None:
    expected = tiny_models.cache_free(model, prefix)
    error = float((row - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= TOLERANCE[row.dtype], f"{error} after {prefix}"


def play(model: torch.nn.Module, session: Session, move: Move) -> Session:
    """Run one move, comparing every row on the way."""
    for size in [*sorted(move.stages), len(move.tree)]:
        part = TokenTree(move.tree.tokens[:size], move.tree.parents[:size])
        if len(part) < len(session.tree) or (
            len(part) == len(session.tree) and session.num_cached == len(session.tokens)
        ):
            continue  # no row would be new
        assert_rows(model, session, part, session.forward(part))
    path = move.tree.path(min(move.accept, len(move.tree) - 1))
    if session.num_cached == len(session.tokens):  # some of what is accepted is computed again, a row at a time
        again = [node for node in path if node < len(session.tree)][: move.again]
        first = max(0, len(session.tokens) - 1 - move.again)
        for count, row in enumerate(session.replay(first, again)):
            assert_row(model, [*session.tokens, *session.tree.tokens[list(again[:count])].tolist()], row)
    session.commit(path, [*move.tree.tokens[list(path)].tolist(), *move.extra])
    if move.fork:
        other, session = session, session.fork()
        other.append([1, 2, 3])  # what the first one does now must not be seen by the second
        other.forward(TokenTree.chain([4, 5]))
    if move.rewind is not None:
        session.rewind(max(1, min(move.rewind, len(session.tokens))))
    return session


@pytest.mark.parametrize(("name", "attention", "dtype", "backend"), EVERY_MODEL)
def test_random_lives_match_cache_free_forwards(name: str, attention: str, dtype: torch.dtype, backend: str) -> None:
    model = tiny_models.tiny(name, attention=attention, dtype=dtype)

    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(prompt=prompts, life=st.lists(moves, min_size=1, max_size=4))
    def live(prompt: list[int], life: list[Move]) -> None:
        session = tiny_models.session(model, prompt, backend)
        session.prefill()
        assert session.num_cached == len(prompt) - 1
        for move in life:
            session = play(model, session, move)
        assert_rows(model, session, TokenTree.empty(), session.forward())

    live()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_hidden_states_are_those_of_the_same_rows(name: str) -> None:
    model = tiny_models.tiny(name)
    session = tiny_models.session(model, [3, 5, 7, 11])
    tree = TokenTree.of([2, 4, 6], [-1, -1, 0])
    rows = session.forward(tree, hidden=True)
    assert rows.hidden is not None
    assert len(rows.hidden) == model.config.num_hidden_layers + 1
    # The root is the last of four pending rows: only its hidden state and the nodes' are returned.
    for node, row in zip(rows.nodes, range(len(rows.logits) - len(rows.nodes), len(rows.logits)), strict=True):
        prefix = [3, 5, 7, 11, *tree.tokens[list(tree.path(node))].tolist()]
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([prefix]), use_cache=False, output_hidden_states=True)
        for mine, theirs in zip(rows.hidden, expected.hidden_states, strict=True):
            torch.testing.assert_close(mine[row], theirs[0, -1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen2-sliding"])
def test_the_window_matters_in_these_tests(name: str) -> None:
    """Negative control: without the window the rows differ, so the comparisons above would see a wrong mask."""
    model = tiny_models.tiny(name, attention="eager")
    prompt = list(range(1, 25))
    session = tiny_models.session(model, prompt)
    right = session.forward().logits[-1]
    blind = tiny_models.session(model, prompt)
    bias = blind.backend._bias
    blind.backend._bias = lambda step, sliding: bias(step, False)
    assert float((blind.forward().logits[-1] - right).abs().max()) > 1e-3
