"""The compiled backend: the same bits for a row in any company, counters of a round, and what happens when it fails."""

from __future__ import annotations

import gc
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.errors import BackendWarning, InputError, UnsupportedModelError
from specdec.kernels import ops
from specdec.kernels.build import cache_folder
from specdec.policy import Fixed
from specdec.runtime import graph
from specdec.runtime.backends import compiled
from specdec.runtime.backends.compiled import CompiledBackend
from specdec.runtime.choose import fastest_dtype, open_backend
from specdec.runtime.session import Session
from specdec.runtime.worker import Worker
from specdec.tree import TokenTree

pytestmark = pytest.mark.skipif(not ops.available(), reason=f"no native kernels: {ops.why_not()}")
PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


def llama(dtype: torch.dtype, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Graphs of this module's models, compiled here: what an earlier run left must not stand in for it."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("graphs")
    patch.setattr(graph, "folder", lambda: folder)
    yield folder
    patch.undo()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def with_graph(request: pytest.FixtureRequest, cache: Path) -> CompiledBackend:
    backend = CompiledBackend.open(llama(request.param), compile="now")
    assert "one compiled graph" in backend.describes
    return backend


def rows(backend: CompiledBackend, tokens: list[int], width: int) -> torch.Tensor:
    """Logits after every token but the first, computed `width` tokens at a time."""
    session = Session(backend.fork(0))
    session.append(tokens[:1])
    made = []
    for at in range(1, len(tokens), width):
        part = tokens[at : at + width]
        made.append(session.forward(TokenTree.chain(part)).logits[-len(part) :])
        session.commit(range(len(part)), part)
    return torch.cat(made)


@pytest.mark.parametrize("width", [2, 3, 5, 8, 17, 64])
def test_a_row_has_the_same_bits_at_every_width(with_graph: CompiledBackend, width: int) -> None:
    tokens = torch.randint(0, 131, (130,), generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(rows(with_graph, tokens, 1), rows(with_graph, tokens, width))


def test_a_branch_has_the_bits_of_its_chain(with_graph: CompiledBackend) -> None:
    session = Session(with_graph.fork(0))
    session.append(PROMPT)
    tree = TokenTree.of([9, 8, 7, 6, 5, 4], [-1, -1, 0, 1, 1, 4])
    wide = session.forward(tree).logits
    for node in range(len(tree)):
        alone = Session(with_graph.fork(0))
        alone.append([*PROMPT, *tree.tokens[list(tree.path(node))].tolist()])
        alone.prefill()
        assert torch.equal(alone.forward().logits[-1], wide[node + 1]), node


def test_sequences_of_one_call_have_the_bits_that_they_have_alone(with_graph: CompiledBackend) -> None:
    sessions, steps, alone = [], [], []
    for number in range(3):
        tokens = [(7 * i + number) % 131 for i in range(5 + 9 * number)]
        single = Session(with_graph.fork(0))
        single.append(tokens)
        alone.append(single.forward(TokenTree.chain([1, 2, 3][:number])).logits)
        session = Session(with_graph.fork(0))
        session.append(tokens)
        sessions.append(session)
        steps.append(next(session.forwarding(TokenTree.chain([1, 2, 3][:number]))).step)
    together = CompiledBackend.forward_many([s.backend for s in sessions], steps)  # type: ignore[misc]
    assert all(torch.equal(a, b.logits) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (3, 2))], ids=["chain", "tree"])
def test_speculative_logprobs_are_bit_for_bit_the_plain_ones(cache: Path, policy: Fixed, temperature: float) -> None:
    target = llama(torch.bfloat16)
    draft = tiny_models.noisy(target, 0.02)
    decoder = specdec.SpeculativeDecoder(
        target, drafter=ModelDrafter(draft), policy=policy, backend="compiled", numerics="invariant"
    )
    options: dict[str, Any] = dict(max_new_tokens=60, temperature=temperature, seed=3, logprobs=True)
    plain, fast = decoder.generate_plain(PROMPT, **options), decoder.generate(PROMPT, **options)
    assert 0 < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens
    assert fast.tokens == plain.tokens
    assert fast.logprobs == plain.logprobs


def test_stock_products_do_not_have_this_property() -> None:
    """The control: what the kernels are for."""
    x, w = torch.randn(8, 768), torch.randn(2048, 768)
    stock = torch.nn.functional.linear
    one_by_one = torch.cat([stock(row[None], w) for row in x])
    assert not torch.equal(one_by_one, stock(x, w))
    assert torch.equal(torch.cat([ops.linear(row[None], w) for row in x]), ops.linear(x, w))


