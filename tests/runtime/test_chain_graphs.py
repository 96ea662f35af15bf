"""Drafts that are captured whole: the same tokens, samples, keys and values as step by step, and when they are used.

On the twin of the kernels in plain torch, where nothing is captured but everything else is as on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter
from torch.utils._python_dispatch import TorchDispatchMode

import specdec
from specdec.chance import CounterChance
from specdec.draws import NextToken
from specdec.errors import BackendWarning
from specdec.policy import Fixed
from specdec.proposal import Draw
from specdec.runtime import chain_graphs
from specdec.runtime.backend import Step
from specdec.runtime.backends.cuda import WIDTHS, CudaBackend
from specdec.runtime.chain import Chain, Drafted, step_by_step
from specdec.runtime.chain_graphs import AFTER
from specdec.runtime.session import Session
from specdec.sampling import Sampling

VOCAB = 64
CPU = torch.device("cpu")
IDS = torch.arange(0, VOCAB, 2)
SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01)
RULES = {
    "top": NextToken(Sampling(), Draw.POINT, VOCAB),
    "top of samples": NextToken(SAMPLED, Draw.POINT, VOCAB),
    "shared": NextToken(SAMPLED, Draw.SHARED, VOCAB),
    "sampled": NextToken(SAMPLED, Draw.SAMPLED, VOCAB),
    "a larger vocabulary": NextToken(SAMPLED, Draw.SAMPLED, VOCAB + 8),
}


def opened(**options: Any) -> CudaBackend:
    return CudaBackend.open(tiny_models.tiny(attention="eager", **options), kernels="twin")


def prefilled(backend: CudaBackend, lengths: Sequence[int], pending: Sequence[int]) -> list[Session]:
    sessions = [Session(backend.fork(0)) for _ in lengths]
    for n, (one, length, late) in enumerate(zip(sessions, lengths, pending, strict=True)):
        one.append([(7 * i + n) % VOCAB for i in range(length)])
        one.prefill()
        one.append([(3 * i + n) % VOCAB for i in range(late - 1)])
    return sessions


def asked(
    sessions: Sequence[Session], counts: Sequence[int], rule: NextToken, device: torch.device = CPU
) -> tuple[list[Step], list[Chain]]:
    chances = [CounterChance(5 + n) for n in range(len(sessions))]
    chains = [
        Chain(count, rule, rule.noise(chance, len(one.tokens), count, device) if rule.is_noisy else None)
        for one, count, chance in zip(sessions, counts, chances, strict=True)
    ]
    return [
        next(one.chaining(c.count, c.rule, c.noise_KV)).step for one, c in zip(sessions, chains, strict=True)
    ], chains


def same(mine: Drafted, other: Drafted) -> bool:
    if (mine.q_KV is None) != (other.q_KV is None) or not torch.equal(mine.tokens_K, other.tokens_K):
        return False
    return mine.q_KV is None or other.q_KV is None or torch.equal(mine.q_KV, other.q_KV)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("lengths", "pending", "counts"),
    [((9,), (1,), (5,)), ((9,), (2,), (1,)), ((9, 30, 21), (2, 1, 3), (2, 5, 4)), ((500, 3), (1, 1), (3, 3))],
    ids=["one", "a single step", "three texts", "long and short"],
)
def test_a_whole_draft_has_the_bits_of_its_steps(
    name: str, lengths: tuple[int, ...], pending: tuple[int, ...], counts: tuple[int, ...]
) -> None:
    rule, backend = RULES[name], opened(dtype=torch.bfloat16, max_position_embeddings=600, hidden_size=64)
    stepped, whole = (prefilled(backend, lengths, pending) for _ in range(2))
    steps, chains = asked(stepped, counts, rule)
    want = step_by_step(CudaBackend.forward_many, [one.backend for one in stepped], steps, chains)
    backends = [one.backend for one in whole]
    for again in range(AFTER + 1):  # the last ones run on the same buffers
        drafted = CudaBackend.draft_many(backends, *asked(whole, counts, rule))  # type: ignore[arg-type]
        assert len(backend._shared.chains.programs) == (again + 1 >= AFTER)
        assert all(map(same, drafted, want))
    assert len({tuple(one.tokens_K.tolist()) for one in drafted}) == len(lengths)  # no text reads another's row
    for one, other, step, chain in zip(stepped, whole, steps, chains, strict=True):
        written = step.end + chain.count - 1
        for mine, its in zip(one.backend._slots._planes(), other.backend._slots._planes(), strict=True):  # type: ignore[attr-defined]
            assert torch.equal(mine[:, :written], its[:, :written])


def test_tokens_of_a_draft_vocabulary_are_named() -> None:
    """A head cut to every second token: the chain reads the target's ids, and knows no other token."""
    model = tiny_models.tiny(attention="eager")
    drafter = ModelDrafter(model, "eager", vocabulary=IDS)
    cut = drafter._backend.model  # type: ignore[attr-defined]
    backend = CudaBackend.open(cut, kernels="twin")
    for draw in (Draw.POINT, Draw.SHARED):
        rule = NextToken(SAMPLED, draw, VOCAB, drafter._ids_R)
        (mine,), (other,) = prefilled(backend, [9], [1]), prefilled(backend, [9], [1])
        steps, chains = asked([mine], [4], rule)
        (want,) = step_by_step(CudaBackend.forward_many, [mine.backend], steps, chains)
        for _ in range(AFTER):
            (got,) = CudaBackend.draft_many([other.backend], *asked([other], [4], rule))  # type: ignore[list-item]
        assert torch.equal(got.tokens_K, want.tokens_K)
        assert drafter.vocabulary is not None
        assert set(got.tokens_K.tolist()) <= set(drafter.vocabulary.ids_R.tolist())


