"""Options about prompts and chats, as a user types them."""

from __future__ import annotations

import json
import re

import pytest
from tiny_models import noisy, tiny
from tiny_text import TEXT_VOCAB, byte_tokenizer

from specdec import cli
from specdec.bench import bare

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '[quietly]' if hush else '[aloud]' }}"
QUICK = ("--max-new-tokens", "4", "--repetitions", "1", "--warmup", "0", "--drafter", "ngram", "--backend", "eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target without a chat template, a template, and Spec-Bench's layout in small."""
    folder = tmp_path_factory.mktemp("chat")
    target = tiny("llama", vocab_size=TEXT_VOCAB, num_hidden_layers=1, max_position_embeddings=96)
    noisy(target, 0).save_pretrained(folder / "target")
    byte_tokenizer().save_pretrained(folder / "target")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["Write", "Again"]},
        {"question_id": 82, "category": "math", "turns": ["Count", "More"]},
        {"question_id": 161, "category": "translation", "turns": ["Translate"]},
        {"question_id": 241, "category": "summarization", "turns": ["long " * 40]},
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs a command on the target; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "100")

    def call(command: str, *arguments: str):
        try:
            code = cli.main([command, "--target", str(folder / "target"), *arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_compare_ends_with_the_table_and_says_what_was_cut(run, folder, tmp_path):
    file = tmp_path / "out.json"
    prompts = ("--prompts", str(folder / "question.jsonl"), "--limit-per-category", "1")
    code, out, err = run("compare", *QUICK, *prompts, "--truncate-prompts", "--published", "--json", str(file))
    assert code == 0, err
    assert re.search(r"speed-up +Multi +Trans +Sum +QA +Math +RAG +MAT +Overall", out)
    assert "other hardware" in out
    assert re.search(r"note: 1 of 4 prompts was cut in front to fit the context: \d+ of 200 tokens are gone", err)
    report = json.loads(file.read_text(encoding="utf-8"))
    assert [row["id"] for row in report["rows"]] == ["81", "81.2", "161", "241"]
    assert [bool(row["num_cut_tokens"]) for row in report["rows"]] == [False, False, False, True]
    assert list(report["spec_bench"]["tasks"]) == ["mt_bench", "translation", "summarization"]
    assert report["spec_bench"]["overall"]["mean_accepted"] == pytest.approx(report["stats"]["mean_acceptance_length"])


def test_other_sets_have_no_such_table(run, tmp_path):
    (tmp_path / "x.txt").write_text("abc\n", encoding="utf-8")
    code, out, _ = run("compare", *QUICK, "--prompts", str(tmp_path / "x.txt"))
    assert code == 0
    assert "Spec-Bench" not in out


def test_turns_and_limits(run, folder, tmp_path):
    file = tmp_path / "out.json"
    options = ("--prompts", str(folder / "question.jsonl"), "--turns", "1", "--limit", "3", "--json", str(file))
    assert run("compare", *QUICK, *options)[0] == 0
    assert [row["id"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]] == ["81", "82", "161"]


@pytest.mark.parametrize(("options", "end"), [((), "[aloud]"), (("--chat-option", "hush=true"), "[quietly]")])
def test_generate_fills_the_template_in(run, folder, options, end, monkeypatch):
    """Either option means --chat, and what the model is given is what the template says."""
    from specdec.api import SpeculativeDecoder

    given = []
    stream = SpeculativeDecoder.stream
    monkeypatch.setattr(
        SpeculativeDecoder, "stream", lambda self, prompt, **more: given.append(prompt) or stream(self, prompt, **more)
    )
    template = ("--chat-template", str(folder / "template.jinja"))
    code, out, err = run(
        "generate", "hi", *template, *options, "--max-new-tokens", "3", "--drafter", "none", "--backend", "eager"
    )
    assert code == 0, err
    assert given == [byte_tokenizer()("[user]hi" + end)["input_ids"]]
    assert not out.startswith("hi"), "the answer alone"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--chat",), "the tokenizer has no chat template"),
        (("--chat-option", "hush=true"), "the tokenizer has no chat template"),
        (("--chat-template", "TEMPLATE", "--chat-option", "hus=true"), "reads no 'hus', so --chat-option hus"),
        (("--chat-template", "TEMPLATE", "--chat-option", "hush"), "key=value"),
        (("--chat-template", "./nowhere.jinja"), "--chat-template nowhere.jinja: No such file"),
        (("--chat-template", "EMPTY"), "the file is empty"),
        (("--prompts", "spec-bench"), "does not ship with specdec"),
        (("--prompts", "SET"), "prompt 241: the prompt has 200 tokens"),
        (("--prompts", "SET", "--limit-per-category", "0"), "limit_per_category is a number of prompts >= 1"),
        (("--prompts", "SET", "--turns", "0"), "turns is a number of turns >= 1"),
        (("--prompts", "SET", "--truncate-prompts", "--max-new-tokens", "96"), "leave no room for a prompt"),
    ],
)
def test_errors_in_one_line_before_anything_is_decoded(run, folder, tmp_path, arguments, words, monkeypatch):
    from specdec.api import SpeculativeDecoder

    for method in ("generate", "generate_plain", "warmup"):
        monkeypatch.setattr(SpeculativeDecoder, method, lambda *_, **__: pytest.fail("decoded"))
    (tmp_path / "empty.jinja").write_text("\n", encoding="utf-8")
    known = {
        "TEMPLATE": str(folder / "template.jinja"),
        "EMPTY": str(tmp_path / "empty.jinja"),
        "SET": str(folder / "question.jsonl"),
    }
    code, out, err = run("compare", *QUICK, *(known.get(word, word) for word in arguments))
    assert code == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert words in err


def test_a_prompt_set_may_come_through_a_pipe(run, monkeypatch, tmp_path):
    """As of `--prompts <(command)`: a file that can be read only once."""
    import os
    import threading

    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(json.dumps({"text": "abc"}), encoding="utf-8"))
    writer.start()
    code, out, err = run("compare", *QUICK, "--prompts", str(path))
    writer.join()
    assert code == 0, err
    assert "1 prompts × 1" in out
