"""Targets that draft for themselves on their own slots: batches, reuse, failures, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import EarlyExitDrafter, NoDrafter, SelfQuantDrafter
from specdec.verifiers import Coupled

import specdec
from specdec.drafter import Drafter
from specdec.errors import DrafterWarning, IncompatiblePairError, InputError
from specdec.kernels import ops
from specdec.policy import Fixed, Policy
from specdec.runtime.backends.eager import EagerBackend
from specdec.runtime.session import Session
from specdec.tree_policy import DynamicTree, StaticTree

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]
DRAFTERS = [EarlyExitDrafter, SelfQuantDrafter]
POLICIES: list[Policy] = [Fixed(4), StaticTree((-1, -1, 0, 0, 1, 2, 2, 5)), DynamicTree(budget=8, k=4, width=3)]


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return tiny_models.tiny("gemma2", attention="eager")  # sliding and full layers, scaled embeddings, capped logits


def decoder(target: Any, drafter: Drafter, **options: Any) -> specdec.SpeculativeDecoder:
    return specdec.SpeculativeDecoder(target, drafter=drafter, **{"policy": Fixed(4), "backend": "eager", **options})


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_every_architecture_keeps_its_text(name: str, kind: type) -> None:
    model = tiny_models.tiny(name, attention="eager" if name == "gemma2" else "sdpa")
    made = decoder(model, kind())
    accepted = 0
    for temperature in (0.0, 1.0):
        expected = tiny_models.reference(model, PROMPT, 24, temperature=temperature, seed=3)
        options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
        assert made.generate_plain(PROMPT, **options).tokens == expected
        for policy in POLICIES:
            out = made.generate(PROMPT, policy=policy, strict=True, **options)
            assert out.tokens == expected
            accepted += out.stats.num_accepted_draft_tokens
    assert accepted > 0


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_ragged_batches_give_each_text_what_it_gets_alone(target: Any, kind: type, policy: Policy) -> None:
    prompts = [[9], PROMPT, [1, 2, 3], [4] * 11]
    made = decoder(target, kind(), policy=policy)
    together = made.generate(prompts, max_new_tokens=14, temperature=0.8, seed=[5, 6, 7, 8], strict=True)
    for prompt, seed, out in zip(prompts, (5, 6, 7, 8), together, strict=True):
        assert out.tokens == tiny_models.reference(target, prompt, 14, temperature=0.8, seed=seed)
    assert sum(out.stats.num_accepted_draft_tokens for out in together) > 0


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_failed_step_of_a_batch_is_made_again_text_by_text(
    target: Any, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it fails above the layers that were drafted with, after their keys and values were moved."""
    stock, calls = EagerBackend.forward_many.__func__, []

    def failing(cls: Any, backends: Any, steps: Any) -> Any:
        calls.append(len(steps))
        if len(steps) > 1 and len(calls) % 3 == 0:
            raise RuntimeError("now and then")
        return stock(cls, backends, steps)

    monkeypatch.setattr(EagerBackend, "forward_many", classmethod(failing))
    prompts = [PROMPT, [1, 2, 3]]
    made = decoder(target, kind(), policy=POLICIES[1])
    for prompt, out in zip(prompts, made.generate(prompts, max_new_tokens=14, strict=True), strict=True):
        assert out.tokens == tiny_models.reference(target, prompt, 14)
    assert len(calls) >= 6


