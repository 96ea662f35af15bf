"""One suite for every backend that is registered, third parties' included: all behave as the stock step does.

A backend is opened on one small float32 model, and does whatever the eager backend does beside it. What a backend
cannot do it has to say in its capabilities, or to refuse in an `InputError`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
import torch_graphs
from specdec.drafters import ModelDrafter
from test_session_rows import Move, play

import specdec
from specdec import registry
from specdec.draws import NextToken
from specdec.errors import InputError
from specdec.kernels import ops
from specdec.policy import Fixed
from specdec.proposal import Draw
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.session import Session, run
from specdec.sampling import Sampling
from specdec.tree import TokenTree

TOLERANCE = 1e-4  # of the largest logit: float32, and sums in another order
#: Of backends that compute in half precision. These random weights make eight times of an error, and more at some rows.
COARSE = {"qnn": 0.06}
#: Artefacts on graphs that torch runs, by who writes keys and values: what the host does is the same everywhere.
IN_TORCH = ("scatter", "smart-mask", "shift-pointer")
BACKENDS = (*registry.available("backend"), *IN_TORCH)
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
#: Two branches, one of them with a fork of its own.
TREE = TokenTree.of([9, 8, 7, 6, 5, 4], [-1, -1, 0, 1, 1, 4])


model = tiny_artifacts.model


def _compiled(model: Any) -> Backend:
    if not ops.available():
        pytest.skip(str(ops.why_not()))
    return registry.find("backend", "compiled").open(model, compile="never")


def _cuda(model: Any) -> Backend:
    return registry.find("backend", "cuda").open(model, kernels="twin")


def _artifact(name: str, model: Any) -> Backend:
    backend: Backend = tiny_artifacts.opened(name)
    return backend


#: How a backend is opened here; a third party's is opened as users do.
OPEN: dict[str, Callable[[Any], Backend]] = {
    "compiled": _compiled,
    "cuda": _cuda,
    **{name: partial(_artifact, name) for name in ("aoti", "executorch", "openvino", "qnn")},
    **{name: partial(torch_graphs.opened, updater=name) for name in IN_TORCH},
}


@cache
def opened(name: str) -> Backend:
    return OPEN.get(name, lambda model: registry.find("backend", name).open(model))(model())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if request.param in COARSE:
        monkeypatch.setattr(sys.modules[__name__], "TOLERANCE", COARSE[request.param])
    return opened(request.param).fork(0)


@pytest.fixture
def stock() -> Backend:
    return opened("eager").fork(0)


def chain(tokens: Sequence[int], start: int, num_logits: int | None = None, hidden: tuple[int, ...] = ()) -> Step:
    """Tokens of a text, written from slot `start` on; all before them is seen."""
    count = len(tokens)
    block = torch.ones(count, count, dtype=torch.bool).tril()
    positions = torch.arange(start, start + count)
    return Step(torch.tensor(tokens), start, block, positions, start, num_logits or count, hidden)


def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert mine.shape == theirs.shape
    assert mine.dtype == theirs.dtype
    assert float((mine - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def both(backend: Backend, stock: Backend, step: Step) -> StepResult:
    """Run a step on both, compare, and give the backend's own."""
    mine, theirs = backend.forward(step), stock.forward(step)
    assert_same(mine.logits, theirs.logits)
    return mine