def test_graphs_are_for_what_is_asked_often_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = opened()
    (one,) = prefilled(backend, [9], [1])
    programs = backend._shared.chains.programs

    def ask(count: int, temperature: float, seed: int, times: int) -> None:
        rule = NextToken(Sampling(temperature=temperature, seed=seed).unseeded, Draw.SHARED, VOCAB)
        for _ in range(times):
            CudaBackend.draft_many([one.backend], *asked([one], [count], rule))  # type: ignore[list-item]

    ask(3, 0.8, 0, AFTER - 1)
    assert not programs
    ask(3, 0.8, 1, 1)  # another seed is another text, and no other work
    assert [key.count for key in programs] == [3]
    monkeypatch.setattr(chain_graphs, "MOST", 2)
    ask(4, 0.8, 0, AFTER)
    ask(3, 0.8, 0, 1)
    ask(3, 0.7, 0, AFTER)
    assert [(key.count, key.rule.sampling.temperature) for key in programs] == [(3, 0.8), (3, 0.7)]  # type: ignore[attr-defined]
    monkeypatch.setattr(chain_graphs, "MOST_NOISE", 5 * VOCAB - 1)
    ask(5, 0.8, 0, AFTER)  # its buffers would be too large
    assert {key.count for key in programs} == {3}
    monkeypatch.setattr(chain_graphs, "MOST_NOISE", 5 * VOCAB)
    ask(5, 0.8, 0, AFTER)
    assert {key.count for key in programs} == {3, 5}
    backend.expose([1])  # steps now return more
    assert not programs
    ask(3, 0.7, 0, 1)


