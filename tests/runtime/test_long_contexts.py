"""Long contexts: 32k tokens decode, and the host's work in a round does not grow with the text."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec.drafters import NgramDrafter, SuffixDrafter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import RepetitionPenaltyLogitsProcessor

import specdec
from specdec.decoder import decode
from specdec.history import History
from specdec.policy import Fixed
from specdec.runtime.backend import Backend, Capabilities, Step, StepResult
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.session import Call, Session
from specdec.sampling import Sampling
from specdec.tree import TokenTree

LONG = 32_000
VOCAB = 64


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# A text of 32k tokens.


@pytest.fixture(scope="module")
def long_model() -> Any:
    return tiny_models.tiny(
        "llama", dtype=torch.float32, hidden_size=16, num_hidden_layers=1, max_position_embeddings=LONG + 768
    )


def test_a_text_behind_32k_tokens(long_model: Any) -> None:
    """Chunked prefill, a draft that agrees now and then, and the last rows against one forward over everything."""
    prompt = ids(LONG)
    made = specdec.SpeculativeDecoder(
        long_model, drafter=tiny_models.noisy(long_model, 0.02), policy=Fixed(3), prefix_cache=1 << 30
    )
    out = made.generate(prompt, max_new_tokens=24, strict=True)
    assert len(out.tokens) == 24
    assert out.stats.num_accepted_draft_tokens > 0
    with torch.inference_mode():
        everything = long_model(
            input_ids=torch.tensor([prompt + out.tokens]), use_cache=False, logits_to_keep=25
        ).logits[0]
    assert everything[:-1].argmax(-1).tolist() == out.tokens
    again = made.generate_plain([*prompt, *out.tokens[:4]], max_new_tokens=6)
    assert again.tokens == out.tokens[4:10]
    assert again.stats.num_reused_tokens == LONG // 512 * 512


# What a round costs the host.


class Flat(Backend):
    """Answers every step at once, each row by its token alone: all that is left is the host's work."""

    def __init__(self, table: torch.Tensor):
        self.table, self.steps = table, []
        self._capabilities = Capabilities(VOCAB, 1 << 20, torch.device("cpu"), torch.float32)

    @classmethod
    def open(cls, model: Any, **options: Any) -> Flat:
        return cls(model)

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    def forward(self, step: Step) -> StepResult:
        assert set(vars(step)) == {
            "tokens", "prefix", "block_MB", "block_positions_B", "start", "num_logits", "hidden", "inputs_MW",
        }  # fmt: skip  # nobody made a dense mask
        return StepResult(self.table[step.tokens[-step.num_logits :]])

    def gather(self, slots: Sequence[int], start: int) -> None:
        return None

    def fork(self, length: int) -> Flat:
        return Flat(self.table).join_family(self)

    @property
    def num_bytes(self) -> int:
        return 0


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        view = any(a.alias_info is not None and not a.alias_info.is_write for a in function._schema.arguments)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not view:
                self.count += tensor.numel()
        return out