def counts(capabilities: Capabilities) -> list[int]:
    """Row counts below, at and above the widths of the graphs."""
    around = [w + d for w in capabilities.widths or (1, 4, 8) for d in (-1, 0, 1)]
    return sorted({n for n in around if 0 < n <= capabilities.context // 2})


def test_every_backend_is_opened_here() -> None:
    assert {"aoti", "eager", "compiled", "cuda", "executorch", "openvino"} <= set(BACKENDS)


def test_the_report_is_that_of_the_model(backend: Backend, stock: Backend) -> None:
    mine, theirs = backend.capabilities, stock.capabilities
    assert (mine.vocab_size, mine.dtype, mine.input_width) == (theirs.vocab_size, theirs.dtype, theirs.input_width)
    assert 1 <= mine.context <= theirs.context
    assert mine.widths is None or (mine.widths == tuple(sorted(set(mine.widths))) and mine.widths[0] >= 1)
    assert backend.describes
    assert backend.numerics in ("invariant", "fast")


def test_any_number_of_rows(backend: Backend, stock: Backend) -> None:
    for count in counts(backend.capabilities):
        mine, theirs = backend.fork(0), stock.fork(0)
        text = [(7 * i + 3) % 64 for i in range(2 * count)]
        for wanted in {1, count}:
            both(mine, theirs, chain(text[:count], 0, wanted))
            both(mine, theirs, chain(text[count:], count, wanted))


def test_a_row_alone_is_the_row_among_others(backend: Backend) -> None:
    text = [(5 * i + 2) % 64 for i in range(12)]
    together = backend.fork(0).forward(chain(text, 0)).logits
    one = backend.fork(0)
    for i, token in enumerate(text):
        assert_same(one.forward(chain([token], i)).logits, together[i : i + 1])


def test_a_step_writes_its_own_slots_and_no_others(backend: Backend, stock: Backend) -> None:
    """Rows that only fill a graph up are written nowhere: what stands behind the step stays as it was."""
    text = [(11 * i + 1) % 64 for i in range(16)]
    for count in [n for n in counts(backend.capabilities) if n <= 6]:
        mine, theirs = backend.fork(0), stock.fork(0)
        both(mine, theirs, chain(text, 0))
        both(mine, theirs, chain([60 - i for i in range(count)], 4))  # over the old ones, in the middle
        both(mine, theirs, chain([1], len(text)))  # sees all


def test_rows_see_what_the_mask_shows_at_the_positions_given(backend: Backend, stock: Backend) -> None:
    if not backend.capabilities.trees:
        pytest.skip("this backend says that it takes no trees")
    both(backend, stock, chain(PROMPT, 0))
    n = len(PROMPT)
    block = torch.eye(3, dtype=torch.bool)
    siblings = Step(torch.tensor([9, 8, 7]), n, block, torch.tensor([n, n, n]), n, 3)
    rows = both(backend, stock, siblings).logits
    for i, token in enumerate([9, 8, 7]):  # each as if the others were not there
        assert_same(rows[i : i + 1], stock.fork(n).forward(chain([token], n)).logits)
    wrong = backend.forward(chain([9, 8, 7], n)).logits[1:]
    assert float((wrong - rows[1:]).abs().max()) > 10 * TOLERANCE * float(rows.abs().max())  # so the mask matters


@pytest.mark.parametrize("path", [(0, 2), (1,), (1, 4, 5), ()])
def test_any_path_of_a_tree_is_committed(backend: Backend, path: tuple[int, ...]) -> None:
    if not backend.capabilities.trees:
        pytest.skip("this backend says that it takes no trees")
    session = Session(backend)
    session.append(PROMPT)
    for round in range(3):  # moved slots are moved again
        tree = TokenTree.of([(t + round) % 64 for t in TREE.tokens.tolist()], TREE.parents)
        session.forward(tree)
        session.commit(path, [*tree.tokens[list(path)].tolist(), 11 + round])
        row = session.forward().logits[-1]
        assert_same(row, tiny_models.cache_free(model(), list(session.tokens)))


def test_gathered_slots_are_those_that_were_named(backend: Backend, stock: Backend) -> None:
    text = [(3 * i + 1) % 64 for i in range(12)]
    for slots, start in (([2], 5), ([5], 2), ([6, 8, 9], 5), ([9, 4], 3), ([0, 1, 2], 0), ([7, 8], 8)):
        mine, theirs = backend.fork(0), stock.fork(0)
        both(mine, theirs, chain(text, 0))
        for each in (mine, theirs):
            each.gather(slots, start)
            for slot in slots:
                if slot < start:  # was moved away: it is to be written anew
                    each.forward(chain([33], slot))
        both(mine, theirs, chain([5, 6], start + len(slots)))


def test_rewinding_is_an_index(backend: Backend) -> None:
    session = Session(backend)
    session.append([*PROMPT, 1, 2, 3])
    first = session.forward().logits.clone()
    session.append([4, 5, 6])
    session.forward(TokenTree.chain([7, 8, 9]))
    session.rewind(len(PROMPT) + 3)
    assert_same(session.forward().logits, first[-1:])
    session.rewind(2)
    session.append([40, 41])
    assert_same(session.forward().logits[-1], tiny_models.cache_free(model(), [*PROMPT[:2], 40, 41]))


def test_forks_do_not_see_each_other(backend: Backend) -> None:
    session = Session(backend)
    session.append(PROMPT)
    session.prefill()
    try:
        twins = [session, session.fork(), session.fork()]
    except InputError as error:
        pytest.skip(f"this backend refuses: {error}")
    for i, twin in enumerate(twins):
        twin.append([20 + i] * (i + 1))
    for twin in (*twins, *reversed(twins)):  # in turns
        twin.forward(TokenTree.chain([9, 9, 9]))
        twin.drop_tree()
    for twin in twins:
        assert_same(twin.forward().logits[-1], tiny_models.cache_free(model(), list(twin.tokens)))
    assert all(twin.backend.family is backend.family for twin in twins)


def test_steps_of_several_texts_are_answered_in_order(backend: Backend, stock: Backend) -> None:
    mine, theirs = [backend.fork(0) for _ in range(3)], [stock.fork(0) for _ in range(3)]
    rounds = ((([1, 2, 3], [4], [5, 6, 7, 8]), (0, 0, 0)), (([9], [8, 7], [6]), (3, 1, 4)))
    for texts, starts in rounds:
        steps = [chain(tokens, at) for tokens, at in zip(texts, starts, strict=True)]
        answers = type(backend).forward_many(mine, steps)
        for answer, expected in zip(answers, EagerBackend.forward_many(theirs, steps), strict=True):
            assert_same(answer.logits, expected.logits)


def test_hidden_states_are_those_of_the_same_rows_or_refused(backend: Backend, stock: Backend) -> None:
    given = backend.capabilities.hidden
    wanted = (0, 1, 2) if given is None else given
    if wanted:
        backend.expose(wanted)
        fresh = backend.fork(0)
        for step in (chain(PROMPT, 0, hidden=wanted), chain([1], len(PROMPT), hidden=wanted)):
            mine, theirs = both(fresh, stock, step).hidden_MW, stock.forward(step).hidden_MW
            assert mine is not None
            assert theirs is not None
            assert_same(mine, theirs)
    if given is not None:
        missing = next(i for i in range(4) if i not in given)
        with pytest.raises(InputError, match=f"hidden state {missing}"):
            backend.expose((missing,))


def test_random_lives(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grown trees, replayed paths, commits, rewinds and forks in any order; every row is compared."""
    monkeypatch.setattr("test_session_rows.TOLERANCE", {torch.float32: TOLERANCE})
    if not backend.capabilities.trees:
        pytest.skip("this backend says that it takes no trees")
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for _ in range(12):
        session = Session(backend.fork(0))
        session.append([whole(0, 63) for _ in range(whole(1, 24))])
        for _ in range(4):
            parents = [whole(-1, node - 1) for node in range(whole(0, 6))]
            move = Move(
                tree=TokenTree.of([whole(0, 63) for _ in parents], parents),
                stages=[whole(0, 6) for _ in range(whole(0, 2))],
                again=whole(-1, 5),
                accept=whole(-1, 5),
                extra=[whole(0, 63) for _ in range(whole(1, 3))],
                rewind=whole(0, 30) if whole(0, 3) == 0 else None,
                fork=whole(0, 2) == 0,
            )
            session = play(model(), session, move)


@pytest.mark.parametrize("policy", [Fixed(1), Fixed(3), Fixed(7), Fixed(3, (3, 2))], ids=lambda p: p.name)
def test_texts_are_those_of_eager(backend: Backend, policy: Fixed) -> None:
    """To the very end of the context, plainly and speculatively."""
    if policy.branches and not backend.capabilities.trees:
        pytest.skip("this backend says that it takes no trees")
    if TOLERANCE in COARSE.values():
        pytest.skip("half precision decides near ties of random weights otherwise; its own tests have clear margins")
    draft = ModelDrafter(tiny_models.noisy(model(), 0.02), backend="eager")
    made = specdec.SpeculativeDecoder(model(), drafter=draft, policy=policy, backend="eager")
    prompt = [(13 * i + i // 5) % 64 for i in range(backend.capabilities.context - 40)]
    expected = made.generate_plain(prompt, max_new_tokens=40).tokens
    made.backend = backend
    for decode in (made.generate, made.generate_plain):
        out = decode(prompt, max_new_tokens=1000, **({"strict": True} if decode == made.generate else {}))
        assert 40 <= len(out.tokens) <= 41  # the last token need not be computed
        assert out.tokens[:40] == expected
        assert out.finish_reason == "context"


def test_a_draft_that_is_asked_for_at_once_is_its_steps(backend: Backend, stock: Backend) -> None:
    """Each token is the top one of the logits before it, by this backend's own steps; the slots hold the chain."""
    rule = NextToken(Sampling(), Draw.POINT, backend.capabilities.vocab_size)
    for _ in range(4):  # a backend may prepare what it is asked for again
        mine, alone = Session(backend.fork(0)), Session(backend.fork(0))
        for session in (mine, alone):
            session.append(PROMPT)
            session.prefill()
        drafted = run(mine.chaining(4, rule)).tokens_K.tolist()
        ran = TokenTree.empty()
        for token in drafted:
            assert int(alone.forward(ran).logits[-1].argmax()) == token
            ran = ran.extend(torch.tensor([token]), [len(ran) - 1])
        mine.commit([0, 1, 2], [*drafted[:3], 11])
        text = [*PROMPT, *drafted[:3], 11]
        assert_same(mine.forward().logits, stock.fork(0).forward(chain(text, 0, 1)).logits)
