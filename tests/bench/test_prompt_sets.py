"""Prompt sets in the layouts of benchmarks; damaged and oversized files; turns, templates, and prompts that are cut."""

from __future__ import annotations

import gzip
import json

import pytest
import tiny_models
from specdec.drafters import NgramDrafter
from tiny_text import BOS, EOS, TEXT_VOCAB, byte_tokenizer

import specdec
from specdec.bench import prompt_files
from specdec.bench.compare import compare
from specdec.bench.prompt_sets import Selection, describe_cuts, encode_prompts
from specdec.bench.prompts import Prompt, read_prompt_set
from specdec.chat import Chat
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.train.data import read_texts

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a{{ '!' if loud else '' }}>{% endif %}"
)


def write(tmp_path, name: str, *rows: object):
    path = tmp_path / name
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def says(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in messages]


def share(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in messages]


@pytest.fixture(scope="module")
def target():
    return tiny_models.tiny("llama", vocab_size=TEXT_VOCAB, num_hidden_layers=1)


@pytest.fixture
def decoder(target):
    return specdec.SpeculativeDecoder(target, tokenizer=byte_tokenizer(), drafter=NgramDrafter(), policy=Fixed(2))


HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "test": "", "canonical_solution": ""}
GSM8K = {"question": "How many?", "answer": "1 + 1\n#### 2"}
SPEC = {"question_id": 161, "category": "translation", "turns": ["Translate"], "reference": ["x"]}
MT = {"question_id": 81, "category": "writing", "turns": ["Compose", "Again"]}
CHAT = {"messages": says(("system", "Be kind."), ("user", "hi"), ("assistant", "hello"), ("user", "bye"))}
SHARE = {"id": "s1", "conversations": share(("human", "hi"), ("gpt", "hello"), ("human", "bye"), ("gpt", "ciao"))}


@pytest.mark.parametrize(
    ("row", "layout", "expected"),
    [
        (HUMANEVAL, "humaneval", Prompt("HumanEval/0", "def f():")),
        (GSM8K, "gsm8k", Prompt("1", "How many?")),
        (SPEC, "spec-bench", Prompt("161", "Translate", "translation")),
        (MT, "mt-bench", Prompt("81", "Compose", "writing", ("Compose", "Again"))),
        (CHAT, "messages", Prompt("1", "hi", "", ("hi", "bye"), ("hello",), "Be kind.")),
        (SHARE, "conversations", Prompt("s1", "hi", "", ("hi", "bye"), ("hello", "ciao"))),
        ({"id": 7, "text": "t"}, "text", Prompt("7", "t")),
    ],
)
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "y.gz"])
def test_layouts_are_told_by_content(tmp_path, row, layout, expected, name):
    lines = [row] if name != "x.json" else [json.dumps([row], indent=1)]
    found = read_prompt_set(write(tmp_path, name, *lines))
    assert found.prompts == (expected,)
    assert found.layout == layout
    assert found.notes == ()


def test_what_a_conversation_may_hold(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = read_prompt_set(
        write(
            tmp_path,
            "x.jsonl",
            {"messages": [{"role": "user", "content": parts}, {"role": "user", "content": "c"}]},
            {"messages": says(("assistant", "first"), ("user", "u"), ("assistant", "v"), ("assistant", "w"))},
            {"conversations": []},
            {"conversations": share(("gpt", "nobody asked"))},
        )
    )
    assert [(p.turns, p.answers) for p in found.prompts] == [(("ab\n\nc",), ()), (("u",), ("v\n\nw",))]
    assert found.notes == ("2 rows are left out, where no user says anything: x.jsonl, line 3, …",)
    assert found.prompts[1].document == "u\n\nv\n\nw"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": says(("tool", "42"))}, "role 'tool'"),
        ({"messages": says(("user", "hi"), ("system", "late"))}, "role 'system'"),
        ({"messages": "hi"}, "a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images and tools"),
        ({"turns": ["a", ""]}, "no text under any of"),
        ({"turns": [1]}, "no text under any of"),
        ("[[", "not valid JSON"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, row, words):
    with pytest.raises(InputError, match=rf"x.jsonl, line 2: .*{words}"):
        read_prompt_set(write(tmp_path, "x.jsonl", {"text": "fine"}, row))


def test_training_reads_whole_conversations(tmp_path):
    """`specdec train --data` takes the same files: an answer is text to learn from too."""
    path = write(tmp_path, "x.jsonl", {"messages": says(("system", "s"), ("user", "u"), ("assistant", "a"))})
    assert read_texts(path) == ["s\n\nu\n\na"]


def test_only_silent_rows_are_no_prompts(tmp_path):
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompt_set(write(tmp_path, "x.jsonl", {"conversations": []}))
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompt_set(write(tmp_path, "x.json", "[]"))


def test_text_that_only_looks_like_an_array(tmp_path):
    assert [p.text for p in read_prompt_set(write(tmp_path, "x.txt", "[ ] milk", "[x] bread")).prompts] == [
        "[ ] milk",
        "[x] bread",
    ]
    with pytest.raises(InputError, match="not valid JSON, though it begins like an array"):
        read_prompt_set(write(tmp_path, "x.json", "[ ] milk"))


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"text": "a"}).encode())
    assert read_prompt_set(path).prompts[0].text == "a"