class _NotCapturable(TorchDispatchMode):
    """Operators that a CUDA graph cannot record: the host reads a number, or makes a tensor from its own numbers.

    (A single number that is written into a slice is a fill on a GPU, and a tensor on a CPU alone.)
    """

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.names or (name == "lift_fresh" and args[0].ndim):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", RULES)
def test_what_is_captured_needs_no_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of a draft nothing waits. (The twins of the kernels look up addresses: they are left out.)"""
    backend = opened()
    (one,) = prefilled(backend, [9], [1])
    for _ in range(AFTER):
        CudaBackend.draft_many([one.backend], *asked([one], [4], RULES[name]))  # type: ignore[list-item]
    (program,) = backend._shared.chains.programs.values()
    monkeypatch.setattr(backend._shared, "call", lambda plan, width, inputs, rows=None: (torch.zeros(1, VOCAB),))
    with _NotCapturable() as mode, torch.inference_mode():
        program.call()
    assert not mode.seen
    with _NotCapturable() as mode:  # the control
        torch.zeros(3)[torch.tensor([1, 2])]
        torch.zeros(3)[torch.tensor(1)]
    assert mode.seen == ["aten.lift_fresh.default", "aten._local_scalar_dense.default"]


def decoder(policy: Fixed, **options: Any) -> tuple[Any, CudaBackend]:
    target = tiny_models.tiny(attention="eager", dtype=torch.float64)
    drafter = ModelDrafter(tiny_models.noisy(target, 0.02))
    drafter._backend = CudaBackend.open(drafter.model, kernels="twin")
    made = specdec.SpeculativeDecoder(target, drafter=drafter, policy=policy, backend="eager", **options)
    made.backend = CudaBackend.open(target, kernels="twin")
    return made, drafter._backend


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_asks_the_draft_once(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both pending widths, after a rejection and after full acceptance, come to be captured; then no step is run."""
    made, draft = decoder(Fixed(3))
    options: dict[str, Any] = dict(max_new_tokens=40, temperature=temperature, seed=3)
    plain, fast = made.generate_plain([3, 5, 7, 3], **options), made.generate([3, 5, 7, 3], **options)
    assert fast.tokens == plain.tokens
    assert 0 < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens
    whole = {(key.width, key.count) for key in draft._shared.chains.programs}
    assert {(1, 3), (2, 3)} <= whole
    assert all(key.width in WIDTHS for key in draft._shared.chains.programs)
    steps: list[int] = []
    forward_many = CudaBackend.forward_many.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, backends: Any, given: Any) -> Any:
        if backends[0].family is draft.family:
            steps.append(given[0].num_rows)
        return forward_many(cls, backends, given)

    monkeypatch.setattr(CudaBackend, "forward_many", classmethod(counted))
    again = made.generate([3, 5, 7, 3], **options)
    assert again.tokens == fast.tokens
    # The prompt, and the last draft, which is cut to what room is left.
    assert len(steps) <= 1 + 2


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("verifier", ["greedy", "coupled", "block"])
def test_texts_of_a_batch_are_those_they_are_alone(verifier: str, temperature: float) -> None:
    if verifier == "greedy" and temperature:
        pytest.skip("greedy decides at temperature 0")
    made, draft = decoder(Fixed(3), verifier=verifier)
    prompts = [[(5 * i + n) % VOCAB for i in range(4 + 3 * n)] for n in range(3)]
    options: dict[str, Any] = dict(max_new_tokens=24, temperature=temperature, seed=3)
    together = made.generate(prompts, **options)
    assert any(key.num_rows > 1 for key in draft._shared.chains.programs)
    assert [one.tokens for one in together] == [made.generate(prompt, **options).tokens for prompt in prompts]


def test_plans_that_look_at_the_text_go_step_by_step() -> None:
    """Penalties read the prefix, and a draft that stops at a doubt does not know its length."""
    made, draft = decoder(Fixed(3))
    options: dict[str, Any] = dict(max_new_tokens=30, temperature=0.8, seed=3, repetition_penalty=1.2)
    assert made.generate([3, 5, 7, 3], **options).tokens == made.generate_plain([3, 5, 7, 3], **options).tokens
    assert not draft._shared.chains.programs


def test_what_cannot_be_captured_runs_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning with the cause, and the same text."""

    def refused(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    made, draft = decoder(Fixed(3))
    monkeypatch.setattr(chain_graphs.ChainProgram, "capture", refused)
    plain = made.generate_plain([3, 5, 7, 3], max_new_tokens=40)
    with pytest.warns(BackendWarning, match="step by step: operation not permitted when stream is capturing$") as told:
        assert made.generate([3, 5, 7, 3], max_new_tokens=40).tokens == plain.tokens
    assert len(told) == 1
    assert not draft._shared.chains.programs


@pytest.mark.gpu
@pytest.mark.parametrize("name", RULES)
def test_on_a_gpu_a_captured_draft_has_the_tokens_of_its_steps(name: str) -> None:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("needs a CUDA device and triton")
    device = torch.device("cuda")
    backend = CudaBackend.open(tiny_models.tiny(attention="eager", dtype=torch.bfloat16, hidden_size=64).to(device))
    stepped, whole = (prefilled(backend, [9, 30], [1, 2]) for _ in range(2))
    steps, chains = asked(stepped, [5, 3], RULES[name], device)
    want = step_by_step(CudaBackend.forward_many, [one.backend for one in stepped], steps, chains)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        for _ in range(AFTER + 1):
            drafted = CudaBackend.draft_many([one.backend for one in whole], *asked(whole, [5, 3], RULES[name], device))  # type: ignore[misc]
    (program,) = backend._shared.chains.programs.values()
    assert program.graph is not None
    assert all(map(same, drafted, want))
