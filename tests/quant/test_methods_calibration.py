"""Calibration text: what is taken, and what is refused."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_text
import torch

from specdec.bench.prompts import read_prompts
from specdec.errors import InputError
from specdec.quant.methods import apply, calibration
from specdec.quant.methods.calibration import check_tokens, from_model, from_texts, refuse_prompts, tokens

TOKENIZER = tiny_text.byte_tokenizer()
TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def model(**changes: object) -> torch.nn.Module:
    return tiny_models.tiny("llama", vocab_size=tiny_text.TEXT_VOCAB, **changes)


def test_rows_of_texts():
    texts = [f"document {i}: {TEXT}" for i in range(5)]
    found = from_texts(texts, TOKENIZER, rows=7, length=50, seed=3)
    assert found.shape == (7, 50)
    assert found.dtype == torch.int64
    assert torch.equal(found, from_texts(texts, TOKENIZER, rows=7, length=50, seed=3))
    assert not torch.equal(found, from_texts(texts, TOKENIZER, rows=7, length=50, seed=4))
    assert "quick brown fox" in TOKENIZER.decode(found[0])
    few = from_texts(["short " * 30], TOKENIZER, rows=64, length=50)
    assert len(few) == 3, "there is no more"


def test_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert tokens(path, model(), TOKENIZER, rows=2).shape == (2, 256)
    assert tokens([TEXT], model(), TOKENIZER, rows=2, length=20).shape == (2, 20)
    assert tokens([TEXT], model(max_position_embeddings=40), TOKENIZER, rows=2).shape == (2, 40)
    with pytest.raises(InputError, match="No such file"):
        tokens(tmp_path / "absent.txt", model(), TOKENIZER)


def test_text_that_the_model_writes(tmp_path):
    target = model()
    found = from_model(target, TOKENIZER, rows=3, length=24, seed=1, folder=tmp_path)
    assert found.shape == (3, 24)
    assert (found < tiny_text.TEXT_VOCAB).all()
    assert (found[0][:1] == tiny_text.BOS).all()
    assert torch.equal(found, from_model(target, TOKENIZER, rows=3, length=24, seed=1)), "kept texts are the same"
    assert not torch.equal(found, from_model(target, TOKENIZER, rows=3, length=24, seed=2))
    assert from_model(target, None, rows=2, length=16).shape == (2, 16), "without a tokenizer"


@pytest.mark.parametrize("how", ["whole", "reflowed", "part"])
def test_built_in_prompts_are_refused(how):
    prompt = read_prompts()[3].text
    held = {"whole": f"before\n{prompt}\nafter", "reflowed": " ".join(prompt.split()), "part": prompt[:60]}[how]
    with pytest.raises(InputError, match="holds an evaluation prompt"):
        from_texts([TEXT, held], TOKENIZER, rows=500, length=10)


def test_prompts_of_the_users_are_refused():
    refuse_prompts([TEXT], ["How many roads must a man walk down?"])
    with pytest.raises(InputError, match="evaluation prompt"):
        refuse_prompts([TEXT + "how many\n roads must  a man walk down"], ["how many roads must a man walk down"])


def test_the_standard_library_holds_no_evaluation_prompt():
    """Built-in prompts come from files that are held out, so what is left may be used."""
    from specdec.train import stdlib

    used = [document for document in stdlib.documents() if not document.held_out][::10]
    refuse_prompts(document.text for document in used)
    with pytest.raises(InputError, match="evaluation prompt"):
        refuse_prompts(document.text for document in stdlib.documents() if document.held_out)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "there is no calibration text"),
        (["  \n"], "there is no calibration text"),
        (["too short"], r"has 10 tokens, which is too short for one row of 50"),
    ],
)
def test_too_little_text(texts, message):
    with pytest.raises(InputError, match=message):
        from_texts(texts, TOKENIZER, rows=2, length=50)
    with pytest.raises(InputError, match="at least 1 row of 2 tokens"):
        from_texts([TEXT], TOKENIZER, rows=0, length=50)


def test_tokens_that_the_model_cannot_read():
    target = model(max_position_embeddings=32)
    good = torch.zeros(2, 16, dtype=torch.int64)
    assert torch.equal(check_tokens(good.int(), target, "awq"), good)
    for bad, message in (
        (None, "method awq looks at the model's activations and needs calibration text"),
        (good[:0], "needs calibration text"),
        (good[0], r"integers \[rows, tokens\]"),
        (good.float(), r"integers \[rows, tokens\], not torch.float32"),
        (good[:, :1], "2 to 32 tokens, not 1"),
        (good.repeat(1, 3), "2 to 32 tokens, not 48"),
        (good + tiny_text.TEXT_VOCAB, "vocabulary has 264"),
        (good - 1, "from -1 to -1"),
    ):
        with pytest.raises(InputError, match=message):
            check_tokens(bad, target, "awq")


def test_methods_ask_for_text():
    with pytest.raises(InputError, match="give a text file, or 'self'"):
        apply(model(), {"default": "int8", "method": "awq"})
    assert calibration.OWN == "self"