def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_files, "MAX_UNPACKED", 3 << 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * (3 << 20)))
    with pytest.raises(InputError, match="holds no prompts"):
        read_prompt_set(path)  # just as large as may be
    path.write_bytes(gzip.compress(b"\n" * (64 << 20)))
    sizes = []
    read = gzip.GzipFile.read

    def counted(self, size=-1):
        sizes.append(size)
        return read(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(InputError, match=r"more than 3 MiB from [\d,]+ bytes.*unpack it yourself"):
        read_prompt_set(path)
    assert min(sizes) > 0
    assert sum(sizes) <= 4 << 20, "it stops where the limit is passed"


@pytest.mark.parametrize("damage", ["cut", "flipped", "two bytes"])
def test_damaged_gzip_says_so(tmp_path, damage):
    whole = gzip.compress(json.dumps({"text": "hello " * 50}).encode())
    made = {"cut": whole[:-12], "flipped": whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:], "two bytes": whole[:2]}
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(made[damage])
    with pytest.raises(InputError, match="gzip file is damaged"):
        read_prompt_set(path)


def rows_of(**categories: int) -> list[dict[str, object]]:
    names = [name for name, count in categories.items() for _ in range(count)]
    return [{"question_id": i, "category": name, "turns": ["q"]} for i, name in enumerate(names)]


def test_the_first_of_each_category(tmp_path):
    """MT-Bench's categories are one of Spec-Bench's tasks, and eight of their own elsewhere."""
    spec = write(tmp_path, "spec.jsonl", *rows_of(writing=3, math=3, qa=4, rag=1))
    found = read_prompt_set(spec, limit_per_category=2)
    assert [p.category for p in found.prompts] == ["writing", "writing", "qa", "qa", "rag"]
    assert found.layout == "spec-bench"
    mt = write(tmp_path, "mt.jsonl", *rows_of(writing=3, math=3))
    assert [p.category for p in read_prompt_set(mt, limit_per_category=1).prompts] == ["writing", "math"]
    other = write(tmp_path, "other.jsonl", *rows_of(writing=2, qa=2, gardening=2))
    assert len(read_prompt_set(other, limit_per_category=1).prompts) == 3
    assert [p.id for p in read_prompt_set(spec, 3, 2).prompts] == ["0", "1", "6"]
    with pytest.raises(InputError, match="limit_per_category"):
        read_prompt_set(spec, limit_per_category=0)


def test_names(tmp_path):
    assert read_prompt_set("built-in") == read_prompt_set(None)
    with pytest.raises(InputError, match=r"spec-bench does not ship .* data/spec_bench/question.jsonl\) and give"):
        read_prompt_set("spec-bench")
    with pytest.raises(InputError, match="the only set of a name here is built-in"):
        read_prompt_set("bilt-in")


def test_later_turns_stand_behind_the_plain_answer(decoder):
    options = {"max_new_tokens": 6}
    prompts = [Prompt("a", "one", turns=("one", "two")), Prompt("b", "only")]
    seen = []
    made = encode_prompts(decoder, prompts, options, progress=lambda *what: seen.append(what))
    answer = decoder.generate_plain("one", **options).text
    assert [one.id for one in made] == ["a", "a.2", "b"]
    assert list(made[1].ids) == decoder.encode(f"one{answer}\n\ntwo")
    assert seen == [(2, 3, "a.2"), (3, 3, "b")]
    assert [one.id for one in encode_prompts(decoder, prompts, options, turns=1)] == ["a", "b"]
    with pytest.raises(InputError, match="turns"):
        encode_prompts(decoder, prompts, options, turns=0)


def test_recorded_answers_come_before_our_own(decoder):
    prompt = Prompt("a", "one", turns=("one", "two"), answers=("noted",), system="sys")
    made = encode_prompts(decoder, [prompt], {"max_new_tokens": 4})
    assert list(made[1].ids) == decoder.encode("sys\n\nonenoted\n\ntwo")


def test_turns_through_a_chat_template(decoder):
    prompt = Prompt("a", "one", turns=("one", "two"), answers=("noted",), system="sys")
    made = encode_prompts(decoder, [prompt], {"max_new_tokens": 4}, chat=Chat(TEMPLATE, {"loud": True}))
    assert list(made[1].ids) == decoder.encode("<system>sys<user>one<assistant>noted<user>two<a!>")
    decoder.tokenizer.chat_template = TEMPLATE
    assert list(encode_prompts(decoder, [Prompt("b", "x")], chat=True)[0].ids) == decoder.encode("<user>x<a>")


