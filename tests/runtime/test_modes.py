"""kv and hybrid mode, prompts of any length in padded chunks, and the end of the context, under every KV updater.

Graphs run in torch: which graphs are called with what is the host's part, the same for every runtime.
"""

from __future__ import annotations

from typing import Any

import pytest
import tiny_artifacts
import tiny_models
import torch
import torch_graphs
from specdec.drafters import ModelDrafter

import specdec
from specdec.export.executorch import ExecutorchOptions
from specdec.policy import Fixed
from specdec.runtime.session import Session
from specdec.runtime.updaters import UPDATERS

KV = ExecutorchOptions(prefill_len=1, k=(0,), max_seq_len=40, max_nodes=8)
HYBRID = ExecutorchOptions(prefill_len=8, k=(0, 3), max_seq_len=40, max_nodes=8)
TEXT = [(13 * i + i // 5) % 64 for i in range(40)]


@pytest.fixture(params=UPDATERS)
def updater(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prefilled(length: int, options: ExecutorchOptions, updater: str) -> tuple[torch.Tensor, list[str]]:
    """The last row's logits after a prompt, and the graphs that it went through."""
    backend = torch_graphs.opened(tiny_artifacts.model(), updater, options)
    session = Session(backend)
    session.append(TEXT[:length])
    row = session.forward().logits[-1]
    return row, backend.family.calls  # type: ignore[attr-defined]


def test_prompts_of_any_length_are_read_in_padded_chunks(updater: str) -> None:
    """As many calls as there are chunks, the last one in the narrowest graph that holds it; the same row each time."""
    model = tiny_artifacts.model()
    with torch.inference_mode():
        expected = model(torch.tensor([TEXT])).logits[0]
    for length in range(1, len(TEXT) + 1):
        row, calls = prefilled(length, HYBRID, updater)
        assert len(calls) == -(-length // 8), length
        assert calls[:-1] == ["prefill_8"] * (len(calls) - 1)
        left = length - 8 * (len(calls) - 1)
        assert calls[-1] == ("step_1" if left == 1 else "step_4" if left <= 4 else "prefill_8")
        torch.testing.assert_close(row, expected[length - 1], rtol=1e-4, atol=1e-4)


def test_in_kv_mode_the_decode_graph_reads_prompts(updater: str) -> None:
    row, calls = prefilled(11, KV, updater)
    assert calls == ["step_1"] * 11
    hybrid, fewer = prefilled(11, HYBRID, updater)
    assert fewer == ["prefill_8", "step_4"]
    torch.testing.assert_close(row, hybrid, rtol=1e-4, atol=1e-4)


def decoder(options: ExecutorchOptions, updater: str, k: int) -> Any:
    model = tiny_artifacts.model()
    draft = ModelDrafter(tiny_models.noisy(model, 0.02), backend="eager")
    made = specdec.SpeculativeDecoder(model, drafter=draft, policy=Fixed(k), backend="eager")
    made.backend = torch_graphs.opened(model, updater, options)
    return made


@pytest.mark.parametrize("k", [1, 3, 6])
def test_texts_end_where_the_context_does(updater: str, k: int) -> None:
    """A prompt that nearly fills it: nothing is lost, nothing written past the end, whatever is drafted there."""
    for options in (KV, HYBRID):
        made = decoder(options, updater, k)
        for length in range(40 - k - 2, 40):
            prompt = TEXT[:length]
            out, plain = (
                made.generate(prompt, strict=True, max_new_tokens=99),
                made.generate_plain(prompt, max_new_tokens=99),
            )
            assert out.tokens == plain.tokens
            assert out.finish_reason == plain.finish_reason == "context"
            assert len(out.tokens) in (40 - length, 41 - length)  # the last token need not be computed
            expected = tiny_models.reference(tiny_artifacts.model(), prompt, 40 - length)
            assert out.tokens[: 40 - length] == expected
