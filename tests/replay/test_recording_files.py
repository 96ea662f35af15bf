"""Recordings in files: what was saved is loaded, and nothing else is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_drafters
from safetensors.numpy import save_file

import specdec
from specdec.errors import InputError
from specdec.policy import Fixed
from specdec.replay import Recording, record, replay
from specdec.replay.recording import LAYOUT, bytes_per_position


@pytest.fixture(scope="module")
def made() -> Recording:
    decoder = specdec.SpeculativeDecoder(tiny_drafters.target(), drafter=tiny_drafters.shared("model"))
    return record(decoder, [[3, 5, 7], [2, 4]], depth=3, top_m=5, costs=False, max_new_tokens=8, names=["a", "b"])


def test_what_was_saved_is_loaded(made: Recording, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    made.save(path)
    loaded = Recording.load(path)
    assert dict(loaded.meta) == json.loads(json.dumps(made.meta))
    for name in LAYOUT:
        np.testing.assert_array_equal(loaded.arrays[name], made.arrays[name])
        assert loaded.arrays[name].dtype == made.arrays[name].dtype
    assert [text.num_prompt_tokens for text in loaded.texts] == [3, 2]
    assert replay(loaded, Fixed(3)).stats == replay(made, Fixed(3)).stats
    assert not list(tmp_path.glob("*.partial"))


def test_the_size_is_what_was_stated(made: Recording) -> None:
    positions = len(made.arrays["tokens_P"])
    size = sum(made.arrays[name].nbytes for name, (_, letters) in LAYOUT.items() if letters.startswith("P"))
    assert size == positions * bytes_per_position(3, 5)


def test_rows_and_tails_are_whole(made: Recording) -> None:
    drafted = made.arrays["drafted_PK"][:, 0] >= 0  # there is no room for a draft before the last token
    assert drafted.sum() == len(drafted) - 2
    for who in ("target", "draft"):
        logs, tails = made.arrays[f"{who}_logp_PM"][drafted], made.arrays[f"{who}_tail_P"][drafted]
        np.testing.assert_allclose(np.exp(logs.astype(np.float64)).sum(1) + tails, 1, atol=1e-6)
        assert (np.diff(logs, axis=1) <= 0).all()
    overlap = made.arrays["overlap_P"][drafted]
    assert ((overlap > 0) & (overlap <= 1 + 1e-6)).all()


def test_a_drafter_without_rows_has_none(tmp_path: Path) -> None:
    decoder = specdec.SpeculativeDecoder(tiny_drafters.target(), drafter="ngram")
    found = record(decoder, [tiny_drafters.PROMPT], depth=2, top_m=4, costs=False, max_new_tokens=6)
    found.save(tmp_path / "n.safetensors")
    loaded = Recording.load(tmp_path / "n.safetensors")
    assert not loaded.has_rows
    assert loaded.arrays["draft_ids_PM"].shape == (6, 0)
    assert replay(loaded, Fixed(2)).exact


def write(made: Recording, path: Path, meta: Any = None, **arrays: np.ndarray) -> Path:
    content = {name: np.ascontiguousarray(array) for name, array in {**made.arrays, **arrays}.items()}
    save_file(content, path, metadata={"specdec": json.dumps(made.meta if meta is None else meta)})
    return path


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    found = array.copy()
    found[index] = value
    return found


def test_damaged_files_are_refused(made: Recording, tmp_path: Path) -> None:
    path, a = tmp_path / "bad.safetensors", made.arrays
    cases: list[tuple[str, Any, dict[str, np.ndarray]]] = [
        ("outside the vocabulary", None, {"tokens_P": changed(a["tokens_P"], 0, 64)}),
        ("outside the vocabulary", None, {"drafted_PK": changed(a["drafted_PK"], (0, 0), -2)}),
        ("gap", None, {"drafted_PK": changed(a["drafted_PK"], (0, 0), -1)}),
        ("add up", None, {"texts_TC": changed(a["texts_TC"], (0, 1), 9)}),
        ("shorter than nothing", None, {"texts_TC": changed(a["texts_TC"], (0, 2), 0)}),
        ("shorter than nothing", None, {"texts_TC": changed(a["texts_TC"], (0, 2), 99)}),
        ("impossible numbers", None, {"text_p_P": changed(a["text_p_P"], 0, np.nan)}),
        ("where others have", None, {"place_PK": a["place_PK"][:, :2]}),
        ("where others have", None, {"tokens_P": a["tokens_P"][:-1]}),
        ("place_PK is", None, {"place_PK": a["place_PK"].astype(np.int64)}),
        ("tokens_P is", None, {"tokens_P": a["tokens_P"][:, None]}),
        ("its tensors are", None, {"more": a["tokens_P"]}),
        ("format", {**made.meta, "format": 99}, {}),
        ("format", [1], {}),
        ("no memory", {key: value for key, value in made.meta.items() if key != "memory"}, {}),
        ("no vocab_size", {**made.meta, "vocab_size": "64"}, {}),
        ("impossible things", {**made.meta, "memory": "elephant"}, {}),
        ("impossible things", {**made.meta, "vocab_size": 0}, {}),
        ("texts and prompts", {**made.meta, "prompts": ["a"]}, {}),
    ]
    for words, meta, arrays in cases:
        with pytest.raises(InputError, match=words):
            Recording.load(write(made, path, meta, **arrays))
    Recording.load(write(made, path))  # the writer of this test writes good files too


def test_other_files_are_refused(made: Recording, tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    made.save(path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-8], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a recording"):
            Recording.load(path)
    save_file(dict(made.arrays), path)  # no header of ours
    with pytest.raises(InputError, match="header"):
        Recording.load(path)
    save_file(dict(made.arrays), path, metadata={"specdec": "{"})
    with pytest.raises(InputError, match="JSON"):
        Recording.load(path)
    with pytest.raises(InputError, match="specdec record"):
        Recording.load(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match="no file"):
        Recording.load(tmp_path)


def test_a_file_that_cannot_be_written(made: Recording, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        made.save(tmp_path / "nowhere" / "t.safetensors")