def test_templates_that_cannot_work(decoder):
    messages = says(("user", "x"))
    with pytest.raises(InputError, match=r"no chat template.*--chat-template FILE"):
        Chat().encode(decoder.tokenizer, messages)
    with pytest.raises(InputError, match="reads no 'enable_thinking'"):
        Chat(TEMPLATE, {"enable_thinking": False}).encode(decoder.tokenizer, messages)
    with pytest.raises(InputError, match="reads no 'messages'"):
        Chat(TEMPLATE, {"messages": []}).encode(decoder.tokenizer, messages)
    with pytest.raises(InputError, match="fails on these messages: no system role"):
        Chat("{{ raise_exception('no system role') }}").encode(decoder.tokenizer, messages)
    with pytest.raises(InputError, match="fails on these messages"):
        Chat("{% for").encode(decoder.tokenizer, messages)


def test_long_prompts_are_refused_before_anything_is_decoded(decoder, monkeypatch):
    context = decoder.backend.capabilities.context
    monkeypatch.setattr(decoder, "generate_plain", lambda *_, **__: pytest.fail("decoded"))
    prompts = [Prompt("a", "one", turns=("one", "two")), Prompt("long", "x" * context)]
    with pytest.raises(InputError, match=r"prompt long: .*context is .*--truncate-prompts$"):
        encode_prompts(decoder, prompts, {"max_new_tokens": 4})
    with pytest.raises(InputError, match="prompt long"):
        Selection().check(decoder, prompts, {"max_new_tokens": 4})


def test_a_turn_that_no_longer_fits_says_what_to_do(decoder):
    context = decoder.backend.capabilities.context
    prompt = Prompt("a", "one", turns=("one", "x" * (context - 8)))
    with pytest.raises(InputError, match=r"prompt a.2: .*--truncate-prompts, or ask for --turns 1"):
        encode_prompts(decoder, [prompt], {"max_new_tokens": 16})


def test_cut_prompts_keep_their_end_and_their_beginning_mark(decoder):
    context = decoder.backend.capabilities.context
    text = "".join(chr(97 + i % 26) for i in range(context + 10))
    options = {"max_new_tokens": 12}
    (made,) = encode_prompts(decoder, [Prompt("a", text)], options, truncate=True)
    assert list(made.ids) == decoder.encode(text)[-(context - 12) :]
    assert made.num_cut == 22
    (with_bos,) = encode_prompts(
        decoder, [Prompt("a", text)], options, truncate=True, chat=Chat("<s>{{ messages[0].content }}")
    )
    assert with_bos.ids[0] == BOS
    assert list(with_bos.ids[1:]) == decoder.encode(text)[-(context - 13) :]
    assert with_bos.num_cut == 23
    (whole,) = encode_prompts(decoder, [Prompt("b", text[: context - 12])], options, truncate=True)
    assert whole.num_cut == 0
    assert describe_cuts([whole]) is None
    assert describe_cuts([made, whole]).startswith("1 of 2 prompts was cut in front to fit the context: 22 of ")
    with pytest.raises(InputError, match="leave no room for a prompt"):
        encode_prompts(decoder, [Prompt("a", text)], {"max_new_tokens": context}, truncate=True)


def test_compare_measures_every_turn_on_the_same_text(decoder):
    result = compare(
        decoder,
        [Prompt("a", "one", "writing", ("one", "two"))],
        {"max_new_tokens": 5, "eos_token_id": EOS},
        repetitions=1,
        warmup=0,
    ).as_dict()
    assert [(row["id"], row["question"], row["turn"]) for row in result["rows"]] == [("a", "a", 1), ("a.2", "a", 2)]
    assert result["identical"] == 2
    assert result["rows"][1]["num_prompt_tokens"] > len("one") + len("two")


def test_the_shared_sets_as_they_are(shared):
    data = shared / "data"
    spec = read_prompt_set(data / "spec_bench_question.jsonl")
    assert (spec.layout, len(spec.prompts), sum(len(p.turns) for p in spec.prompts)) == ("spec-bench", 480, 560)
    first = read_prompt_set(data / "spec_bench_question.jsonl", limit_per_category=5).prompts
    assert [p.id for p in first[::5]] == ["81", "161", "241", "321", "401", "481"]
    assert len(first) == 30
    human = read_prompt_set(data / "HumanEval.jsonl.gz")
    assert (human.layout, len(human.prompts), human.prompts[163].id) == ("humaneval", 164, "HumanEval/163")
    grade = read_prompt_set(data / "gsm8k_test.jsonl")
    assert (grade.layout, len(grade.prompts)) == ("gsm8k", 1319)
    assert read_prompt_set(data / "tinyshakespeare.txt", 2).prompts[0].text == "First Citizen:"
