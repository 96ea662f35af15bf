"""Prompt files in each format."""

from __future__ import annotations

import json

import pytest

from specdec.bench.prompts import BUILT_IN, Prompt, read_prompts
from specdec.errors import InputError


def write(tmp_path, name: str, *lines: object):
    path = tmp_path / name
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", encoding="utf-8")
    return path


def test_built_in_prompts():
    prompts = read_prompts()
    rows = [json.loads(line) for line in BUILT_IN.read_text(encoding="utf-8").splitlines()]
    assert [prompt.text for prompt in prompts] == [row["text"] for row in rows]
    assert len({prompt.id for prompt in prompts}) == len(prompts) >= 8
    assert all(prompt.category for prompt in prompts)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": "a", "category": "c", "text": "t"}, Prompt("a", "t", "c")),
        ({"prompt": "p", "task_id": "H/1"}, Prompt("H/1", "p")),
        (
            {"question_id": 81, "category": "writing", "turns": ["one", "two"]},
            Prompt("81", "one", "writing", ("one", "two")),
        ),
        ({"question": "q?", "answer": "a"}, Prompt("1", "q?")),
    ],
)
def test_jsonl_formats(tmp_path, row, expected):
    assert read_prompts(write(tmp_path, "x.jsonl", row)) == [expected]
    assert read_prompts(write(tmp_path, "x.txt", row)) == [expected], "told by content too"


def test_plain_text(tmp_path):
    path = write(tmp_path, "x.txt", "  indented prompt", "", "Größe 🙂")
    assert [p.text for p in read_prompts(path)] == ["  indented prompt", "Größe 🙂"]


def test_limit(tmp_path):
    path = write(tmp_path, "x.jsonl", {"text": "a"}, {"text": "b"}, "not json")
    assert [p.text for p in read_prompts(path, 2)] == ["a", "b"]
    with pytest.raises(InputError, match="limit"):
        read_prompts(path, 0)


def test_what_is_wrong_and_where(tmp_path):
    with pytest.raises(InputError, match=r"x.jsonl, line 2: not valid JSON"):
        read_prompts(write(tmp_path, "x.jsonl", {"text": "a"}, "not json"))
    with pytest.raises(InputError, match=r"line 1: no text under any of .*; the row has words"):
        read_prompts(write(tmp_path, "x.jsonl", {"words": "a"}))
    with pytest.raises(InputError, match="not list"):
        read_prompts(write(tmp_path, "x.jsonl", [1]))
    with pytest.raises(InputError, match="cannot read prompts from"):
        read_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompts(write(tmp_path, "x.txt", "", " "))


def test_spec_bench_and_gsm8k_as_they_are(shared):
    spec_bench = read_prompts(shared / "data" / "spec_bench_question.jsonl")
    assert spec_bench[0].category == "writing"
    assert spec_bench[0].text.startswith("Compose an engaging travel blog post")
    assert read_prompts(shared / "data" / "gsm8k_test.jsonl", 1)[0].text.startswith("Janet")
