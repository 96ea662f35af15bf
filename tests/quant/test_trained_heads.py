"""Heads trained on the embedded target's full-precision states draft for it when its weights are stored in few bits."""

from __future__ import annotations

import pytest

import specdec
from specdec.bench.prompts import read_prompts
from specdec.kernels import ops
from specdec.policy import Fixed
from specdec.quant.linear import stored_as

native = pytest.mark.skipif(not ops.available(), reason="no native kernels here")


@pytest.mark.parametrize("drafter", ["eagle", "medusa"])
@pytest.mark.parametrize(
    ("format", "backend"),
    [
        ("int4-a8", "eager"),
        pytest.param("int8", "compiled", marks=native),
        pytest.param("int4-a8", "compiled", marks=native),
        pytest.param("mxfp4", "compiled", marks=native),
    ],
)
def test_the_same_tokens_and_drafts_that_are_taken(drafter: str, format: str, backend: str) -> None:
    decoder = specdec.load(drafter=drafter, quantize=format, backend=backend, policy=Fixed(4))
    assert stored_as(decoder.target) == format
    prompts = [prompt.text for prompt in read_prompts()[::5]]
    greedy = {"max_new_tokens": 24, "strict": True}
    plain = [decoder.generate_plain(prompt, **greedy).tokens for prompt in prompts]
    alone = [decoder.generate(prompt, **greedy) for prompt in prompts]
    assert [out.tokens for out in alone] == plain
    assert [out.tokens for out in decoder.generate(prompts, **greedy)] == plain
    rounds = [r for out in alone for r in out.trace.rounds]
    assert sum(r.num_accepted for r in rounds) >= {"eagle": 1.0, "medusa": 0.3}[drafter] * len(rounds)
    drawn = {"max_new_tokens": 24, "strict": True, "temperature": 0.8, "seed": 2}
    assert decoder.generate(prompts[0], **drawn).tokens == decoder.generate_plain(prompts[0], **drawn).tokens
