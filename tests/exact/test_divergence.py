"""The divergence explainer: ties are called ties, bugs are called bugs."""

from __future__ import annotations

import json

import pytest
import torch
from specdec.drafters import ModelDrafter
from specdec.verifiers import Coupled
from test_exact import HALF, PROMPT, flat, wobbly
from tiny_models import noisy, tiny

from specdec import SpeculativeDecoder
from specdec.bench.divergence import BUG, TIE, explain
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.verifier import Verdict


class WrongRow(Coupled):
    """Broken on purpose: the token after the path comes from the row before it."""

    def verify(self, p, proposal, position, chance):
        verdict = super().verify(p, proposal, position, chance)
        return Verdict(verdict.node, chance.race(p, [position] * len(p))[:, 0][verdict.node.clamp_min(0)])


def decoder(model, verifier=None):
    return SpeculativeDecoder(
        model, backend="eager", drafter=ModelDrafter(noisy(model, 0.01)), policy=Fixed(4), verifier=verifier
    )


def first_difference(made, **options):
    for seed in range(12):
        given = {"max_new_tokens": 50, "seed": seed, **options}
        prompt = [*PROMPT, seed]
        plain, ours = made.generate_plain(prompt, **given), made.generate(prompt, **given)
        found = explain(made, plain, ours, **given)
        assert (found is None) == (plain.tokens == ours.tokens)
        if found is not None:
            assert plain.tokens[: found.index] == ours.tokens[: found.index]
            assert found.plain_token == plain.tokens[found.index] == found.narrow_token
            assert found.speculative_token == ours.tokens[found.index]
            assert found.position == len(prompt) + found.index
            return found
    return None


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.8}], ids=str)
def test_rounding_is_a_tie(monkeypatch, options):
    made = decoder(flat())
    wobbly(monkeypatch, 1 / 64)
    found = first_difference(made, **options)
    assert found is not None
    assert found.verdict == TIE
    assert not found.is_bug
    assert found.wide_token == found.speculative_token
    assert 0 <= found.margin <= found.gap
    assert found.noise > 0
    assert "tie at this precision" in str(found)
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["verdict"] == TIE


@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_broken_verifier_is_a_bug(dtype, temperature):
    found = first_difference(decoder(tiny("llama", dtype=dtype), WrongRow()), temperature=temperature)
    assert found is not None
    assert found.verdict == BUG
    assert found.wide_token == found.plain_token != found.speculative_token
    assert "BUG" in str(found)


def test_a_broken_runtime_is_a_bug(monkeypatch):
    """Rows that are far from the plain ones must not pass for noise."""
    made = decoder(tiny("llama", dtype=HALF))
    wobbly(monkeypatch, 40.0)
    found = first_difference(made)
    assert found is not None
    assert found.verdict == BUG
    assert "rounding explains" in found.reason


def test_two_equal_rows_of_the_head_tie():
    """The verifier prefers the later of two candidates that nothing tells apart."""
    model = tiny("llama", dtype=HALF)
    made = decoder(model)
    plain = made.generate_plain(PROMPT, max_new_tokens=20)
    first = plain.tokens[7]
    twin = next(t for t in range(first + 1, 64) if t not in plain.tokens)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[first]

    class Later(Coupled):
        def verify(self, p, proposal, position, chance):
            return Verdict(torch.tensor(-1), torch.where(p[0].argmax() == first, twin, p[0].argmax()))

    plain = made.generate_plain(PROMPT, max_new_tokens=20)
    other = decoder(model, Later())
    found = explain(other, plain, other.generate(PROMPT, max_new_tokens=20))
    assert found is not None
    assert (found.plain_token, found.speculative_token) == (first, twin)
    assert found.gap == found.margin == 0
    assert found.verdict == TIE


def test_float32_has_nothing_to_explain():
    assert first_difference(decoder(tiny("llama", dtype=torch.float32))) is None


def test_a_text_that_ends_early_is_a_bug():
    made = decoder(tiny("llama"))
    long, short = (made.generate(PROMPT, max_new_tokens=n) for n in (9, 6))
    found = explain(made, long, short)
    assert found is not None
    assert (found.verdict, found.index, found.speculative_token) == (BUG, 6, None)
    assert "ends" in str(found)


def test_texts_that_do_not_belong_together_are_refused():
    made = decoder(tiny("llama", dtype=HALF))
    a, b = made.generate_plain(PROMPT), made.generate([7, 8, 9])
    with pytest.raises(InputError, match="prompts"):
        explain(made, a, b)
    other = made.generate(PROMPT, temperature=1.5)
    with pytest.raises(InputError, match="options"):
        explain(made, made.generate_plain(PROMPT, temperature=1.5, seed=4), other)
    ratio = decoder(tiny("llama"), "ratio")
    with pytest.raises(InputError, match="coupled"):
        explain(
            ratio,
            ratio.generate_plain(PROMPT, temperature=1.0),
            ratio.generate(PROMPT, temperature=1.0),
            temperature=1.0,
        )
