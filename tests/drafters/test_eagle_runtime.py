"""EAGLE heads on the runtime: both backends, graphs, batches, prompts that begin alike, and the test at loading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import specdec.drafters.eagle as module
import tiny_eagle
import tiny_models
import torch
from specdec.drafters import EagleDrafter

import specdec
from specdec.bench.bare import forwards
from specdec.drafter import BuildContext
from specdec.formats import eagle as files
from specdec.kernels import ops
from specdec.models.eagle import OWN, EagleConfig, EagleModel
from specdec.policy import Fixed
from specdec.runtime.backends.compiled import CompiledBackend
from specdec.runtime.choose import open_backend
from specdec.runtime.session import Session
from specdec.tree import TokenTree
from specdec.tree_policy import DynamicTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
VERSIONS = {
    "eagle-1": {"eagle_version": 1, "target_layer_ids": [2], "own_head": False, "fc_bias": True},
    "eagle-3": {"draft_vocab_size": 48, "norm_output": True, "fc_norm": True},
    "eagle-3-deep": {"num_hidden_layers": 2, "layer_kind": "qwen3", "layer_types": ["full_attention"] * 2},
    "eagle-3-sliding": {"layer_types": ["sliding_attention"], "sliding_window": 4},
}
needs_kernels = pytest.mark.skipif(not ops.available(), reason="no native kernels here")


@pytest.fixture(scope="module")
def target() -> Any:
    return tiny_models.tiny("llama")


def ran(backend: Any) -> list[torch.Tensor]:
    """Logits and own features of a prompt, then of a tree behind it, then of what comes after a part was accepted."""
    torch.manual_seed(5)
    inputs = torch.randn(20, 16, dtype=torch.float64)
    backend.expose((OWN,))
    session = Session(backend.fork(0), hidden=(OWN,))
    session.append(PROMPT, inputs[:8])
    session.prefill()
    rows = [session.forward()]
    tree = TokenTree.of([1, 2, 4, 9], parents=[-1, -1, 0, 2])
    rows.append(session.forward(tree, inputs[8:12]))
    session.append([1, 4], inputs[12:14])
    rows.append(session.forward())
    return [part for row in rows for part in (row.logits, row.hidden) if part is not None]


@needs_kernels
@pytest.mark.parametrize("version", VERSIONS)
def test_the_native_kernels_say_what_the_stock_step_says(version: str, target: Any) -> None:
    head = tiny_eagle.head(target, **VERSIONS[version])
    stock = ran(open_backend(head, "eager"))
    native = ran(CompiledBackend.open(head, compile="never"))
    for mine, theirs in zip(native, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)  # stock norms and softmax have float32 parts


@needs_kernels
def test_the_head_shares_the_targets_tables_and_leaves_them_alone(target: Any) -> None:
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    head = tiny_eagle.head(target, eagle_version=1, target_layer_ids=[2], own_head=False)
    assert head.embed_tokens.weight is target.get_input_embeddings().weight
    assert head.lm_head.weight is target.get_output_embeddings().weight
    specdec.SpeculativeDecoder(target, drafter=EagleDrafter(head), policy=Fixed(3)).generate(PROMPT, max_new_tokens=9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_warmup_compiles_the_head(version: str, target: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    head = tiny_eagle.head(target, **VERSIONS[version])
    backend = CompiledBackend.open(head, compile="never")
    before = ran(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.warmup()
    assert "graph" in backend.describes
    for compiled, python in zip(ran(backend), before, strict=True):
        torch.testing.assert_close(compiled, python, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def learned(target: Any) -> EagleModel:
    return tiny_eagle.fitted(target, PROMPT + tiny_models.reference(target, PROMPT, 40))


@pytest.mark.parametrize("policy", [Fixed(3), DynamicTree(6, 3, 3)], ids=lambda policy: policy.name)
def test_rows_of_a_batch_are_drafted_as_they_are_alone(policy: Any, target: Any, learned: EagleModel) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=EagleDrafter(learned), policy=policy)
    prompts = [PROMPT, [9], [1, 2, 3], PROMPT[:5]]
    batch = decoder.batch(max_rows=3, max_new_tokens=20)
    tickets = [batch.submit(prompt, seed=1, temperature=t) for prompt in prompts for t in (0.0, 1.0)]
    while batch.running or batch.waiting:
        batch.step()
    for ticket, (prompt, t) in zip(tickets, [(p, t) for p in prompts for t in (0.0, 1.0)], strict=True):
        alone = decoder.generate(prompt, max_new_tokens=20, seed=1, temperature=t, strict=True)
        assert (
            ticket.result().tokens == alone.tokens == tiny_models.reference(target, prompt, 20, seed=1, temperature=t)
        )
        assert [r.num_accepted for r in ticket.result().trace.rounds] == [r.num_accepted for r in alone.trace.rounds]


def test_a_prompt_that_differs_in_its_first_token_only_reuses_nothing_of_the_head(target: Any) -> None:
    """That token is in none of the head's rows, but in every state of the target that they read."""
    head = tiny_eagle.head(target, draft_vocab_size=48)
    common = [(7 * i) % 60 for i in range(150)]

    def proposals(decoder: Any, prompt: list[int]) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        grow = module.grow

        def spying(expand: Any, *rest: Any) -> Any:
            def recorded(tree: Any) -> Any:
                logits = yield from expand(tree)
                seen.append(logits.clone())
                return logits

            return grow(recorded, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "grow", spying)
            out = decoder.generate(prompt, max_new_tokens=6, strict=True)
        reused.append(out.stats.num_reused_tokens)
        return seen

    reused: list[int] = []
    kept = specdec.SpeculativeDecoder(target, drafter=EagleDrafter(head), policy=Fixed(2))
    fresh = specdec.SpeculativeDecoder(target, drafter=EagleDrafter(head), policy=Fixed(2), prefix_cache=0)
    proposals(kept, [1, *common])
    for first in (2, 1):
        for a, b in zip(proposals(kept, [first, *common]), proposals(fresh, [first, *common]), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert reused[1] == 0
    assert reused[3] > 0  # the same prompt again: the comparison above was of reused rows


def test_a_text_longer_than_the_heads_context_goes_on_without_it(target: Any) -> None:
    head = tiny_eagle.head(target, max_position_embeddings=16)
    for policy in (Fixed(3), DynamicTree(6, 3, 3)):
        decoder = specdec.SpeculativeDecoder(target, drafter=EagleDrafter(head), policy=policy)
        out = decoder.generate(PROMPT, max_new_tokens=30, strict=True)
        assert out.tokens == tiny_models.reference(target, PROMPT, 30)
        assert out.trace.rounds[0].num_nodes > 0
        assert out.trace.rounds[-1].num_nodes == 0
        long = decoder.generate(PROMPT * 3, max_new_tokens=6, strict=True)
        assert long.tokens == tiny_models.reference(target, PROMPT * 3, 6)


def test_the_memory_of_a_text_is_known_beforehand(target: Any) -> None:
    drafter = EagleDrafter(tiny_eagle.head(target))
    decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=Fixed(3), memory_budget=1 << 24)
    assert decoder.generate(PROMPT, max_new_tokens=8, strict=True).tokens == tiny_models.reference(target, PROMPT, 8)
    assert drafter.bytes_for(100) == drafter.bytes_for(128) > 128 * 2 * 2 * 8 * 8 - 1
    assert "draft" in {kind for kind, _ in forwards(decoder, PROMPT, [1, 2])[0]}
    calls, _ = forwards(decoder, PROMPT, [1])
    calls["draft", 1]()