def test_graph_and_python_agree_with_the_stock_model(cache: Path) -> None:
    model = llama(torch.float64)
    tokens = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    stock = tiny_models.session(model, tokens).forward().logits
    python = tiny_models.session(model, tokens, "compiled").forward().logits
    assert torch.allclose(stock, python, atol=1e-9)


@pytest.mark.parametrize("public", [False, True], ids=["own loader", "torch's wrapper"])
def test_a_graph_that_is_there_is_loaded_by_whatever_this_torch_has(
    cache: Path, monkeypatch: pytest.MonkeyPatch, public: bool
) -> None:
    """Without a process of its own: torch's wrapper asks the system's compiler what CPU this is."""
    model = llama(torch.float32)
    CompiledBackend.open(model, compile="now")

    def refuse(*_: object, **__: object) -> None:
        raise TypeError("other arguments" if public else "no compiler is needed here")

    if public:
        wrapped = torch._inductor.aoti_load_package
        real = torch._C._aoti.AOTIModelPackageLoader

        def load(path: str) -> Any:
            monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", real)
            return wrapped(path)

        monkeypatch.setattr(torch._C._aoti, "AOTIModelPackageLoader", refuse)
        monkeypatch.setattr(torch._inductor, "aoti_load_package", load)
    else:
        monkeypatch.setattr(torch._inductor, "aoti_load_package", refuse)
        monkeypatch.setattr(subprocess, "Popen", refuse)
    assert "one compiled graph" in CompiledBackend.open(model).describes


