"""The cuda backend, on its twin kernels in plain torch where there is no GPU, and on the device under `-m gpu`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter

import specdec
from specdec.errors import BackendWarning, InputError, UnsupportedModelError
from specdec.policy import Fixed
from specdec.runtime import choose
from specdec.runtime.backends import cuda
from specdec.runtime.backends.cuda import CudaBackend
from specdec.runtime.chain_graphs import AFTER
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session
from specdec.tree import TokenTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
TREE = TokenTree.of([9, 8, 7, 6, 5, 4], [-1, -1, 0, 1, 1, 4])
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)


def opened(model: Any) -> CudaBackend:
    return CudaBackend.open(model, kernels="triton" if next(model.parameters()).is_cuda else "twin")


def tiny(name: str = "llama", **options: Any) -> Any:
    return tiny_models.tiny(name, attention="eager", **options)


# Torch's float32 functions on the CPU give a row's last numbers other bits than the first where rows are no multiple of
# a vector; a GPU has no such ends.
EVEN: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 64, "intermediate_size": 96},
    "gemma2": {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32},
    "gpt2": {"n_embd": 64},
}


def session(backend: CudaBackend, tokens: list[int]) -> Session:
    made = Session(backend.fork(0), (1,) if backend._shared.native.hidden else ())
    made.append(tokens)
    return made


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_gives_the_rows_of_the_stock_step(name: str) -> None:
    model = tiny(name)
    prompt = [(7 * i + 3) % 64 for i in range(150)]
    mine, stock = Session(opened(model)), tiny_models.session(model, prompt)
    mine.append(prompt)
    for tokens in ([9, 8, 7, 6, 5, 4], [4, 5, 6, 7, 8, 9]):
        tree = TokenTree.of(tokens, TREE.parents)
        mine_rows, stock_rows = mine.forward(tree), stock.forward(tree)
        assert mine_rows.nodes == stock_rows.nodes
        assert torch.allclose(mine_rows.logits, stock_rows.logits, atol=2e-5)
        for one in (mine, stock):
            one.commit([1, 4, 5], [tokens[1], tokens[4], tokens[5], 11])  # not the leftmost path: slots move
    assert mine.tokens == stock.tokens


def test_the_backend_runs_on_the_interpreted_kernels() -> None:
    if torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("for a machine with triton and without a GPU")
    model = tiny(num_hidden_layers=1)
    mine, stock = Session(CudaBackend.open(model, kernels="triton")), tiny_models.session(model, PROMPT)
    mine.append(PROMPT)
    assert torch.allclose(mine.forward(TREE).logits, stock.forward(TREE).logits, atol=2e-5)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_row_has_the_same_bits_at_every_width(name: str, dtype: torch.dtype) -> None:
    backend = opened(tiny(name, dtype=dtype, **EVEN[name]))
    assert backend.numerics == "invariant"
    tokens = torch.randint(0, 64, (67,), generator=torch.Generator().manual_seed(1)).tolist()

    def rows(width: int) -> torch.Tensor:
        text = session(backend, tokens[:1])
        made = []
        for at in range(1, len(tokens), width):
            part = tokens[at : at + width]
            made.append(text.forward(TokenTree.chain(part)).logits[-len(part) :])
            text.commit(range(len(part)), part)
        return torch.cat(made)

    alone = rows(1)
    for width in (3, 8, 17, 64, 66):
        assert torch.equal(rows(width), alone), width


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_branch_has_the_bits_of_its_chain(dtype: torch.dtype) -> None:
    backend = opened(tiny("gemma2", dtype=dtype))
    text = session(backend, PROMPT)
    text.forward(TokenTree.of(TREE.tokens[:2].tolist(), TREE.parents[:2]))  # grown in two steps
    rows = text.forward(TREE)
    assert rows.nodes == (2, 3, 4, 5)
    for node in rows.nodes:
        alone = session(backend, [*PROMPT, *TREE.tokens[list(TREE.path(node))].tolist()])
        alone.prefill()
        assert torch.equal(alone.forward().logits[-1], rows.logits[rows.nodes.index(node)])


@pytest.mark.parametrize("sizes", [(1, 3, 5), (1, 30, 70)], ids=["one graph", "no graph"])
def test_sequences_of_one_call_have_the_bits_that_they_have_alone(sizes: tuple[int, ...]) -> None:
    backend = opened(tiny(dtype=torch.bfloat16))
    backend.expose([1])
    texts = [[(7 * i + n) % 64 for i in range(size)] for n, size in enumerate(sizes)]
    alone = [session(backend, tokens).forward(TREE) for tokens in texts]
    together = [session(backend, tokens) for tokens in texts]
    steps = [next(one.forwarding(TREE)).step for one in together]
    results = CudaBackend.forward_many([one.backend for one in together], steps)  # type: ignore[misc]
    for one, other in zip(alone, results, strict=True):
        assert torch.equal(one.logits, other.logits)
        assert torch.equal(one.hidden, other.hidden_MW[-len(one.nodes) :])  # type: ignore[index]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (3, 2))], ids=["chain", "tree"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_speculative_texts_and_logprobs_are_the_plain_ones(
    dtype: torch.dtype, policy: Fixed, temperature: float
) -> None:
    target = tiny(dtype=dtype)
    draft = tiny_models.noisy(target, 0.02)
    drafter = ModelDrafter(draft)
    drafter._backend = opened(draft)
    decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=policy, backend="eager")
    decoder.backend = opened(target)
    options: dict[str, Any] = dict(max_new_tokens=40, temperature=temperature, seed=3, logprobs=True)
    plain, fast = decoder.generate_plain(PROMPT, **options), decoder.generate(PROMPT, **options)
    assert 0 < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens
    assert fast.tokens == plain.tokens
    assert fast.logprobs == plain.logprobs
    if dtype == torch.float64:
        assert plain.tokens == tiny_models.reference(target, PROMPT, 40, temperature=temperature, seed=3)


def test_forks_and_rewinds_are_independent() -> None:
    backend = opened(tiny())
    text = session(backend, PROMPT)
    text.prefill()
    twin = text.fork()
    fresh = text.forward(TREE).logits
    text.commit([1, 4], [8, 5, 2])
    assert torch.equal(twin.forward(TREE).logits, fresh)
    text.rewind(len(PROMPT))
    assert torch.equal(text.forward(TREE).logits, fresh)
    assert twin.backend.family is text.backend.family
    assert twin.backend.num_bytes == text.backend.num_bytes == backend.bytes_for(len(PROMPT) + len(TREE))


def test_a_model_may_work_on_the_slots_of_another() -> None:
    model = tiny()
    whole, other = opened(model), opened(tiny_models.noisy(model, 0.1))
    text = session(whole, PROMPT)
    want = text.fork().forward(TREE).logits
    shared = Session(other.on_slots_of(text.backend))
    shared.append(PROMPT)
    text.prefill()
    wrote = text.backend._slots._memory.clone()  # type: ignore[attr-defined]
    shared.prefill()
    assert not torch.equal(text.backend._slots._memory, wrote)  # type: ignore[attr-defined]
    text.rewind(0)
    text.append(PROMPT)
    assert torch.equal(text.forward(TREE).logits, want)
    with pytest.raises(InputError, match="slots of another"):
        other.on_slots_of(tiny_models.session(model).backend)


def test_a_text_that_outgrows_its_capacity_goes_on() -> None:
    model = tiny()
    text, stock = session(opened(model), PROMPT), tiny_models.session(model, PROMPT)
    for one in (text, stock):
        one.prefill()
        one.append([(5 * i) % 64 for i in range(200)])
    assert torch.allclose(text.forward().logits, stock.forward().logits, atol=2e-5)


def test_long_tails_run_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree that is deeper than captured graphs know: the same rows, from a plan of its own width."""
    backend = opened(tiny())
    want = session(backend, PROMPT).forward(TREE).logits
    monkeypatch.setattr(cuda, "_TAIL", 1)
    backend._shared.programs.clear()
    assert torch.equal(session(backend, PROMPT).forward(TREE).logits, want)
    assert not backend._shared.programs