@pytest.mark.parametrize("kind", DRAFTERS)
def test_prompts_that_begin_alike_are_reused(target: Any, kind: type) -> None:
    made = decoder(target, kind())
    beginning = [(7 * i) % 61 for i in range(140)]
    made.generate(beginning, max_new_tokens=2)
    prompt = [*beginning, 3, 4]
    out = made.generate(prompt, max_new_tokens=20, strict=True)
    assert out.stats.num_reused_tokens == 128
    assert out.tokens == tiny_models.reference(target, prompt, 20)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_proposal_that_is_refused_after_it_was_drafted_leaves_nothing(
    target: Any, kind: type, policy: Policy
) -> None:
    class Refuses(Coupled):
        seen = 0

        def check_proposal(self, proposal: Any) -> None:
            self.seen += 1
            if self.seen == 3:
                raise ValueError("no more")

    made = decoder(target, kind(), policy=policy)
    with pytest.warns(DrafterWarning, match="no more"):
        out = made.generate(PROMPT, max_new_tokens=24, verifier=Refuses())
    assert out.tokens == tiny_models.reference(target, PROMPT, 24)
    assert out.stats.drafter_error is not None
    assert [r.num_nodes > 0 for r in out.trace.rounds[:4]] == [True, True, False, False]


@pytest.mark.parametrize("kind", DRAFTERS)
def test_drafts_need_no_memory_of_their_own(target: Any, kind: type) -> None:
    made = decoder(target, kind(), memory_budget=10_000_000)
    task = made.prepare(PROMPT, max_new_tokens=24)
    plain = decoder(target, NoDrafter(), memory_budget=10_000_000).prepare(PROMPT, max_new_tokens=24)
    made.generate(PROMPT, max_new_tokens=24, strict=True)
    assert made.drafter.bytes_for(100) == 0
    assert made.backend.bytes_for(100) == decoder(target, NoDrafter()).backend.bytes_for(100)
    assert task.num_bytes == plain.num_bytes


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_target_stays_as_it_was(target: Any, kind: type) -> None:
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in target.state_dict().items()}
    layers, config = list(target.model.layers), target.config.to_dict()
    decoder(target, kind()).generate(PROMPT, max_new_tokens=8, strict=True)
    assert all(a is b for a, b in zip(layers, target.model.layers, strict=True))
    assert target.config.to_dict() == config
    for name, tensor in target.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])


@pytest.mark.parametrize("kind", DRAFTERS)
def test_it_is_given_to_the_decoder_not_to_a_text(target: Any, kind: type) -> None:
    with pytest.raises(IncompatiblePairError, match="give it to the decoder"):
        decoder(target, NoDrafter()).generate(PROMPT, drafter=kind())
    made = decoder(target, kind())
    assert made.generate(PROMPT, max_new_tokens=8, drafter=kind(), strict=True).stats.num_draft_tokens > 0
    with pytest.raises(IncompatiblePairError, match="a decoder of its own"):
        made.generate(PROMPT, drafter=SelfQuantDrafter() if kind is EarlyExitDrafter else EarlyExitDrafter())


def test_slots_are_shared_by_models_of_one_depth_on_one_kind_of_backend(target: Any) -> None:
    other = EagerBackend.open(tiny_models.tiny("llama"))
    with pytest.raises(InputError, match="slots of another model"):
        other.on_slots_of(EagerBackend.open(target))


@pytest.mark.skipif(not ops.available(), reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_on_native_kernels_texts_are_those_of_plain_decoding_bit_for_bit(kind: type, dtype: torch.dtype) -> None:
    model = tiny_models.tiny("qwen3", dtype=dtype)
    made = decoder(model, kind(), backend="compiled")
    whole = decoder(model, NoDrafter(), backend="compiled")
    assert made.backend.numerics == "invariant"
    sessions = [Session(each.backend.fork(0)) for each in (made, whole)]
    for session in sessions:
        session.append(PROMPT)
    assert torch.equal(sessions[0].forward().logits, sessions[1].forward().logits)
    for temperature in (0.0, 1.0):
        options = {"max_new_tokens": 30, "temperature": temperature, "seed": 2}
        expected = whole.generate_plain(PROMPT, **options).tokens
        for policy in POLICIES:
            assert made.generate(PROMPT, policy=policy, strict=True, **options).tokens == expected
    outs = made.generate([PROMPT, [1, 2]], max_new_tokens=20, policy=POLICIES[1], strict=True)
    assert [out.tokens for out in outs] == [whole.generate_plain(p, max_new_tokens=20).tokens for p in (PROMPT, [1, 2])]