def test_the_users_model_stays_as_it_was() -> None:
    model = llama(torch.float32)
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    pointers = [p.data_ptr() for p in model.parameters()]
    backend = CompiledBackend.open(model, compile="never")
    assert before == {name: (id(module), type(module)) for name, module in model.named_modules()}
    assert model.config._attn_implementation == "sdpa"
    assert {p.data_ptr() for p in backend._shared.native.parameters()} == set(pointers)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts every way in which Python reads a tensor's values: each would wait for a device."""
    counts: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
            original = getattr(torch.Tensor, name)

            def counted(self: torch.Tensor, *args: Any, _f: Any = original, _n: str = name, **kwargs: Any) -> Any:
                counts[_n] += 1
                return _f(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        yield counts


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_one_synchronisation_per_round(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    target = llama(torch.float32)
    decoder = specdec.SpeculativeDecoder(
        target, drafter=ModelDrafter(tiny_models.noisy(target, 0.02)), policy=Fixed(4), prefix_cache=0
    )
    stream = decoder.stream(PROMPT, max_new_tokens=80, temperature=temperature)
    next(stream)
    with counting(monkeypatch) as counts:
        taken = sum(1 for _ in stream)
    assert taken > 10
    assert sum(counts.values()) == taken, counts


def test_no_compilation_and_no_reallocation_after_warm_up(
    with_graph: CompiledBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(graph, "compile", never)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", never)
    frames = torch._dynamo.utils.counters["frames"].copy()
    for length in range(1, 21):
        session = Session(with_graph.fork(0))
        session.append([(3 * i) % 131 for i in range(length * 5)])
        session.prefill()
        session.forward()
        pointer, capacity = session.backend._slots.keys(0).data_ptr(), session.backend._capacity  # type: ignore[attr-defined]
        while len(session.tokens) + 5 < capacity:
            session.forward(TokenTree.chain([1, 2, 3, 4]))
            session.commit((0, 1), [1, 2, 9])
            assert session.backend._slots.keys(0).data_ptr() == pointer  # type: ignore[attr-defined]
        assert session.backend._capacity == capacity  # type: ignore[attr-defined]
    assert torch._dynamo.utils.counters["frames"] == frames


def test_memory_is_flat_over_500_prompts() -> None:
    target = llama(torch.float32, layers=1)
    decoder = specdec.SpeculativeDecoder(
        target, drafter=ModelDrafter(tiny_models.noisy(target, 0.02)), policy=Fixed(3), prefix_cache=0
    )

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("this system does not tell a process's memory")
    for number in range(100):
        decoder.generate([1 + number % 100, 5, 9], max_new_tokens=8)
    before = resident()
    for number in range(500):
        decoder.generate([1 + number % 100, 5, 9], max_new_tokens=8)
    # One leaked cache would be 96 KiB a text, 47 MiB in all.
    assert resident() - before < 12 << 20


def test_a_failed_compilation_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no room on the device\nmore")

    monkeypatch.setattr(graph, "compile", fail)
    monkeypatch.setattr(graph, "find", lambda model: None)
    backend = CompiledBackend.open(llama(torch.float32))
    with pytest.warns(BackendWarning, match="could not be compiled .RuntimeError: no room on the device"):
        backend.warmup()
    assert "own Python" in backend.describes
    decoder = specdec.SpeculativeDecoder(llama(torch.float32), backend="compiled")
    assert len(decoder.generate(PROMPT, max_new_tokens=5).tokens) == 5


def test_a_graph_is_made_in_the_background_once_that_pays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(torch.float32, layers=1, seed=5)
    monkeypatch.setattr(compiled, "SECONDS_BEFORE", 0.0)
    started: list[Worker] = []

    class Inside(Worker):
        """The same order, carried out in this process, which has the folder of this module."""

        def __init__(self, model: Any):
            started.append(self)
            graph.compile(model, ops.steps().handle())

        finished, failure = True, None  # type: ignore[assignment]

    monkeypatch.setattr(compiled, "Worker", Inside)
    decoder = specdec.SpeculativeDecoder(model, backend="compiled")
    texts = [decoder.generate(PROMPT, max_new_tokens=12).tokens for _ in range(3)]
    assert len(started) == 1
    assert "one compiled graph" in decoder.backend.describes
    assert texts[0] == texts[1] == texts[2]


def test_the_worker_compiles_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "folder", lambda: cache_folder() / "graphs")  # another process knows no other
    model = llama(torch.bfloat16, layers=1)
    model.config.rms_norm_eps = 1.2345e-5  # a shape of its own: the worker keeps what it makes among the user's graphs
    backend = CompiledBackend.open(model, compile="never")
    kept = graph.folder() / f"{graph.fingerprint(backend._shared.native)}.pt2"
    kept.unlink(missing_ok=True)
    worker = Worker(backend._shared.native)
    worker.wait()
    try:
        assert worker.failure is None
        found = graph.find(backend._shared.native)
        assert found is not None
        backend._shared.take(found)
        python = rows(CompiledBackend.open(model, compile="never"), PROMPT, 3)
        assert (rows(backend, PROMPT, 3) - python).abs().max() < 0.05 * python.abs().max()
    finally:
        kept.unlink(missing_ok=True)


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedModelError, match="float16"):
        CompiledBackend.open(llama(torch.float16))
    with pytest.raises(InputError, match="compile= one of"):
        CompiledBackend.open(llama(torch.float32), compile="sometimes")
    with pytest.raises(InputError, match="numerics must be one of"):
        open_backend(llama(torch.float32), numerics="exact")
    with pytest.raises(InputError, match="cannot be had from the eager backend"):
        open_backend(llama(torch.float32), "eager", "invariant")
    monkeypatch.setattr(compiled, "unsupported", lambda model: "the moon is full")
    with pytest.warns(BackendWarning, match="the moon is full"):
        backend = open_backend(llama(torch.float32))
    assert backend.describes == "the stock model"


def test_a_model_that_the_kernels_get_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.runtime import native

    right = native.ops.attend
    monkeypatch.setattr(native.ops, "attend", lambda q, k, v, *rest: right(q, k, v * 1.1, *rest))
    with pytest.raises(UnsupportedModelError, match="differs from the stock step"):
        CompiledBackend.open(llama(torch.float32))


def test_the_faster_dtype_is_measured() -> None:
    dtype, why = fastest_dtype(torch.bfloat16, "cpu")
    assert str(dtype).removeprefix("torch.") in why
    assert "as fast as" in why
    assert fastest_dtype(torch.float32, "cpu") == (torch.float32, "float32: the checkpoint's own")


def test_a_head_that_was_untied_has_a_graph_of_its_own() -> None:
    model = tiny_models.tiny("llama", dtype=torch.float32, tie_word_embeddings=True)
    tied = graph.fingerprint(CompiledBackend.open(model, compile="never")._shared.native)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    assert graph.fingerprint(CompiledBackend.open(model, compile="never")._shared.native) != tied


@pytest.mark.parametrize("drafter", ["early_exit", "self_quant"])
def test_parts_and_copies_of_a_tied_model_have_graphs_of_their_own(
    drafter: str, cache: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What a graph is kept under tells a tied head from an untied one, of whatever stands in the model's place too."""
    target = tiny_models.tiny("llama-tied").float()
    made = specdec.SpeculativeDecoder(target, drafter=drafter, backend="compiled", policy=Fixed(2))
    out = made.generate(PROMPT, max_new_tokens=6, strict=True)
    assert out.tokens == made.generate_plain(PROMPT, max_new_tokens=6).tokens
    assert [str(w.message) for w in recwarn if w.category is BackendWarning] == []
    found = made.backend
    parts = [found.lower, found.upper] if drafter == "early_exit" else [found._draft]
    assert len({graph.path_of(part._shared.native) for part in parts}) == len(parts)
