"""One sequence of one model on the KV runtime.

A session holds committed tokens and, behind them, the nodes of a tree that may or may not be accepted. Every committed
token but the last few has its keys and values in the cache; the next forward computes what is pending. So prefill,
the catch-up of a draft model after full acceptance, plain decoding and tree verification are one operation.

What needs the model is written as a generator of `Call`s, each answered with its `StepResult`, or what was `Drafted`.
`run` answers them at once; a batch collects those of many texts and answers them together.

Shape suffixes: M rows of one step, B slots of its block, N tree nodes, V vocabulary, W width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from specdec.errors import InputError
from specdec.history import History
from specdec.runtime.backend import Backend, Step, StepResult
from specdec.runtime.chain import Chain, Drafted, Rule
from specdec.runtime.features import FeatureStore
from specdec.transfer import to_device
from specdec.tree import TokenTree, structure

# Rows of one prefill step: bounds the logits and attention scratch of long prompts.
PREFILL_CHUNK = 512
# Blocks of at most this many slots are kept for the next step of the same shape.
_SMALL_BLOCK = 128

T = TypeVar("T")
E = TypeVar("E")


class Call(NamedTuple):
    """A step that is wanted of a backend, or a step and the chain that follows it."""

    backend: Backend
    step: Step
    chain: Chain | None = None

    @property
    def num_levels(self) -> int:
        """Forwards of the model, one after another."""
        return self.chain.count if self.chain is not None else 1

    @property
    def num_rows(self) -> int:
        return self.step.num_rows + self.num_levels - 1


Answer = StepResult | Drafted
#: A computation that asks for steps on its way and returns a `T`.
Steps = Generator[Call, Answer, T]


def answer(calls: Sequence[Call]) -> Sequence[Answer]:
    """The answers of calls to one family, all for steps or all for chains."""
    first, backends = calls[0], [call.backend for call in calls]
    chains = [call.chain for call in calls if call.chain is not None]
    if chains:
        return type(first.backend).draft_many(backends, [call.step for call in calls], chains)
    if len(calls) == 1:
        return [first.backend.forward(first.step)]
    return type(first.backend).forward_many(backends, [call.step for call in calls])


def answered(events: Generator[Call | E, Any, T]) -> Generator[E, None, T]:
    """The same computation with every call answered at once: what it yields besides calls, and what it returns."""
    proceed: Callable[[Any], Call | E] = events.send
    given: Answer | Exception | None = None
    try:
        while True:
            event = proceed(given)
            if not isinstance(event, Call):
                yield event
                proceed, given = events.send, None
                continue
            try:
                proceed, given = events.send, answer([event])[0]
            except Exception as error:
                proceed, given = events.throw, error
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        events.close()


def run(steps: Steps[T]) -> T:
    """What the computation returns, when every call is answered at once."""
    try:
        next(answered(steps))
    except StopIteration as stop:
        value: T = stop.value
        return value
    raise AssertionError("steps yield calls, and all were answered")


@dataclass(frozen=True)
class Rows:
    """What a forward returns for its nodes: -1 stands for the root, the last committed token."""

    nodes: tuple[int, ...]
    logits: Tensor  # [len(nodes), V]
    hidden: Tensor | None = None  # [len(nodes), W]


def chunk_end(start: int) -> int:
    """Where the prefill chunk that begins at `start` ends: at a place that depends on nothing else.

    So the keys and values of a prompt up to such a place are, bit for bit, those of every prompt that begins alike.
    """
    for size in (PREFILL_CHUNK // 4, PREFILL_CHUNK // 2):
        if start < size:
            return size
    return (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK


def _block(num_pending: int, parents: tuple[int, ...], first: int) -> tuple[Tensor, Tensor]:
    """Which of the pending tokens and nodes each new row sees, bool `[M, B]`, and their places behind the prefix `[B]`.

    B = pending + N; the rows are the pending tokens and the nodes from `first` on.
    """
    n = len(parents)
    block = torch.zeros(num_pending + n, num_pending + n, dtype=torch.bool)
    block[:num_pending, :num_pending] = torch.ones(num_pending, num_pending, dtype=torch.bool).tril()
    block[num_pending:, :num_pending] = True
    block[num_pending:, num_pending:] = structure(parents).ancestors_NN
    offsets = torch.tensor([*range(num_pending), *(num_pending - 1 + depth for depth in structure(parents).depths)])
    return torch.cat((block[:num_pending], block[num_pending + first :])), offsets.long()


_small_block = lru_cache(maxsize=2048)(_block)


def _make_block(num_pending: int, parents: tuple[int, ...], first: int) -> tuple[Tensor, Tensor]:
    make = _small_block if num_pending + len(parents) <= _SMALL_BLOCK else _block
    return make(num_pending, parents, first)


class Session:
    """`append` tokens, `forward` a tree, `commit` a path, `rewind` to a length, `fork` a prefilled prompt.

    `hidden`: hidden states that every step returns, see `Step`; `features` keeps them, unless `keeps` is off. `salt`:
    what the keys and values depend on besides model and tokens, for reuse by prompts that begin alike. A model that
    reads inputs besides tokens gets them with the tokens that are appended, and with the nodes of a tree.
    """

    def __init__(self, backend: Backend, hidden: Sequence[int] = (), salt: Hashable = None, keeps: bool = True):
        self.backend = backend
        self.hidden, self.salt = tuple(hidden), salt
        self.features = FeatureStore() if self.hidden and keeps else None
        self._inputs: Tensor | None = None  # of the tokens from `_inputs_from` on
        self._inputs_from = 0
        self.tokens = History()
        self.num_cached = 0  # leading tokens whose keys and values stand in the cache
        self.tree = TokenTree.empty()  # nodes computed since the last commit
        self.num_reused = 0  # leading tokens whose keys and values came from another prompt

    @property
    def context(self) -> int:
        return self.backend.capabilities.context

    @property
    def chains(self) -> bool:
        """Whether `chaining` takes less than step by step."""
        return self.backend.capabilities.chains

    def append(self, tokens: Sequence[int], inputs_MW: Tensor | None = None) -> None:
        """Add committed tokens; they are computed by the next forward, and nothing before them is computed again."""
        if not tokens:
            return
        if inputs_MW is not None:
            self._add_inputs(inputs_MW)
        self.tree = TokenTree.empty()
        self.tokens.extend(tokens)

    def _add_inputs(self, inputs_MW: Tensor) -> None:
        """Of tokens that are appended now. Those of the last computed token stay: it may be computed again."""
        keep = max(self._inputs_from, min(self.num_cached, len(self.tokens) - 1)) if self._inputs is not None else 0
        if self._inputs is None or keep >= len(self.tokens):
            self._inputs, self._inputs_from = inputs_MW, len(self.tokens)
        else:
            kept = self._inputs[keep - self._inputs_from : len(self.tokens) - self._inputs_from]
            self._inputs, self._inputs_from = torch.cat((kept, inputs_MW)), keep

    def _inputs_of(self, start: int, end: int) -> Tensor | None:
        if self._inputs is None:
            return None
        if start < self._inputs_from:
            raise InputError("a token is to be computed again whose inputs are gone; append it again, with its inputs")
        return self._inputs[start - self._inputs_from : end - self._inputs_from]

    def prefill(self) -> None:
        """Compute every pending token but the last, in chunks."""
        run(self.prefilling())

    def prefilling(self) -> Steps[None]:
        """`prefill`, asking for its steps."""
        while len(self.tokens) - 1 > self.num_cached:
            end = min(chunk_end(self.num_cached), len(self.tokens) - 1)
            step = self._step(self.tokens[self.num_cached : end], TokenTree.empty(), 1)
            yield from self._running(step)
            self.num_cached = end

    def _running(self, step: Step) -> Steps[StepResult]:
        result = yield Call(self.backend, step)
        assert isinstance(result, StepResult)
        if self.features is not None:
            assert result.hidden_MW is not None
            self.features.write(step.start, result.hidden_MW)
        return result

    def forward(self, tree: TokenTree | None = None, inputs_MW: Tensor | None = None) -> Rows:
        """Logits of the root (when it is still pending) and of the nodes that are new since the last forward.

        A tree that is longer than the last one must start with the same nodes: this is how a drafter grows one.
        `inputs_MW`: of the new nodes, for a model that reads inputs.
        """
        return run(self.forwarding(tree, inputs_MW))

    def forwarding(self, tree: TokenTree | None = None, inputs_MW: Tensor | None = None) -> Steps[Rows]:
        """`forward`, asking for its steps: one, and those of a prefill before it when much is pending."""
        tree = tree if tree is not None else TokenTree.empty()
        if not self.tokens:
            raise InputError("a session needs at least one token before it can predict the next")
        if len(self.tokens) - self.num_cached > PREFILL_CHUNK:
            yield from self.prefilling()
        first = len(self.tree)
        if tree.parents[:first] != self.tree.parents:
            raise InputError("forward(tree): the tree does not extend the one that was computed; drop_tree() first")
        pending = self.tokens[self.num_cached :]
        nodes = ((-1,) if pending else ()) + tuple(range(first, len(tree)))
        if not nodes:
            raise InputError("forward(tree): nothing is new; every row was returned before")
        step = self._step(pending, tree, len(nodes), inputs_MW)
        result = yield from self._running(step)
        self.num_cached = len(self.tokens)
        self.tree = tree
        return Rows(nodes, result.logits, None if result.hidden_MW is None else result.hidden_MW[-len(nodes) :])

    def chaining(self, count: int, rule: Rule, noise_KV: Tensor | None = None) -> Steps[Drafted]:
        """Draft a chain of `count` tokens in one call. All its nodes but the last are computed then."""
        if self.hidden or self.num_cached >= len(self.tokens):
            raise InputError("a chain in one call begins from a root that is pending, and gives no hidden states")
        if len(self.tokens) - self.num_cached > PREFILL_CHUNK:
            yield from self.prefilling()
        step = self._step(self.tokens[self.num_cached :], TokenTree.empty(), 1)
        drafted = yield Call(self.backend, step, Chain(count, rule, noise_KV))
        assert isinstance(drafted, Drafted)
        self.num_cached, self.tree = len(self.tokens), TokenTree.chain(drafted.tokens_K[:-1])
        return drafted

    def _step(self, pending: Sequence[int], tree: TokenTree, num_logits: int, inputs_MW: Tensor | None = None) -> Step:
        """Of the pending tokens and the nodes that were not computed yet. Nothing here grows with the text."""
        first, prefix = len(self.tree), self.num_cached
        block, offsets = _make_block(len(pending), tree.parents, first)
        tokens = torch.tensor(pending, dtype=torch.int64)
        if len(tree) > first:
            new = tree.tokens[first:] if first else tree.tokens
            tokens = torch.cat((to_device(tokens, new.device), new)) if pending else new
        start = prefix + (0 if pending else first)
        inputs = [self._inputs_of(prefix, prefix + len(pending)) if pending else None, inputs_MW]
        given = [rows for rows in inputs if rows is not None]
        joined = torch.cat(given) if len(given) > 1 else given[0] if given else None
        return Step(tokens, prefix, block, offsets + prefix, start, num_logits, self.hidden, joined)

    def _alone(self, token: int | Tensor, slot: int) -> Tensor:
        """Logits `[V]` of one row over the slots before its own: the step of plain decoding."""
        block, offsets = _make_block(1, (), 0)
        row = torch.as_tensor(token, dtype=torch.int64).reshape(1)
        return self.backend.forward(Step(row, slot, block, offsets + slot, slot, 1)).logits[0]

    def replay(self, first: int, path: Sequence[int]) -> Generator[Tensor, None, None]:
        """Logits `[V]` of the root, then of each node of a computed `path`, computed again one row at a time.

        Before the root, the committed tokens from `first` on are computed again too. When the keys and values before
        `first` are those of plain decoding, so is everything here, bit for bit. Other nodes may be overwritten: close
        the iterator, then `commit` this path, a beginning of it, or one that begins with it.
        """
        base = len(self.tokens)
        for slot in range(first, base - 1):
            self._alone(self.tokens[slot], slot)
        yield self._alone(self.tokens[-1], base - 1)
        done = 0
        try:
            for node in path:
                # A path node's own slot never lies before base + depth - 1, so no later node of the path is lost.
                logits = self._alone(self.tree.tokens[node], base + done)
                done += 1
                yield logits
        finally:
            for depth in reversed(range(done)):  # back to where `commit` looks for them, the deepest first
                if path[depth] != depth:
                    self.backend.gather([base + depth], base + path[depth])

    def commit(self, path: Sequence[int], tokens: Sequence[int]) -> None:
        """Accept `path` (nodes from the root down) and append `tokens`: the path's, then those that follow.

        Keys and values of computed nodes are kept; a path node that was never computed here is pending, no more.
        """
        computed = [node for node in path if node < len(self.tree)]
        base = len(self.tokens)
        if self.num_cached == base:  # else the nodes were never computed
            slots = [base + node for node in computed]
            self.backend.gather(slots, base)
            if self.features is not None:
                self.features.gather(slots, base)
            self.num_cached += len(computed)
        self.tokens.extend(tokens)
        self.tree = TokenTree.empty()

    def drop_tree(self) -> None:
        """Forget the nodes behind the committed tokens; the next forward starts at the root again."""
        self.tree = TokenTree.empty()
        self.num_cached = max(0, min(self.num_cached, len(self.tokens) - 1))

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens. O(1): an index moves."""
        if not 0 <= length <= len(self.tokens):
            raise InputError(f"cannot rewind to {length}: the session holds {len(self.tokens)} tokens")
        self.tokens.truncate(length)
        self.drop_tree()

    def adopt(self, backend: Backend, length: int, features: FeatureStore | None = None) -> None:
        """Take over a backend of the same family that holds the first `length` tokens, and their hidden states.

        Nothing is computed yet.
        """
        if self.num_cached or length >= len(self.tokens) or backend.family is not self.backend.family:
            raise InputError("adopt: a session that computed nothing takes fewer tokens than it has, of its own model")
        self.backend, self.num_cached, self.num_reused = backend, length, length
        if self.features is not None:
            assert features is not None
            self.features = features

    def fork(self) -> Session:
        """An independent session with the same committed tokens and a copy of their keys and values."""
        twin = Session(self.backend.fork(self.num_cached), self.hidden, self.salt, self.features is not None)
        twin.tokens = History(self.tokens)
        twin.num_cached = self.num_cached
        twin._inputs, twin._inputs_from = self._inputs, self._inputs_from
        if self.features is not None:
            twin.features = self.features.fork(self.num_cached)
        return twin

    @property
    def num_bytes(self) -> int:
        """Of keys, values and kept hidden states."""
        return self.backend.num_bytes + (self.features.num_bytes if self.features is not None else 0)
