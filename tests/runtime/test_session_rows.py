"""Every logit row of a session equals a forward without any cache over the same prefix, whatever happened before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec.errors import InputError
from specdec.kernels import ops
from specdec.runtime import cache as cache_module
from specdec.runtime import session as session_module
from specdec.runtime.features import Features, FeatureStore, capacity
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


@pytest.mark.parametrize("backend", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_hidden_states_are_those_of_the_same_rows(name: str, backend: str) -> None:
    if backend == "compiled" and not ops.available():
        pytest.skip(str(ops.why_not()))
    model = tiny_models.tiny(name)
    hidden = (0, 1, model.config.num_hidden_layers)
    width = model.get_input_embeddings().weight.shape[1]
    plain = tiny_models.session(model, backend=backend)
    plain.backend.expose(hidden)
    session = Session(plain.backend.fork(0), hidden)
    prompt = [i % 60 + 1 for i in range(150)]  # two chunks
    session.append(prompt)
    session.prefill()
    tree = TokenTree.of([2, 4, 6, 8], [-1, -1, 1, 2])
    rows = session.forward(tree)
    assert rows.hidden is not None
    assert rows.hidden.shape == (len(rows.nodes), len(hidden) * width)
    with torch.inference_mode():
        for node, row in zip(rows.nodes, rows.hidden, strict=True):
            prefix = [*prompt, *tree.tokens[list(tree.path(node))].tolist()]
            states = model(input_ids=torch.tensor([prefix]), use_cache=False, output_hidden_states=True).hidden_states
            torch.testing.assert_close(row, torch.cat([states[i][0, -1] for i in hidden]), rtol=1e-9, atol=1e-9)
    features = Features(session)
    session.commit([1, 2], [4, 6, 9])
    assert len(features) == len(prompt) + 2  # the last token was not computed yet
    twin = session.fork()
    for kept in (features, Features(twin)):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([[*prompt, 4, 6]]), use_cache=False, output_hidden_states=True)
        expected = torch.cat([states.hidden_states[i][0] for i in hidden], -1)
        torch.testing.assert_close(kept.read(0), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(InputError, match="and there are 152"):
        features.read(0, 153)
    session.rewind(100)
    assert len(features) == 99


class Summing(torch.nn.Module):
    """A model that adds what it is given for each row to the row's embedding."""

    input_width = 16

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.inner, self.config = model, model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, features: torch.Tensor, **options: Any) -> Any:
        return self.inner(inputs_embeds=self.inner.get_input_embeddings()(input_ids) + features, **options)


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_a_model_is_given_the_inputs_of_each_row(backend: str) -> None:
    if backend == "compiled" and not ops.available():
        pytest.skip(str(ops.why_not()))
    model = Summing(tiny_models.tiny("llama")).eval()
    inputs = torch.randn(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = [3, 5, 7, 11, 13, 17]

    def expected(path: list[int], rows: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([path]), inputs[rows][None], use_cache=False).logits[0, -1]

    session = tiny_models.session(model, backend=backend)
    session.append(tokens[:5], inputs[:5])
    session.append(tokens[5:], inputs[5:6])
    for _ in range(2):  # dropping the tree computes the last token again, with its inputs
        tree = TokenTree.of([2, 4], [-1, -1])
        rows = session.forward(tree, inputs[6:8])
        torch.testing.assert_close(rows.logits[0], expected(tokens, list(range(6))), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(rows.logits[2], expected([*tokens, 4], [0, 1, 2, 3, 4, 5, 7]), rtol=1e-9, atol=1e-9)
        rows = session.forward(tree.extend(torch.tensor([6]), [1]), inputs[8:9])
        torch.testing.assert_close(
            rows.logits[0], expected([*tokens, 4, 6], [0, 1, 2, 3, 4, 5, 7, 8]), rtol=1e-9, atol=1e-9
        )
        session.drop_tree()
    # What follows are committed tokens with inputs of their own; the nodes are gone.
    session.forward()
    session.append([8, 9], inputs[9:11])
    logits = session.forward().logits[-1]
    torch.testing.assert_close(logits, expected([*tokens, 8, 9], [0, 1, 2, 3, 4, 5, 9, 10]), rtol=1e-9, atol=1e-9)
    session.rewind(3)
    with pytest.raises(InputError, match="inputs are gone"):
        session.forward()


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


def test_hidden_states_grow_by_buckets() -> None:
    """A round appends a few rows, and copies none of those before them."""
    store, sizes = FeatureStore(), set()
    for row in range(300):
        store.write(row, torch.full((1, 2), float(row)))
        sizes.add(store.num_bytes)
    assert store.read(0, 300)[:, 0].tolist() == list(range(300))
    assert len(sizes) == len({capacity(n) for n in range(1, 301)}) < 100
