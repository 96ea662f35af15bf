"""Documents, the split, rows, sampling order, and texts of the target's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_models import reference, tiny
from tiny_text import BOS, EOS, TEXT_VOCAB, byte_tokenizer

from specdec.bench.prompts import read_prompts
from specdec.errors import InputError
from specdec.train import data, selfgen, stdlib

LINES = [f"line {i} of the text, with {i * i} in it\n" for i in range(300)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def many(tmp_path):
    return write_jsonl(tmp_path / "many.jsonl", [{"text": f"document {i}: " + "x" * (i % 17)} for i in range(200)])


# ------------------------------------------------------------------ documents


def test_cutting_loses_nothing_and_ends_where_the_text_allows():
    text = "".join(line + ("\n" if i % 5 == 4 else "") for i, line in enumerate(LINES))
    pieces = data.cut(text, 500)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 500
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(len(piece) >= 250 for piece in pieces[:-1])
    assert all(piece.endswith("\n") for piece in data.cut("".join(LINES), 500))
    assert list(map(len, data.cut("y" * 1000, 400))) == [400, 400, 200]


def test_no_document_is_on_both_sides_and_twins_count_once(many, tmp_path):
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"prompt": "document 3: xxx"}, {"text": "document 3: xxx"}])
    documents = data.read_documents([many, twice], 0.1)
    sides = [{d.text for d in documents if d.held_out == side} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert len(documents) == 200 == len(sides[0]) + len(sides[1])
    assert len(sides[1]) == 20


def test_the_split_depends_on_the_texts_alone(many, tmp_path):
    rows = [json.loads(line) for line in many.read_text().splitlines()]
    shuffled = write_jsonl(tmp_path / "shuffled.jsonl", [rows[i] for i in np.random.default_rng(0).permutation(200)])
    sides = [{d.text for d in data.read_documents([path], 0.1) if d.held_out} for path in (many, shuffled)]
    assert sides[0] == sides[1]


def test_rows_hold_no_held_out_text(many):
    tokenizer = byte_tokenizer(bos=False)
    documents = data.read_documents([many], 0.1)
    made = data.packed(documents, tokenizer, 32, 0, {})
    texts = ["".join(tokenizer.decode(row) for row in side.tokens_RL) for side in (made.train, made.held_out)]
    for document in documents:
        name = document.text.split(":")[0] + ":"
        assert name not in texts[not document.held_out]
    assert made.train.length == 32


def test_documents_are_marked_off():
    ids = data.encode(["ab", "c"], byte_tokenizer())
    assert [row[-1] for row in ids] == [EOS, EOS]  # this one puts nothing in front, so the end is marked,
    assert data.encode(["ab", "c"], byte_tokenizer(), closed=False) == [ids[0][:-1], ids[1][:-1]]  # but not in a prompt
    assert data.encode(["ab"], _Opening()) == [[BOS, 1, 2]]


class _Opening:
    bos_token_id, eos_token_id = BOS, EOS

    def __call__(self, texts, **_):
        return {"input_ids": [[BOS, 1, 2] for _ in texts]}


def test_the_digest_changes_with_every_part(many):
    documents = data.read_documents([many])
    tokenizer = byte_tokenizer()
    digests = {
        data.packed(d, tokenizer, length, seed, {}).digest
        for d, length, seed in ((documents, 32, 0), (documents, 32, 1), (documents, 24, 0), (documents[1:], 32, 0))
    }
    assert len(digests) == 4
    assert data.packed(documents, tokenizer, 32, 0, {}).digest in digests
    rows = data.Rows.full(np.zeros((2, 4), dtype=np.int32))
    shorter = data.Rows(rows.tokens_RL, rows.first_R, rows.last_R - 1)
    assert rows.digest() != shorter.digest()


def test_the_mask_is_what_counts():
    rows = data.Rows(np.zeros((2, 5), dtype=np.int32), np.array([0, 2]), np.array([5, 4]))
    tokens, mask = rows.tensors()
    assert tokens.dtype == torch.int64
    assert mask.tolist() == [[True] * 5, [False, False, True, True, False]]


def test_every_row_comes_once_a_pass_and_the_state_is_two_numbers():
    sampler = data.Sampler(10, seed=3)
    first = np.concatenate([sampler.draw(3) for _ in range(3)])
    assert len(set(first)) == 9
    epoch, at = sampler.epoch, sampler.at
    following = [sampler.draw(3) for _ in range(5)]
    again = data.Sampler(10, seed=3)
    again.restore(epoch, at)
    assert all((a == b).all() for a, b in zip(following, [again.draw(3) for _ in range(5)], strict=True))
    assert sampler.epoch == 2
    with pytest.raises(InputError, match="a step takes 11 rows and there are 10"):
        sampler.draw(11)


def test_bad_files_are_named(tmp_path):
    empty, one, binary = (tmp_path / name for name in ("empty.txt", "one.txt", "binary.txt"))
    empty.write_text("\n \n")
    one.write_text("short")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in ((tmp_path / "none", "No such file"), (binary, "not UTF-8"), (empty, "0 document")):
        with pytest.raises(InputError, match=message):
            data.read_documents([path])
    with pytest.raises(InputError, match="1 document"):
        data.read_documents([one])
    with pytest.raises(InputError, match=r"bad.jsonl, line 2: no text"):
        data.read_documents([write_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"label": 1}])])
    with pytest.raises(InputError, match="between 0 and 1"):
        data.read_documents([one], 1.0)


def test_too_little_text_is_refused(tmp_path):
    file = write_jsonl(tmp_path / "two.jsonl", [{"text": "long " * 40}, {"text": "another " * 40}])
    documents = data.read_documents([file])
    with pytest.raises(InputError, match="too little text for one row of 4000"):
        data.packed(documents, byte_tokenizer(), 4000, 0, {})
    with pytest.raises(InputError, match="tokenizer"):
        data.packed(documents, None, 16, 0, {})


def test_built_in_prompts_come_from_held_out_files():
    documents = stdlib.documents()
    trained = {d.text for d in documents if not d.held_out}
    assert 10 < len(documents) - len(trained) < 0.1 * len(documents)
    from_files = [prompt for prompt in read_prompts() if prompt.id.startswith("stdlib/")]
    assert from_files
    for prompt in from_files:
        assert stdlib.is_held_out(prompt.id.removeprefix("stdlib/").split(":")[0])


# ------------------------------------------------------------------ the target's own texts


@pytest.fixture(scope="module")
def target():
    return tiny("llama", vocab_size=TEXT_VOCAB, eos_token_id=EOS)


def what(**changes):
    return selfgen.SelfGeneration(**{"count": 6, "length": 24, "prompt_tokens": 8, "seed": 5, **changes})


def test_prompts_are_short_documents_or_windows_of_long_ones():
    documents = [[BOS, *range(50)], [BOS, 1, 2], []]
    prompts = selfgen.choose_prompts(documents, 40, 8, BOS, seed=1)
    assert len(prompts) == 40
    assert prompts.count([BOS, 1, 2]) == 20
    windows = [prompt for prompt in prompts if len(prompt) == 8]
    assert len({tuple(window) for window in windows}) > 10
    assert all(window[0] == BOS and window[2] == window[1] + 1 for window in windows)
    assert (
        selfgen.choose_prompts(documents, 40, 8, BOS, seed=1)
        == prompts
        != selfgen.choose_prompts(documents, 40, 8, BOS, 2)
    )


def test_own_texts_are_those_of_plain_decoding(target, tmp_path):
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    told = []
    rows = selfgen.own_texts(target, prompts, what(temperatures=(0.0, 1.0)), tmp_path, lambda *a: told.append(a))
    assert told == [(4, 4)]
    for i, prompt in enumerate(prompts):
        expected = reference(target, prompt, 24 - len(prompt), temperature=float(i % 2), seed=5 + i)
        if EOS in expected:
            expected = expected[: expected.index(EOS) + 1]
        text = [*prompt, *expected]
        assert rows.tokens_RL[i, : len(text)].tolist() == text
        assert rows.first_R[i] == len(prompt) - 1
        assert rows.last_R[i] == len(text) - (text[-1] == EOS)


def test_texts_are_made_once_and_an_interrupted_shard_again(target, tmp_path, monkeypatch):
    monkeypatch.setattr(selfgen, "_SHARD", 2)
    prompts = [[i] for i in range(5)]
    first = selfgen.own_texts(target, prompts, what(), tmp_path, lambda *_: None)
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 3
    monkeypatch.setattr(selfgen, "_shard", None)  # must not be called any more
    again = selfgen.own_texts(target, prompts, what(), tmp_path, lambda *_: None)
    assert (again.tokens_RL == first.tokens_RL).all()
    monkeypatch.undo()
    monkeypatch.setattr(selfgen, "_SHARD", 2)
    files[1].unlink()
    (files[1].parent / "0000002.partial").write_bytes(b"half")
    resumed = selfgen.own_texts(target, prompts, what(), tmp_path, lambda *_: None)
    assert resumed.digest() == first.digest()
    selfgen.own_texts(target, prompts, what(seed=6), tmp_path, lambda *_: None)
    assert len(list(tmp_path.iterdir())) == 2  # another seed, other texts


def test_sides_stay_apart_and_text_is_mixed_in(target, tmp_path, many):
    tokenizer = byte_tokenizer()
    documents = data.read_documents([many], 0.1)
    text = data.packed(documents, tokenizer, 48, 0, {"files": ["many"]})
    made = selfgen.self_generated(
        target, tokenizer, documents, text, what(text_share=0.25, length=48, prompt_tokens=40), tmp_path
    )
    assert len(made.train) == 6 + 2
    assert len(made.held_out) == 16
    assert made.train.first_R.tolist() == [0] * 8  # prompts count in training,
    assert (made.held_out.first_R >= 12).all()  # and not where it is judged
    assert made.source == {"self_generated": 6, "temperatures": [0.0, 1.0], "text_rows": 2}
    names = {d.text[:12] for d in documents if d.held_out}
    prompts = [tokenizer.decode(row[:12]) for row in made.train.tokens_RL[:6]]
    assert not names & set(prompts)
    assert {tokenizer.decode(row[:12]) for row in made.held_out.tokens_RL} <= names


@pytest.mark.parametrize(
    "changes", [{"count": 0}, {"prompt_tokens": 24}, {"temperatures": ()}, {"temperatures": (-1.0,)}, {"text_share": 1}]
)
def test_impossible_self_generation_is_refused(changes):
    with pytest.raises(InputError):
        what(**changes)
