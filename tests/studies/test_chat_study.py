"""The study of chat templates: its dialogues, its masks, and that a draft may read another prompt than the target."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_text import EOS, TEXT_VOCAB, byte_tokenizer

import specdec
from specdec.chat import Chat
from specdec.policy import Fixed

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "studies"
NAMES = ("study", "chat_pair", "chat_template")


@pytest.fixture
def scripts(monkeypatch):
    """The scripts as modules by name; their folder is on the path for as long as the test runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = dict(sys.modules)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]


SOURCE = '''
class A:
    def area(self, width, height=2):
        """The area.

        More.
        """
        return width * height

    def bare(self):
        return 1

    def only_says(self):
        """Nothing else."""
'''


def test_dialogues_are_documented_functions(scripts):
    found = list(scripts["chat_pair"]._functions(SOURCE))
    assert [question for question, _ in found] == ["Write area(self, width, height=2): The area."]
    assert found[0][1].startswith("def area(self, width, height=2):\n")
    assert found[0][1].endswith("    return width * height\n")
    assert list(scripts["chat_pair"]._functions("def broken(")) == []


def test_only_answers_are_learned(scripts):
    pair = scripts["chat_pair"]
    tokenizer = byte_tokenizer()
    row = pair.row(pair.Dialogue("q", "abc", False), tokenizer, Chat(pair.TEMPLATE))
    short = pair.row(pair.Dialogue("q", "a", False), tokenizer, Chat(pair.TEMPLATE))
    tokens_BL, mask_BL = pair._batch([row, short])
    assert tokenizer.decode(row[0][: row[1]]) == "<s>### User:\nq\n\n### Assistant:\n"
    for i, expected in enumerate(([*b"abc", EOS], [*b"a", EOS])):
        letters = [tokenizer("abc")["input_ids"]["abc".index(chr(c))] if c != EOS else EOS for c in expected]
        assert tokens_BL[i, 1:][mask_BL[i]].tolist() == letters


def test_ways_to_ask_differ_as_they_say(scripts):
    tokenizer = byte_tokenizer()
    one = scripts["chat_pair"].Dialogue("q", "a", True)
    ways = {name: way(one) for name, way in scripts["chat_template"].formats(tokenizer).items()}
    texts = {name: tokenizer.decode(ids) for name, ids in ways.items()}
    right = "<s>### User:\nq\n\n### Assistant:\n"
    assert texts["right"] == right
    assert texts["no opening of the answer"] == "<s>### User:\nq\n\n"
    assert texts["applied twice"] == f"<s>### User:\n{right}\n\n### Assistant:\n"
    assert texts["first token missing"] == right.removeprefix("<s>")
    assert texts["first token twice"] == "<s>" + right
    assert "<|im_start|>user\nq<|im_end|>" in texts["another model's (ChatML)"]
    assert len(set(texts.values())) == len(texts)


def test_a_draft_that_reads_another_prompt_changes_no_text(scripts):
    """It is the target's own model: behind the same prompt it is always right, behind another one it is not."""
    target = tiny_models.tiny("llama", vocab_size=TEXT_VOCAB)
    asked, other = (5, 6, 7, 8), (9, 9, 9, 1, 2, 3)
    made = {}
    for name, read in (("same", asked), ("other", other)):
        drafter = scripts["chat_template"].OtherPrompt(target, {asked: read})
        decoder = specdec.SpeculativeDecoder(target, tokenizer=byte_tokenizer(), drafter=drafter, policy=Fixed(3))
        made[name] = decoder.generate(list(asked), max_new_tokens=24, eos_token_id=[])
        assert made[name].tokens == decoder.generate_plain(list(asked), max_new_tokens=24, eos_token_id=[]).tokens
    assert made["same"].stats.draft_acceptance_rate == 1
    assert made["other"].stats.draft_acceptance_rate < 1


def test_the_loss_of_answers_is_their_mean_by_token(scripts):
    target = tiny_models.tiny("llama", vocab_size=TEXT_VOCAB)
    loss = scripts["chat_pair"].answer_loss(target, [[1, 2], [3]], [[4, 5, 6], [7]])
    total = 0.0
    for prompt, answer in (([1, 2], [4, 5, 6]), ([3], [7])):
        ids = [*prompt, *answer]
        with torch.no_grad():
            logp = target(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert loss == pytest.approx(total / 4)


def test_teaching_lowers_the_loss_and_leaves_the_model_alone(scripts):
    pair = scripts["chat_pair"]
    torch.manual_seed(0)
    model = tiny_models.tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB, num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = byte_tokenizer()
    rows = [pair.row(pair.Dialogue(f"q{i}", "abab", False), tokenizer, Chat(pair.TEMPLATE)) for i in range(8)]
    taught = pair._teach(model, rows, 20, 1e-2, None, lambda _: None)
    prompts, answers = [ids[:start] for ids, start in rows], [ids[start:] for ids, start in rows]
    assert pair.answer_loss(taught, prompts, answers) < 0.5 * pair.answer_loss(model, prompts, answers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