class Lines:
    """Counts the Python lines that run in this package, a comprehension's turns among them."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Lines:
        def trace(frame: Any, event: str, arg: Any) -> Any:
            if "specdec" not in frame.f_globals.get("__name__", ""):
                return None
            self.count += event == "line"
            return trace

        self._before = sys.gettrace()
        sys.settrace(trace)
        return self

    def __exit__(self, *args: object) -> None:
        sys.settrace(self._before)


class Watched(History):
    """Counts the tokens that anyone reads."""

    read = 0

    def __getitem__(self, index: Any) -> Any:
        got = super().__getitem__(index)
        Watched.read += len(got) if isinstance(index, slice) else 1
        return got

    def __iter__(self) -> Any:
        Watched.read += len(self)
        return super().__iter__()


def decoder_of(drafter: Any, policy: Any) -> specdec.SpeculativeDecoder:
    """A decoder on the flat backend, made without a model."""
    made = specdec.SpeculativeDecoder(
        tiny_models.tiny("llama"), drafter=drafter, policy=policy, backend="eager", prefix_cache=0
    )
    made.backend = Flat(torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)))
    return made


def work(length: int, drafter: Any, policy: Any, **options: Any) -> Counter[str]:
    """Of ten rounds behind `length` tokens: elements of tensors, lines of Python, tokens read."""
    task = decoder_of(drafter, policy).prepare(ids(length, 3), max_new_tokens=400, **options)
    task.target.tokens = Watched()
    loop = decode(task)
    answer, rounds, counted = None, 0, Counter[str]()
    while rounds < 30:
        before = Watched.read
        with Elements() as elements, Lines() as lines:
            event = loop.send(answer)
        if rounds >= 20:
            counted.update(elements=elements.count, lines=lines.count, tokens=Watched.read - before)
        answer = event.backend.forward(event.step) if isinstance(event, Call) else None
        rounds += answer is None
    return counted


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.9, "top_p": 0.9}, {"temperature": 0.7, "repetition_penalty": 1.2}],
    ids=["greedy", "sampled", "penalised"],
)
@pytest.mark.parametrize("drafter", [NgramDrafter, SuffixDrafter, None], ids=["ngram", "suffix", "none"])
def test_a_round_costs_the_host_the_same_behind_any_text(drafter: Any, options: dict[str, Any]) -> None:
    drafter = drafter() if drafter else None
    short = work(1_000, drafter, Fixed(3), **options)
    long = work(30_000, drafter, Fixed(3), **options)
    for what in ("elements", "lines", "tokens"):
        assert long[what] <= 1.5 * short[what] + 100, (what, short, long)
    # One look at the whole text in each of the rounds would be 300,000.
    assert max(long.values()) < 100_000


def test_the_counters_see_work_that_grows() -> None:
    tokens = Watched(range(5_000))
    with Elements() as elements, Lines() as lines:
        torch.tensor(list(tokens))
        Sampling(repetition_penalty=1.2).probabilities(torch.zeros(1, 8), [1] * 5_000, TokenTree.empty())
    assert elements.count >= 5_000
    assert Watched.read >= 5_000
    assert lines.count > 5


def test_growing_a_tree_makes_no_tensor_of_the_texts_length() -> None:
    sizes = {}
    for length in (200, 201, 3_000):  # the first one makes the blocks that all share
        session = Session(Flat(torch.zeros(VOCAB, VOCAB)))
        session.append(ids(length))
        session.prefill()
        tree = TokenTree.empty()
        with Elements() as elements:
            for depth in range(5):
                session.forward(tree)
                tree = tree.extend(torch.tensor([depth]), [depth - 1])
            session.commit((0, 1), [0, 1, 7])
            session.forward(TokenTree.chain([1, 2]))
        sizes[length] = elements.count
    assert sizes[201] == sizes[3_000] < 2_000


def test_steps_of_one_shape_share_their_block() -> None:
    blocks = []

    class Watch(Flat):
        def forward(self, step: Step) -> StepResult:
            blocks.append(step.block_MB)
            return super().forward(step)

    session = Session(Watch(torch.zeros(VOCAB, VOCAB)))
    session.append([1, 2, 3])
    for _ in range(4):
        session.forward(TokenTree.chain([4, 5, 6]))
        session.commit((0,), [4, 9])
    assert len({block.data_ptr() for block in blocks[1:]}) == 1


# Tokens with what samplers ask of them.


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    life=st.lists(
        st.tuples(st.sampled_from(["extend", "truncate", "ask", "follow"]), st.lists(st.integers(0, 9), max_size=6)),
        max_size=20,
    )
)
def test_a_history_is_a_list_with_up_to_date_answers(life: list) -> None:
    history, plain = History(), []
    for what, tokens in life:
        if what == "extend":
            history.extend(tokens)
            plain.extend(tokens)
        elif what == "truncate":
            length = min(len(tokens), len(plain))
            history.truncate(length)
            del plain[length:]
        elif what == "ask":
            for size in (10, 12):
                seen = history.seen(size, torch.device("cpu"))
                assert seen.nonzero()[:, 0].tolist() == sorted(set(plain))
        else:
            assert history.followed_by(torch.tensor(tokens, dtype=torch.int64)).tolist() == plain + tokens
        assert history == plain


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_is_the_one_of_transformers(penalty: float) -> None:
    generator = torch.Generator().manual_seed(5)
    tree = TokenTree.of([3, 60, 5, 3, 9], [-1, -1, 0, 0, 2])
    prefix = ids(40)
    logits = torch.randn(6, VOCAB, generator=generator)
    logits[2, 7] = -torch.inf
    expected = logits.clone()
    for row, node in enumerate(range(-1, 5)):
        before = torch.tensor([[*prefix, *tree.tokens[list(tree.path(node))].tolist()]])
        expected[row] = RepetitionPenaltyLogitsProcessor(penalty)(before, expected[row][None])[0]
    for given_prefix in (prefix, History(prefix)):
        got = Sampling(repetition_penalty=penalty).scores(logits, given_prefix, tree, range(-1, 5))
        assert torch.equal(got, expected)


def test_the_eager_backend_still_gets_its_dense_mask() -> None:
    seen: list[Step] = []

    class Watch(EagerBackend):
        def forward(self, step: Step) -> StepResult:
            seen.append(step)
            return super().forward(step)

    session = Session(Watch.open(tiny_models.tiny("llama")))
    session.append([1, 2, 3, 4])
    session.forward(TokenTree.of([5, 6, 7], [-1, -1, 0]))
    step = seen[-1]
    assert step.mask_MC.shape == (7, 7)
    assert step.key_positions_C.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert step.positions.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert step.mask_MC[6].tolist() == [True, True, True, True, True, False, True]
    session.commit((1,), [6, 8])
    session.forward(TokenTree.chain([9]))
    step = seen[-1]
    assert (step.prefix, step.start, step.end) == (5, 5, 7)
    assert step.mask_MC.tolist() == [[True] * 6 + [False], [True] * 7]
    assert step.key_positions_C.tolist() == list(range(7))
