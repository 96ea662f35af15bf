"""Where texts end, what streams give, and what log-probabilities are: the same for every drafter and draft length."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from specdec.drafters import ModelDrafter
from tiny_text import BOS, EOS, TEXT_VOCAB, Says, ScriptedDrafter, byte_tokenizer

import specdec
from specdec.errors import InputError
from specdec.generation import Stream
from specdec.policy import Fixed

PROMPT = [3, 5, 7]
LENGTHS = [1, 2, 3, 5, 8]


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return tiny_models.tiny("gpt-neox")


@pytest.fixture(scope="module")
def plain(target: torch.nn.Module) -> list[int]:
    return tiny_models.reference(target, PROMPT, 40)


@pytest.fixture(scope="module")
def speaker() -> torch.nn.Module:
    """A target over bytes; what it says is put into its mouth by `Says`."""
    return tiny_models.tiny("llama", vocab_size=TEXT_VOCAB, num_hidden_layers=1)


def saying(speaker: Any, text: str, k: int, wrong_every: int = 0) -> tuple[specdec.SpeculativeDecoder, dict, list[int]]:
    tokenizer = byte_tokenizer()
    script = tokenizer(text)["input_ids"]
    drafter = ScriptedDrafter(script, wrong_every)
    decoder = specdec.SpeculativeDecoder(speaker, tokenizer=tokenizer, drafter=drafter, policy=Fixed(k))
    prompt = tokenizer("Say: ")["input_ids"]
    options = {"processors": (Says(len(prompt), script),), "max_new_tokens": len(script), "strict": True}
    return decoder, {"prompt": prompt, **options}, script


@pytest.mark.parametrize("k", LENGTHS)
def test_every_end_inside_an_accepted_path(target: torch.nn.Module, plain: list[int], k: int) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=target, policy=Fixed(k))
    for eos in sorted(set(plain)):
        out = decoder.generate(PROMPT, max_new_tokens=40, eos_token_id=eos)
        assert out.tokens == plain[: plain.index(eos) + 1]
        assert out.finish_reason == "eos" or len(out.tokens) == 40
    several = sorted(set(plain))[:4]
    out = decoder.generate(PROMPT, max_new_tokens=40, eos_token_id=several)
    assert out.tokens == plain[: min(plain.index(e) for e in several) + 1]
    assert out.finish_reason == "eos"
    assert len(out.origins) == len(out.tokens)


def test_the_models_own_end_ids_are_used(target: torch.nn.Module, plain: list[int], monkeypatch) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=target, policy=Fixed(4))
    for ids in (plain[6], [plain[6], 63]):
        monkeypatch.setattr(target.generation_config, "eos_token_id", ids)
        assert decoder.generate(PROMPT, max_new_tokens=40).tokens == plain[: plain.index(plain[6]) + 1]
        assert decoder.generate(PROMPT, max_new_tokens=40, eos_token_id=[]).tokens == plain


@pytest.mark.parametrize("count", [1, 2, 5, 6, 11, 40])
@pytest.mark.parametrize("k", LENGTHS)
def test_exactly_as_many_tokens_as_asked_for(target: torch.nn.Module, plain: list[int], k: int, count: int) -> None:
    draft = tiny_models.noisy(target, 0.03)
    out = specdec.SpeculativeDecoder(target, drafter=draft, policy=Fixed(k)).generate(PROMPT, max_new_tokens=count)
    assert out.tokens == plain[:count]
    assert out.finish_reason == "length"
    assert out.stats.num_tokens == count


@pytest.mark.parametrize("wrong_every", [0, 3])
@pytest.mark.parametrize("k", LENGTHS)
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("END", "One, two, three. "),
        (["never", ", three"], "One, two"),
        (["two", "One, t"], ""),
        (["END of it", "END o"], "One, two, three. "),
        ("…", "One, two, three. END of it"),
    ],
)
def test_stop_strings_straddle_rounds(speaker: Any, stop: Any, shown: str, k: int, wrong_every: int) -> None:
    text = "One, two, three. END of it… and more"
    decoder, options, _ = saying(speaker, text, k, wrong_every)
    out = decoder.generate(**options, stop=stop)
    assert out.text == shown
    assert out.finish_reason == "stop"
    plain = decoder.generate_plain(**options, stop=stop)
    assert (out.tokens, out.text, out.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
    said = bytes(text, "utf-8")
    stops = [stop] if isinstance(stop, str) else stop
    ends = [said.index(s.encode()) + len(s.encode()) for s in stops if s.encode() in said]
    assert len(out.tokens) == min(ends)
    assert "".join(chunk.text for chunk in decoder.stream(**options, stop=stop)) == shown


def test_a_stop_string_that_never_comes_is_not_held_back(speaker: Any) -> None:
    text = "almost EN, and then EN again: EN"
    decoder, options, _ = saying(speaker, text, 3)
    out = decoder.generate(**options, stop="END")
    assert (out.text, out.finish_reason) == (text, "length")


def test_stop_strings_are_checked_before_work_starts(speaker: Any) -> None:
    decoder, options, _ = saying(speaker, "text", 3)
    with pytest.raises(InputError, match="stop string is empty"):
        decoder.stream(**options, stop=["a", ""])
    with pytest.raises(InputError, match="stop strings need a tokenizer"):
        specdec.SpeculativeDecoder(speaker).stream([1, 2], stop="a")


@pytest.mark.parametrize("wrong_every", [0, 2, 5])
@pytest.mark.parametrize("k", LENGTHS)
def test_streams_never_split_a_character(speaker: Any, k: int, wrong_every: int) -> None:
    text = "Größe 你好 🙂🙂 naïve — “done”"
    decoder, options, script = saying(speaker, text, k, wrong_every)
    chunks = list(decoder.stream(**options))
    assert "".join(chunk.text for chunk in chunks) == text
    assert [token for chunk in chunks for token in chunk.tokens] == script
    assert not any("\N{REPLACEMENT CHARACTER}" in chunk.text for chunk in chunks)
    out = decoder.generate(**options)
    assert (out.text, out.tokens) == (text, script)
    assert out.origins == [origin for chunk in chunks for origin in chunk.origins]
    accepted = out.stats.num_accepted_draft_tokens
    assert out.origins.count("scripted") == accepted
    assert out.origins.count("target") == len(script) - accepted


def test_a_character_cut_off_by_the_length_is_given_out_at_the_end(speaker: Any) -> None:
    decoder, options, script = saying(speaker, "ab🙂", 2)
    out = decoder.generate(**{**options, "max_new_tokens": 4})
    assert out.tokens == script[:4]
    assert out.text == "ab\N{REPLACEMENT CHARACTER}"


def test_end_of_sequence_is_a_token_but_no_text(speaker: Any) -> None:
    decoder, options, script = saying(speaker, "bye", 5)
    script = [*script, EOS, *script]
    drafter = ScriptedDrafter(script)
    options["processors"] = (Says(len(options["prompt"]), script),)
    out = decoder.generate(**{**options, "max_new_tokens": 9, "eos_token_id": EOS, "drafter": drafter})
    assert out.tokens == script[:4]
    assert (out.text, out.finish_reason) == ("bye", "eos")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", [Fixed(4), Fixed(3, (2, 2))], ids=lambda p: p.name)
def test_logprobs_are_those_of_a_recompute(target: torch.nn.Module, policy: Fixed, temperature: float) -> None:
    draft = tiny_models.noisy(target, 0.03)
    decoder = specdec.SpeculativeDecoder(target, drafter=draft, policy=policy)
    out = decoder.generate(PROMPT, max_new_tokens=23, temperature=temperature, top_k=5, logprobs=True)
    assert out.logprobs is not None
    assert len(out.logprobs) == 23
    tokens = list(PROMPT)
    for token, logprob in zip(out.tokens, out.logprobs, strict=True):
        expected = tiny_models.cache_free(target, tokens).log_softmax(-1)[token]
        assert logprob == pytest.approx(float(expected), abs=1e-5)
        tokens.append(token)
    assert decoder.generate(PROMPT, max_new_tokens=3).logprobs is None
    eos = out.tokens[7]
    short = decoder.generate(
        PROMPT, max_new_tokens=23, temperature=temperature, top_k=5, logprobs=True, eos_token_id=eos
    )
    assert short.logprobs == pytest.approx(out.logprobs[: len(short.tokens)], abs=1e-9)


def test_streamed_chunks_are_the_generation(target: torch.nn.Module, plain: list[int]) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=tiny_models.noisy(target, 0.03), policy=Fixed(4))
    chunks = list(decoder.stream(PROMPT, max_new_tokens=30, logprobs=True))
    out = decoder.generate(PROMPT, max_new_tokens=30, logprobs=True)
    assert [token for chunk in chunks for token in chunk.tokens] == out.tokens == plain[:30]
    assert [origin for chunk in chunks for origin in chunk.origins] == out.origins
    assert [logprob for chunk in chunks for logprob in chunk.logprobs] == out.logprobs
    assert all(len(chunk.tokens) == len(chunk.origins) == len(chunk.logprobs) for chunk in chunks)
    assert len(chunks) == out.stats.num_rounds


def test_an_abandoned_stream_leaves_nothing_behind(target: torch.nn.Module, plain: list[int]) -> None:
    decoder = specdec.SpeculativeDecoder(target, drafter=tiny_models.noisy(target, 0.03), policy=Fixed(4))
    left = decoder.stream(PROMPT, max_new_tokens=30)
    next(left)
    other = decoder.stream(PROMPT, max_new_tokens=30)  # two at a time do not meet
    tokens = list(next(other).tokens)
    left.close()
    for chunk in other:
        tokens += chunk.tokens
    assert tokens == plain[:30]
    task = decoder.prepare(PROMPT, max_new_tokens=30)
    stream = Stream(task)
    next(stream)
    assert len(task.target.tokens) > len(PROMPT)
    stream.close()
    assert (task.target.tokens, task.target.num_cached) == ([], 0)
    assert decoder.generate(PROMPT, max_new_tokens=30).tokens == plain[:30]


def test_prompts_of_every_kind(speaker: Any) -> None:
    tokenizer = byte_tokenizer()
    decoder = specdec.SpeculativeDecoder(speaker, tokenizer=tokenizer, drafter=speaker, policy=Fixed(3))
    ids = tokenizer("Say: ")["input_ids"]
    texts = [
        decoder.generate(prompt, max_new_tokens=6)
        for prompt in ("Say: ", ids, tuple(ids), torch.tensor(ids), torch.tensor([ids]))
    ]
    assert all(out.tokens == texts[0].tokens and out.prompt == ids for out in texts)
    assert decoder.generate("", max_new_tokens=6).prompt == [BOS]
    with pytest.raises(InputError, match="one dimension"):
        decoder.generate(torch.tensor([ids, ids]))
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InputError, match="no chat template"):
        decoder.generate(messages)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert decoder.generate(messages, max_new_tokens=1).prompt == tokenizer("[hi]>")["input_ids"]


def test_half_precision_with_exact_is_the_plain_text() -> None:
    target = tiny_models.tiny("gpt-neox", dtype=torch.bfloat16)
    draft = ModelDrafter(tiny_models.noisy(target, 0.02))
    for seed, temperature in ((0, 0.0), (1, 1.0), (2, 1.0)):
        options = {"max_new_tokens": 40, "temperature": temperature, "seed": seed}
        decoder = specdec.SpeculativeDecoder(target, drafter=draft, policy=Fixed(4))
        out = decoder.generate(PROMPT, exact=True, **options)
        assert out.tokens == decoder.generate_plain(PROMPT, **options).tokens