def test_programs_are_few_and_made_once() -> None:
    backend = opened(tiny())
    backend.warmup()
    warm = dict(backend._shared.programs)
    text = session(backend, PROMPT)
    for width in (1, 3, 6, 2, 13, 5):
        text.forward(TokenTree.chain(list(range(width))))
        text.commit([], [1])
    assert backend._shared.programs == warm
    assert {key.width for key in warm} == {1, 2, 4, 8, 16}


def test_a_step_goes_to_the_device_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its rows need: tokens, positions, slots and what they see."""
    backend = opened(tiny())
    text = session(backend, PROMPT)
    text.forward(TREE)
    made: list[torch.Tensor] = []
    written = cuda.write_plan

    def counted(*args: Any) -> torch.Tensor:
        made.append(written(*args))
        return made[-1]

    monkeypatch.setattr(cuda, "write_plan", counted)
    text.commit([1, 4], [8, 5, 2])
    text.forward(TREE)
    program = next(p for key, p in backend._shared.programs.items() if key.width == 8)
    assert len(made) == 1
    assert torch.equal(program.plan, made[0])


def test_the_users_model_stays_as_it_was() -> None:
    model = tiny(dtype=torch.float32)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    pointers = {p.data_ptr() for p in model.parameters()}
    backend = opened(model)
    assert before == {name: (id(module), type(module)) for name, module in model.named_modules()}
    assert model.config._attn_implementation == "eager"
    assert {p.data_ptr() for p in backend._shared.native.parameters()} == pointers


def test_stock_products_are_told() -> None:
    backend = opened(tiny("mixtral"))
    assert backend.numerics == "fast"
    assert "MixtralExperts" in backend.describes


def test_what_cannot_run_is_refused_with_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with pytest.raises(InputError, match="one of"):
        CudaBackend.open(model, kernels="cublas")
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedModelError, match="triton is not installed"):
        CudaBackend.open(model)
    monkeypatch.setattr(cuda.TwinKernels, "attend", lambda self, q, *rest: q.transpose(1, 2) * 0.0)
    with pytest.raises(UnsupportedModelError, match="differs from the stock step"):
        CudaBackend.open(model, kernels="twin")


def test_blocks_with_gaps_are_refused() -> None:
    backend = opened(tiny())
    step = next(session(backend, PROMPT).forwarding(TREE)).step
    gap = torch.zeros_like(step.block_MB)
    gap[:, -1] = True
    with pytest.raises(InputError, match="neighbouring positions"):
        backend.forward(type(step)(step.tokens, step.prefix, gap, step.block_positions_B, step.start, 1))


class OnCuda(torch.nn.Module):
    """Says that its weights are on a CUDA device, for the choice of a backend."""

    class _Parameter:
        device = torch.device("cuda")

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self._Parameter()])


def test_a_model_on_a_gpu_gets_this_backend_or_a_warning_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def find(kind: str, name: str) -> Any:
        asked.append(name)

        class Kind:
            numerics = "fast"

            @staticmethod
            def open(model: Any, **options: Any) -> str:
                if name == "cuda":
                    raise UnsupportedModelError("triton is not installed; use backend='eager'")
                return name

        return Kind

    monkeypatch.setattr(choose.registry, "find", find)
    with pytest.warns(BackendWarning, match="eager backend is used: triton is not installed"):
        assert open_backend(OnCuda()) == "eager"
    assert asked == ["cuda", "eager"]
    with pytest.raises(InputError, match="cannot be had here: triton is not installed"):
        open_backend(OnCuda(), numerics="invariant")


def test_without_a_gpu_the_default_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_NATIVE", "0")
    assert not isinstance(open_backend(tiny()), CudaBackend)
    with pytest.raises(UnsupportedModelError, match=r"not on a CUDA device|triton is not installed"):
        open_backend(tiny(), "cuda")


@pytest.fixture
def on_gpu() -> torch.device:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("needs a CUDA device and triton")
    return torch.device("cuda")


def wide(dtype: torch.dtype, device: torch.device) -> Any:
    return tiny("llama", dtype=dtype, hidden_size=256, intermediate_size=512, vocab_size=1000).to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_on_a_gpu_rows_have_the_same_bits_at_every_width(on_gpu: torch.device, dtype: torch.dtype) -> None:
    backend = open_backend(wide(dtype, on_gpu))
    assert isinstance(backend, CudaBackend)
    assert backend.numerics == "invariant"
    tokens = torch.randint(0, 1000, (130,), generator=torch.Generator().manual_seed(1)).tolist()

    def rows(width: int) -> torch.Tensor:
        text = session(backend, tokens[:1])
        made = []
        for at in range(1, len(tokens), width):
            part = tokens[at : at + width]
            made.append(text.forward(TokenTree.chain(part)).logits[-len(part) :])
            text.commit(range(len(part)), part)
        return torch.cat(made)

    alone = rows(1)
    for width in (2, 3, 5, 8, 16, 17, 33, 64, 100):
        assert torch.equal(rows(width), alone), width


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (3, 2))], ids=["chain", "tree"])
def test_on_a_gpu_speculative_texts_are_the_plain_ones(on_gpu: torch.device, policy: Fixed, temperature: float) -> None:
    target = wide(torch.bfloat16, on_gpu)
    decoder = specdec.SpeculativeDecoder(
        target, drafter=ModelDrafter(tiny_models.noisy(target, 0.01)), policy=policy, numerics="invariant"
    )
    options: dict[str, Any] = dict(max_new_tokens=60, temperature=temperature, seed=3, logprobs=True)
    plain, fast = decoder.generate_plain(PROMPT, **options), decoder.generate(PROMPT, **options)
    assert fast.tokens == plain.tokens
    assert fast.logprobs == plain.logprobs


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_on_a_gpu_a_round_waits_once(on_gpu: torch.device, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hidden wait of the host raises; the verdict is read where this test allows it, once a round."""
    target = wide(torch.bfloat16, on_gpu)
    decoder = specdec.SpeculativeDecoder(target, drafter=ModelDrafter(tiny_models.noisy(target, 0.01)), policy=Fixed(4))
    options: dict[str, Any] = dict(max_new_tokens=40, temperature=temperature, seed=3)
    for _ in range(AFTER):
        decoder.generate(PROMPT, **options)  # captures
    read = torch.Tensor.tolist
    reads = 0

    def tolist(self: torch.Tensor) -> Any:
        nonlocal reads
        if not self.is_cuda:
            return read(self)
        reads += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(self)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = decoder.generate(PROMPT, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads == out.stats.num_rounds
