"""Cells as they are run: models loaded once, prompts forked, batches, acceptance alone, failures."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from sweep_worker import FAST, acceptance, cells_of, grid, save_pair

from specdec.bench import bare
from specdec.bench.compare import compare
from specdec.bench.comparison import PLAIN, SPECULATIVE
from specdec.bench.forks import PromptForks
from specdec.bench.prompts import Prompt
from specdec.bench.timing import Gate
from specdec.errors import InputError
from specdec.sweep import engine as module
from specdec.sweep import pool as pools
from specdec.sweep.engine import Engine, Run, has_bug, sweep
from specdec.sweep.pool import Pool, text_options
from specdec.sweep.setting import Setting, labels
from specdec.sweep.store import Store


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    monkeypatch.setattr(module, "Gate", lambda *_, **__: Gate(read=lambda: None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


def swept(settings, run=FAST, **options):
    engine = Engine(run)
    with Store() as store:
        sweep(store, cells_of(engine, settings), engine, **options)
        return store.document()["cells"], engine


def test_a_timed_cell_has_every_field(folder):
    (cell,), _ = swept(grid(folder, {"k": [3]}), Run(repetitions=2, alone=False))
    assert cell["status"] == "done"
    names = "key setting prompts repetitions identical divergences plain speculative speedup ideal_speedup efficiency"
    names += " stats seconds bare_seconds peak_memory_bytes slices clean_slices rows memory timing when cell_seconds"
    assert set(names.split()) <= set(cell)
    assert cell["identical"] == cell["prompts"] == 3
    assert cell["repetitions"] == 2
    assert cell["timing"]["prefill"] == "forked"
    for row in cell["rows"]:
        assert sum(row["rounds"]["emitted"]) >= row["num_tokens"]
        assert all(n >= e >= a for n, e, a in zip(*_columns(row), strict=True))
    accepted = sum(sum(row["rounds"]["accepted"]) for row in cell["rows"])
    assert 2 * accepted == cell["stats"]["num_accepted_draft_tokens"], "rows tell one repetition"
    target = sum(p.nbytes for p in torch.nn.Module.parameters(_target(folder)))
    assert cell["memory"]["target_weights"] >= target
    assert cell["memory"]["draft_weights"] > 0 < cell["memory"]["kv"]


def _columns(row):
    return [row["rounds"][name] for name in ("nodes", "evaluated", "accepted")]


def _target(folder):
    return Pool().decoder(grid(folder, {"k": [1]})[0]).target


def test_acceptance_alone_is_that_of_timed_cells_and_has_no_times(folder):
    settings = grid(folder, {"k": [3], "temperature": [0.0, 0.8], "drafter": [str(folder / "draft"), "ngram"]})
    alone, _ = swept(settings)
    timed, _ = swept(settings, Run(repetitions=1, alone=False))
    for a, b in zip(alone, timed, strict=True):
        (left,), (right,) = (acceptance({"cells": [cell]}).values() for cell in (a, b))
        assert left == right
        assert a["speedup"] is a["plain"] is a["seconds"] is a["rows"][0]["speedup"] is None
        assert b["speedup"]["low"] <= b["speedup"]["median"] <= b["speedup"]["high"]
        assert a["key"] != b["key"], "cells with times are not those without"


def test_models_are_loaded_once_and_plain_texts_decoded_once(folder, monkeypatch):
    loaded, plain = [], []
    real, decode = pools.load_model, pools.SpeculativeDecoder.generate_plain
    monkeypatch.setattr(pools, "load_model", lambda source, **o: loaded.append(source) or real(source, **o))
    monkeypatch.setattr(
        pools.SpeculativeDecoder, "generate_plain", lambda self, *a, **o: plain.append(a) or decode(self, *a, **o)
    )
    settings = grid(
        folder, {"drafter": [str(folder / "draft"), "ngram"], "k": [1, 2], "verifier": ["coupled", "match"]}
    )
    cells, engine = swept(settings)
    assert [cell["status"] for cell in cells] == ["done"] * 8
    assert loaded == [str(folder / "target")]
    assert engine.pool.num_loads == 1 + 2
    assert len(plain) == 2 * 3, "for each drafter, each prompt"


def test_prompts_are_prefilled_once_and_forked(folder, monkeypatch):
    """Every forward of a timed call has few rows: no prompt is computed in it."""
    monkeypatch.setattr(bare, "measure", lambda *_: bare.BareCosts({1: 1.0, 3: 1.0}))
    setting = grid(folder, {"k": [2]})[0]
    engine = Engine(Run(repetitions=2, alone=False))
    decoder = engine.pool.decoder(setting)
    engine.cell(setting)
    forks = engine.pool.forks(setting)
    longest = max(len(one.ids) for one in engine.pool.prompts(setting, decoder))
    # Target and draft, each of three prompts, and the warm-up's.
    assert forks.num_computed == 2 * 4
    assert forks.num_forked >= 2 * (3 * 3)
    widths = []
    backend = type(decoder.backend)
    real = backend.forward
    monkeypatch.setattr(backend, "forward", lambda self, step: widths.append(step.num_rows) or real(self, step))
    engine.cell(setting)
    assert max(widths) <= 3 < longest
    assert forks.num_computed == 2 * 4


@pytest.mark.parametrize("drafter", ["ngram", "draft"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_forked_prompts_give_the_same_texts(folder, drafter, temperature):
    name = "ngram" if drafter == "ngram" else str(folder / drafter)
    setting = grid(folder, {"drafter": [name], "k": [3], "temperature": [temperature]})[0]
    pool = Pool()
    decoder = pool.decoder(setting)
    prompts = pool.prompts(setting, decoder)
    for forks in (PromptForks(), PromptForks(limit=0)):
        made = compare(
            decoder, prompts, text_options(setting), repetitions=2, forks=forks, gate=Gate(read=lambda: None)
        )
        for row, prompt in zip(made.rows, prompts, strict=True):
            alone = decoder.generate_plain(list(prompt.ids), **text_options(setting))
            assert all(list(run.tokens) == alone.tokens for m in (PLAIN, SPECULATIVE) for run in row.runs[m])
        assert made.num_identical() == 3
    assert decoder.prefixes.limit == 0, "the decoder has its own cache again"


def test_forks_without_room_keep_what_is_at_work(folder):
    setting = grid(folder, {"k": [2]})[0]
    pool = Pool()
    decoder = pool.decoder(setting)
    prompts = pool.prompts(setting, decoder)
    forks = PromptForks(limit=1)
    compare(decoder, prompts, text_options(setting), repetitions=2, forks=forks, gate=Gate(read=lambda: None))
    assert forks.num_computed > 2 * 3, "prompts that had to go are computed again, outside of timed calls"
    kept = {key[-1] for key in forks._prompts}
    assert len(kept) == 1


def test_batches_decode_together_and_count_once(folder):
    setting = grid(folder, {"k": [3], "batch": [2]}, limit=3)[0]
    pool = Pool()
    decoder = pool.decoder(setting)
    prompts = pool.prompts(setting, decoder)
    calls = []
    real = decoder.generate
    decoder.generate = lambda ids, **o: calls.append(ids) or real(ids, **o)
    options = {**text_options(setting), "max_new_tokens": 6}
    made = compare(decoder, prompts, options, repetitions=2, warmup=0, batch=2, gate=Gate(read=lambda: None))
    assert [len(ids) if isinstance(ids[0], list) else 1 for ids in calls] == [2, 1, 2, 1]
    assert [row.group for row in made.rows] == [0, 0, 1]
    report = made.as_dict()
    assert (report["identical"], report["slices"]) == (3, 2 * 2 * 2)
    first, second, _ = made.rows
    for method in (PLAIN, SPECULATIVE):
        rates = [row.runs[method][0].tokens_per_second for row in (first, second)]
        assert rates[0] == pytest.approx(rates[1]), "texts that decode together have one rate"
    # The interval knows of two groups, not of three prompts.
    assert made.ratio(SPECULATIVE, PLAIN).median == pytest.approx(
        statistics.median([*first.ratios(SPECULATIVE, PLAIN), *made.rows[2].ratios(SPECULATIVE, PLAIN)])
    )
    one = compare(decoder, prompts, options, repetitions=1, warmup=0, gate=Gate(read=lambda: None))
    assert [row.runs[PLAIN][0].tokens for row in one.rows] == [row.runs[PLAIN][0].tokens for row in made.rows]


def test_bare_costs_of_a_batch_are_shares(folder, monkeypatch):
    decoder = Pool().decoder(grid(folder, {"k": [2]})[0])
    widths = []
    real = bare.forwards

    def recorded(decoder, text, wanted, draft_width=1):
        widths.append((list(wanted), draft_width))
        return real(decoder, text, wanted, draft_width)

    monkeypatch.setattr(bare, "forwards", recorded)
    costs = bare.measure(decoder, [5, 6, 7], [1, 3], batch=4)
    assert widths == [([4, 12], 4)]
    assert set(costs.target) == {1, 3}
    with pytest.raises(InputError, match="batch"):
        compare(decoder, [Prompt("a", "x")], {}, batch=0)


# ------------------------------------------------------------------ failures


def test_cells_that_cannot_run_are_recorded_and_the_others_run(folder):
    draft = str(folder / "draft")
    axes = {"drafter": ["ngram", draft, "sufix", str(folder / "nowhere")], "k": [2], "tree": [[2, 2]]}
    axes["verifier"] = ["coupled", "typical"]
    cells, _ = swept(grid(folder, axes))
    names = labels([Setting.of(cell["setting"]) for cell in cells])
    cells = [{**cell, "label": name} for cell, name in zip(cells, names, strict=True)]
    assert len(cells) == 4 * 2 * 2
    errors = {cell["label"]: cell["error"]["type"] for cell in cells if cell["status"] == "failed"}
    assert errors["ngram 2x2 T=0"] == "IncompatiblePairError", "chains only"
    assert errors["sufix k=2 T=0"] == "UnknownPluginError"
    assert errors["draft k=2 typical T=0"] == "InputError", "--allow-lossy"
    done = [cell["label"] for cell in cells if cell["status"] == "done"]
    assert done == ["ngram k=2 T=0", "draft k=2 T=0", "draft 2x2 T=0"]
    assert "allow_lossy" in next(c["error"]["message"] for c in cells if c["label"] == "draft k=2 typical T=0")
    lossy, _ = swept(grid(folder, {"verifier": ["typical"], "k": [2]}), Run(timed=False, allow_lossy=True))
    assert [cell["stats"]["lossless"] for cell in lossy] == [False]


def test_memory_that_runs_out_fails_one_cell_and_lets_go_of_the_models(folder, monkeypatch):
    settings = grid(folder, {"k": [1, 2, 3]})
    real, seen = module.accept, []

    def full(decoder, *arguments, **options):
        seen.append(decoder)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(decoder, *arguments, **options)

    monkeypatch.setattr(module, "accept", full)
    cells, engine = swept(settings)
    assert [cell["status"] for cell in cells] == ["done", "failed", "done"]
    assert cells[1]["error"] == {"type": "OutOfMemoryError", "message": "CUDA out of memory"}
    assert engine.pool.num_loads == 2 * 2, "the third cell loads them again"


def test_failed_cells_run_again_when_asked_for(folder, monkeypatch):
    settings = grid(folder, {"k": [1, 2]})
    engine = Engine(FAST)
    real = module.accept
    with Store() as store:
        monkeypatch.setattr(module, "accept", lambda *_, **__: 1 / 0)
        assert sweep(store, cells_of(engine, settings), engine) == 2
        assert store.counts().failed == 2
        monkeypatch.setattr(module, "accept", real)
        assert sweep(store, cells_of(engine, settings), engine) == 0
        assert sweep(store, cells_of(engine, settings), engine, retry_failed=True) == 2
        assert (store.counts().done, store.counts().failed) == (2, 0)


def test_a_cell_that_fails_again_is_tried_once_by_all_processes_together(folder, monkeypatch, tmp_path):
    cells = cells_of(Engine(FAST), grid(folder, {"k": [1, 2]}))
    monkeypatch.setattr(module, "accept", lambda *_, **__: 1 / 0)
    with Store(tmp_path / "s.db") as store:
        assert sweep(store, cells, Engine(FAST)) == 2
        began = time.time()
        ran = [sweep(store, cells, Engine(FAST), retry_failed=True, began=began) for _ in range(3)]
    assert ran == [2, 0, 0]


def test_threads_of_the_environment_are_those_that_the_cell_will_have(folder):
    setting = grid(folder, {"k": [2]}, threads=3)[0]
    assert Engine(FAST).environment(setting)["threads"] == 3
    assert Engine(FAST).environment(setting.changed(target="embedded", threads=None))["threads"] == 1


def test_an_interrupted_cell_is_nobodys(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    engine = Engine(FAST)
    cells = cells_of(engine, grid(folder, {"k": [1]}))
    monkeypatch.setattr(module, "accept", interrupted)
    with Store() as store:
        with pytest.raises(KeyboardInterrupt):
            sweep(store, cells, engine)
        assert store.counts().running == 0
        assert store.claim(cells) is not None


def test_a_wrong_verifier_is_a_bug(folder, monkeypatch):
    from specdec.verifiers import Coupled

    from specdec.verifier import Verdict

    def wrong(self, p, proposal, position, chance):
        if len(proposal.tree):
            return Verdict.of(0, p[1].argmax())
        return right(self, p, proposal, position, chance)

    right = Coupled.verify
    settings = grid(folder, {"k": [3]})
    assert not any(map(has_bug, swept(settings)[0]))
    plain = Engine(FAST)
    decoder = plain.pool.decoder(settings[0])
    texts = plain.pool.plain(settings[0])
    for prompt in plain.pool.prompts(settings[0], decoder):  # the right ones, before the rule breaks
        texts[tuple(prompt.ids)] = decoder.generate_plain(list(prompt.ids), **text_options(settings[0]))
    monkeypatch.setattr(Coupled, "verify", wrong)
    cell = plain.cell(settings[0])
    assert cell["identical"] < cell["prompts"]
    assert has_bug(cell)


# ------------------------------------------------------------------ keys


def test_other_weights_prompts_and_measurements_are_other_cells(folder, tmp_path):
    pair = save_pair(tmp_path)
    setting = grid(pair, {"k": [2]})[0]
    key = Engine(FAST).key(setting)
    assert Engine(FAST).key(setting) == key
    assert Engine(Run()).key(setting) != key
    assert Engine(Run(repetitions=5)).key(setting) != Engine(Run()).key(setting)
    assert Engine(Run(timed=False, repetitions=5)).key(setting) == key, "repetitions do not matter without times"
    prompts = pair / "prompts.txt"
    prompts.write_text(prompts.read_text() + "\nmore", encoding="utf-8")
    assert Engine(FAST).key(setting) == key, "the first three are the same"
    prompts.write_text("other\n" + prompts.read_text(), encoding="utf-8")
    assert Engine(FAST).key(setting) != key
    key = Engine(FAST).key(setting)
    weights = pair / "draft" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    from specdec.sweep import identity

    identity._folder.cache_clear()  # within one process, a folder is looked at once
    assert Engine(FAST).key(setting) != key
    with pytest.raises(InputError, match="cannot read prompts"):
        Engine(FAST).key(setting.changed(prompt_set=str(tmp_path / "nowhere.jsonl")))


def test_a_folder_that_has_a_plugins_name_is_not_it(folder, tmp_path, monkeypatch):
    setting = grid(folder, {"drafter": ["ngram"], "k": [2]})[0]
    key = Engine(FAST).key(setting)
    (tmp_path / "ngram").mkdir()
    (tmp_path / "ngram" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert Engine(FAST).key(setting) == key
