"""Processes that die, and processes side by side: nothing is lost, nothing is done twice, figures are the same."""

from __future__ import annotations

import json
import os
import random
import time
from types import SimpleNamespace

import pytest
from sweep_worker import FAST, acceptance, cells_of, grid, processes, save_pair, work

from specdec.sweep.engine import Engine, sweep
from specdec.sweep.store import Store, load_document

AXES = {"k": [1, 2, 4], "temperature": [0.0, 0.8], "verifier": ["coupled", "ratio"]}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return grid(save_pair(tmp_path_factory.mktemp("pair")), AXES, max_new_tokens=8, limit=2)


@pytest.fixture(scope="module")
def undisturbed(settings):
    engine = Engine(FAST)
    with Store() as store:
        sweep(store, cells_of(engine, settings), engine)
        return store.document()


def contents(settings):
    return [json.loads(json.dumps(setting.as_dict())) for setting in settings]


def test_a_sweep_that_is_killed_again_and_again_ends_as_if_nothing_had_happened(settings, undisturbed, tmp_path):
    path, log = tmp_path / "sweep.db", tmp_path / "log"
    context, chance = processes(), random.Random(5)
    seen = [0]
    for _ in range(30):
        process = context.Process(target=work, args=(str(path), contents(settings), str(log)))
        process.start()
        # Somewhere in the next cells: beginnings, ends and the moments in which one is written.
        wanted = seen[-1] + chance.randrange(1, 3)
        while process.is_alive() and (not log.exists() or len(log.read_text().splitlines()) < wanted):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.join()
        seen.append(len(load_document(path)["cells"]))
        if seen[-1] == len(settings):
            break
    assert len(seen) >= 6, "killed too seldom to mean anything"
    assert seen == sorted(seen)
    found = load_document(path)
    assert len(settings) == 12 == len(found["cells"])
    assert acceptance(found) == acceptance(undisturbed)
    assert [cell["key"] for cell in found["cells"]] == [cell["key"] for cell in undisturbed["cells"]]
    # What was being run when its process died, and nothing else, was run again.
    assert len(log.read_text().splitlines()) <= len(settings)


def test_two_processes_share_a_store_and_the_work(settings, undisturbed, tmp_path):
    path, log = tmp_path / "sweep.db", tmp_path / "log"
    context = processes()
    both = [context.Process(target=work, args=(str(path), contents(settings), str(log))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    ran = log.read_text().splitlines()
    assert sorted(ran) == sorted({cell["key"] for cell in undisturbed["cells"]}), "each cell once"
    assert acceptance(load_document(path)) == acceptance(undisturbed)


def test_a_claim_dies_with_its_process(settings, tmp_path):
    path = tmp_path / "sweep.db"
    engine = Engine(FAST)
    keys = list(cells_of(engine, settings))
    child = os.fork()
    if not child:  # claims a cell, and is gone without a word
        Store(path).claim(keys)
        os._exit(0)
    os.waitpid(child, 0)
    with Store(path) as store:
        assert store.claim(keys) == keys[0]


def test_jobs_stop_when_their_parent_is_gone(settings, tmp_path, monkeypatch):
    from specdec.sweep import jobs

    path = tmp_path / "sweep.db"
    contents = {key: setting.as_dict() for key, setting in cells_of(Engine(FAST), settings[:2]).items()}
    for alive in (False, True):
        parent = SimpleNamespace(is_alive=lambda alive=alive: alive)
        monkeypatch.setattr(jobs.multiprocessing, "parent_process", lambda parent=parent: parent)
        jobs.work(str(path), contents, FAST, False)
        assert len(load_document(path)["cells"]) == (2 if alive else 0)