def test_padded_ids_that_the_head_does_not_know(target: Any) -> None:
    shape = tiny_eagle.config(target, vocab_size=60, draft_vocab_size=40, own_embeddings=True)
    drafter = EagleDrafter(tiny_eagle.build(shape, tiny_eagle.tensors(shape), target))
    prompt = [61, 63, 5, 62]
    for temperature in (0.0, 1.0):
        decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=Fixed(3))
        out = decoder.generate(prompt, max_new_tokens=15, temperature=temperature, strict=True)
        assert out.tokens == tiny_models.reference(target, prompt, 15, temperature=temperature)


class Words:
    """Enough of a tokenizer for the test at loading: the target's own greedy text, whatever is asked for."""

    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.tokens}


@pytest.fixture(scope="module")
def layered() -> tuple[Any, Any, EagleConfig]:
    """A target, the text that a head learned, and the head."""
    target = tiny_models.tiny("llama", num_hidden_layers=4)
    text = PROMPT + tiny_models.reference(target, PROMPT, 90, temperature=1.0)
    return target, text, tiny_eagle.fitted(target, text, steps=250, target_layer_ids=[1, 2, 3], draft_vocab_size=64)


def test_loading_tells_when_the_other_convention_accepts_better(layered: Any, tmp_path: Path) -> None:
    target, text, head = layered
    files.write_own(tmp_path, head, torch.float64)
    context = BuildContext(target, tokenizer=Words(text), source=str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = EagleDrafter.build(context)
        EagleDrafter.build(context, hidden_convention="output", self_test=False)
    shares = module.warn_if_misread(right.head, target, Words(text))
    assert shares["input"] > shares["output"] + 0.2
    numbers = rf"target's at {shares['output']:.0%} of 97 positions, and at {shares['input']:.0%} with 'input'"
    with pytest.warns(UserWarning, match=rf"hidden_convention='output' reads.*{numbers}"):
        wrong = EagleDrafter.build(context, hidden_convention="output")
    assert (right.hidden, wrong.hidden) == ((1, 2, 3), (2, 3, 4))


def test_the_share_of_the_test_is_the_acceptance_of_one_token(layered: Any) -> None:
    target, text, head = layered
    same = module.agreement(head, target, text)["input"]
    drafter = EagleDrafter(head)
    decoder = specdec.SpeculativeDecoder(target, drafter=drafter, policy=Fixed(1))
    for at in (10, 23, 40):
        first = decoder.generate(text[:at], max_new_tokens=2, strict=True).trace.rounds[0]
        assert first.num_accepted == int(same[at - 2])
