"""Stories: the tokens of `generate`, cut so that they join to its text, with true probabilities."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_pairs
import torch
from specdec.drafters import ModelDrafter, NgramDrafter

import specdec
from specdec.errors import InputError
from specdec.generation import Generation
from specdec.policy import Fixed
from specdec.report.story import pieces, tell
from specdec.sampling import Sampling
from specdec.trace import Trace

PROMPT = [3, 5, 7, 3, 5, 7, 3, 5]


@pytest.fixture(scope="module")
def models():
    target = tiny_models.tiny("gpt-neox")
    return target, tiny_models.noisy(target, 0.03)


@pytest.fixture(scope="module")
def decoder(models):
    target, draft = models
    tokenizer, _ = tiny_pairs.tokenizers()
    return specdec.SpeculativeDecoder(target, tokenizer=tokenizer, drafter=ModelDrafter(draft), policy=Fixed(k=3))


def plainly(model, tokens) -> torch.Tensor:
    """Logits after `tokens`, from one forward of the stock model."""
    with torch.inference_mode():
        return model(torch.tensor([list(tokens)])).logits[0, -1].double()


@pytest.mark.parametrize("verifier", ["coupled", "ratio", "block", "match"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_story_is_what_generate_gives(decoder, models, verifier, temperature):
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 4}
    from specdec import registry

    options["verifier"] = registry.create("verifier", verifier)
    told = tell(decoder, PROMPT, **options)
    out = decoder.generate(PROMPT, **options)
    assert "".join(token["text"] for token in told) == out.text
    assert [token["origin"] for token in told] == out.origins
    assert [token["position"] for token in told] == list(range(24))
    rounds = [sum(t["round"] == r for t in told) for r in range(told[-1]["round"] + 1)]
    emitted = [r.num_emitted for r in out.trace.rounds]
    assert rounds[:-1] == emitted[:-1]
    assert 0 < rounds[-1] <= emitted[-1]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 9, "seed": 2}, {"temperature": 1.3, "repetition_penalty": 1.4}]
)
def test_p_q_and_margin_are_those_of_the_models(decoder, models, options):
    target, draft = models
    told = tell(decoder, PROMPT, max_new_tokens=20, **options)
    out = decoder.generate(PROMPT, max_new_tokens=20, **options)
    sampling = Sampling(**options)
    from specdec.tree import TokenTree

    some_q = 0
    for i, (token, note) in enumerate(zip(out.tokens, told, strict=True)):
        context = PROMPT + out.tokens[:i]
        rows = [
            sampling.scores(plainly(model, context)[None], context, TokenTree.empty(), [-1])[0].softmax(-1)
            for model in (target, draft)
        ]
        p, q = rows
        first, second = p.topk(2).values.tolist()
        assert note["p"] == pytest.approx(float(p[token]), abs=2e-4)
        assert note["margin"] == pytest.approx(first - second, abs=2e-4)
        if note["q"] is not None:
            some_q += 1
            assert note["q"] == pytest.approx(float(q[token]), abs=2e-4)
        if note["origin"] == "model":
            assert note["q"] is not None
            assert note["refused"] == []
    assert some_q >= 10
    assert any(note["refused"] for note in told)
    assert any(note["origin"] == "model" for note in told)


def test_what_was_refused_is_what_the_draft_wanted(decoder, models):
    _, draft = models
    told = tell(decoder, PROMPT, max_new_tokens=20)
    out = decoder.generate(PROMPT, max_new_tokens=20)
    checked = 0
    for i, note in enumerate(told):
        for refused in note["refused"]:
            wanted = int(plainly(draft, PROMPT + out.tokens[:i]).argmax())
            assert refused["text"] == decoder.tokenizer.decode([wanted])
            assert wanted != out.tokens[i]
            checked += 1
    assert checked


def test_a_lookup_has_no_q(models):
    tokenizer, _ = tiny_pairs.tokenizers()
    decoder = specdec.SpeculativeDecoder(models[0], tokenizer=tokenizer, drafter=NgramDrafter(), policy=Fixed(k=3))
    told = tell(decoder, PROMPT, max_new_tokens=24)
    assert any(token["origin"] == "ngram" for token in told)
    assert all(token["q"] is None for token in told)


def test_a_given_sampling_counts(decoder):
    sampling = Sampling(temperature=0.9, seed=7)
    told = tell(decoder, PROMPT, max_new_tokens=12, sampling=sampling)
    out = decoder.generate(PROMPT, max_new_tokens=12, sampling=sampling)
    assert "".join(t["text"] for t in told) == out.text
    assert [t["origin"] for t in told] == out.origins


def test_pieces_of_characters_that_take_several_tokens():
    """Tokens that are single bytes of a character join to it, wherever the text ends."""
    tokenizer, _ = tiny_pairs.tokenizers()
    ids = tokenizer.convert_tokens_to_ids(["a", "Ã", "¤", "b", "Ã", "¤", "Ã"])  # "a", two bytes of "ä", "b", …
    whole = tokenizer.decode(ids)
    assert whole == "aäbä\N{REPLACEMENT CHARACTER}"

    def cut(text):
        return pieces(tokenizer, Generation([3], ids, text, "length", [], None, Trace()))

    assert cut(whole) == ["a", "", "ä", "b", "", "ä", "\N{REPLACEMENT CHARACTER}"]
    assert cut("aä") == ["a", "", "ä", "", "", "", ""]  # a stop string cut the rest


def test_a_story_needs_a_tokenizer(models):
    bare = specdec.SpeculativeDecoder(models[0], drafter=NgramDrafter())
    with pytest.raises(InputError, match="needs a tokenizer"):
        tell(bare, PROMPT, max_new_tokens=4)


def test_options_are_checked_as_by_generate(decoder):
    with pytest.raises(InputError, match="temperature"):
        tell(decoder, PROMPT, temperature=-1.0)
