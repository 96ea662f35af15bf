"""The store: claims, what is kept, and files that are no stores."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time

import pytest
from sweep_documents import cell, document, settings

from specdec.errors import InputError
from specdec.sweep import owner as owners
from specdec.sweep.owner import Owner
from specdec.sweep.store import SCHEMA, Store, load_document

KEYS = ["a", "b", "c"]
WANTED = [(key, setting.as_dict()) for key, setting in zip(KEYS, settings(3), strict=True)]


def a_cell(key: str, status: str = "done"):
    return {**cell(settings(1)[0], failed=status == "failed"), "key": key}


def living() -> Owner:
    """Another process that lives: the one that started this one."""
    return Owner(owners._host(), os.getppid(), owners._born(os.getppid()))


def test_a_cell_is_claimed_once(tmp_path):
    path = tmp_path / "s.db"
    with Store(path) as mine, Store(path, living()) as other:
        mine.want(WANTED)
        assert mine.claim(KEYS) == "a"
        assert other.claim(KEYS) == "b"
        mine.add(a_cell("a"))
        assert mine.counts().running == 1
        assert other.claim(KEYS) == "c"
        counts = mine.counts()
        assert (counts.total, counts.done, counts.failed, counts.running, counts.left) == (3, 1, 0, 2, 2)
        other.release("b")
        assert mine.claim(KEYS) == "b"
    assert Store(path).claim(KEYS) == "b", "a store that is closed gives its claims back"


def test_claims_of_the_dead_are_taken_over(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = Owner(owners._host(), int(done.stdout), "12345")
    impostor = Owner(owners._host(), os.getppid(), "1")  # the number is in use again, by a later process
    for gone in (dead, impostor):
        path = tmp_path / f"{gone.pid}.db"
        # Not closed: a process that is killed closes nothing.
        left = Store(path, gone)
        assert left.claim(KEYS) == "a"
        with Store(path) as store:
            assert store.claim(KEYS) == "a"
        left._connection.close()
    alive = Store(tmp_path / "alive.db", living())
    assert alive.claim(KEYS) == "a"
    assert Store(tmp_path / "alive.db").claim(KEYS) == "b"


def test_a_claim_from_another_machine_lives_while_it_beats(tmp_path, monkeypatch):
    path = tmp_path / "s.db"
    elsewhere = Store(path, Owner("another machine", 1, "1"))
    assert elsewhere.claim(KEYS) == "a"
    with Store(path) as store:
        assert store.claim(KEYS) == "b"
    later = time.time() + owners.SILENCE + 1
    monkeypatch.setattr(time, "time", lambda: later)
    elsewhere.beat()
    with Store(path) as store:
        assert store.claim(KEYS) == "b", "it has just been heard of"
    monkeypatch.setattr(time, "time", lambda: later + owners.SILENCE + 1)
    with Store(path) as store:
        assert store.claim(KEYS) == "a"


def test_the_first_result_stays_and_a_failure_is_replaced(tmp_path):
    with Store(tmp_path / "s.db") as store:
        assert store.add(a_cell("a", "failed"))
        assert store.claim(["a"]) is None
        assert store.claim(["a"], retry_failed=True) == "a"
        assert store.add(a_cell("a"))
        assert not store.add({**a_cell("a"), "identical": 0})
        assert store.cell("a")["identical"] == 3
        assert store.claim(["a"], retry_failed=True) is None
        assert store.cell("b") is None
        with pytest.raises(InputError, match="done or failed"):
            store.add({**a_cell("b"), "status": "nearly"})
        with pytest.raises(TypeError):
            store.add({**a_cell("b"), "speedup": object()})
        assert store.cell("b") is None, "all of it or nothing"


def test_numbers_that_json_does_not_have_are_null():
    """A cell that cannot be kept would end the sweep, and again whenever it is started."""
    with Store() as store:
        store.add({**a_cell("a"), "story": [{"p": float("nan"), "q": float("-inf"), "margin": 0.5}]})
        assert store.cell("a")["story"] == [{"p": None, "q": None, "margin": 0.5}]


def test_a_failure_since_the_beginning_is_not_tried_again():
    with Store() as store:
        store.add(a_cell("a", "failed"))
        began = time.time()
        assert store.claim(["a"], retry_failed=True, since=began) == "a"
        store.add(a_cell("a", "failed"))
        assert store.claim(["a"], retry_failed=True, since=began) is None
        assert store.claim(["a"], retry_failed=True, since=time.time()) == "a"


def test_cells_that_are_forgotten_are_to_be_run_and_keep_their_places(tmp_path):
    with Store(tmp_path / "s.db") as store:
        store.want(WANTED)
        for key in KEYS:
            store.add(a_cell(key))
        assert store.forget(["a", "c", "nothing"]) == 2
        assert [found["key"] for found in store.document()["cells"]] == ["b"]
        assert store.claim(KEYS) == "a"
        assert store.add({**a_cell("a"), "identical": 0})
        assert [found["identical"] for found in store.document()["cells"]] == [0, 3]


def test_cells_come_in_the_order_in_which_they_were_wanted(tmp_path):
    with Store(tmp_path / "s.db") as store:
        store.want(WANTED)
        for key in ("c", "a", "x", "b"):
            store.add(a_cell(key), {"threads": 1})
        store.want(reversed(WANTED))
        assert [found["key"] for found in store.document()["cells"]] == ["a", "b", "c", "x"]
        assert [found["key"] for found in store.document(["c", "b"])["cells"]] == ["b", "c"]


def test_environments_are_told_apart(tmp_path):
    with Store(tmp_path / "s.db") as store:
        store.add(a_cell("a"), {"device": "cpu"})
        store.add(a_cell("b"), {"device": "cuda"})
        store.add(a_cell("c"), {"device": "cpu"})
        found = store.document()
    assert len(found["environments"]) == 2
    assert [found["environments"][one["environment"]]["device"] for one in found["cells"]] == ["cpu", "cuda", "cpu"]
    assert found["environment"] == {"device": "cpu"}


def test_a_store_in_memory_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store() as store:
        store.add(a_cell("a"))
        assert store.counts().done == 1
    assert list(tmp_path.iterdir()) == []


def test_reading_changes_nothing(tmp_path):
    path = tmp_path / "s.db"
    with Store(path) as store:
        store.add(a_cell("a"))
    before = path.read_bytes()
    assert len(load_document(path)["cells"]) == 1
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["s.db"], "one file, once nobody works on it"


def test_a_store_can_be_read_while_it_is_written_to(tmp_path):
    path = tmp_path / "s.db"
    with Store(path) as store:
        store.add(a_cell("a"))
        store.claim(["b"])
        assert [found["key"] for found in load_document(path)["cells"]] == ["a"]


def test_files_that_are_no_stores_are_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a store", encoding="utf-8")
    foreign = tmp_path / "other.db"
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    newer = tmp_path / "newer.db"
    Store(newer).close()
    with sqlite3.connect(newer) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()
    for path, words in ((text, "no store"), (foreign, "another program"), (newer, f"schema {SCHEMA + 1}")):
        before = path.read_bytes()
        with pytest.raises(InputError, match=words):
            Store(path)
        assert path.read_bytes() == before
    for path, words in ((text, "neither a store"), (foreign, "another program"), (newer, "schema")):
        with pytest.raises(InputError, match=words):
            load_document(path)
    for path in (tmp_path, tmp_path / "nowhere" / "s.db"):
        with pytest.raises(InputError, match="folder"):
            Store(path)
    with pytest.raises(InputError, match="no such file"):
        load_document(tmp_path / "nothing.db")


def test_a_damaged_store_says_so(tmp_path):
    path = tmp_path / "s.db"
    with Store(path) as store:
        for key in range(50):
            store.add(a_cell(str(key)))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"damaged|cannot use"):
        load_document(path)
    with pytest.raises(InputError, match=r"damaged|cannot use"), Store(path) as store:
        store.document()


def test_json_that_is_no_document_is_refused(tmp_path):
    path = tmp_path / "cells.json"
    good = document(2)
    for content, words in (
        ({"rows": []}, '"cells"'),
        ({**good, "schema": 99}, "schema 99"),
        ({**good, "cells": [{"status": "done"}]}, "cell 1"),
        ([1], '"cells"'),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            load_document(path)
