"""`specdec report` and `specdec diff` as commands: files, filters, exit codes, and what they say."""

from __future__ import annotations

import copy
import csv
import json
from pathlib import Path

import pytest
from drift_documents import cell, document, grid, rates

from specdec.cli import main
from specdec.sweep.store import Store, load_document


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder to work in: `files(name, document)` writes one as JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return name

    return write


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_store_and_its_json_give_the_same_report(files, capsys):
    made = grid()
    with Store("sweep.db") as store:
        for one in made["cells"]:
            store.add(one, made["environment"])
    assert run(capsys, "report", "sweep.db", "--json", "all.json")[0] == 0
    assert len(load_document("all.json")["cells"]) == len(made["cells"])
    code, out, _ = run(capsys, "report", "sweep.db")
    assert code == 0
    assert out == run(capsys, "report", "all.json")[1]
    for text in ("24 cells", "Speed-up over the plain loop", "Acceptance by position", "● model"):
        assert text in out
    assert "along the text" not in out  # fills screens: on demand


def test_cells_are_chosen_by_expressions(files, capsys):
    files("a.json", grid())
    code, out, _ = run(
        capsys, "report", "a.json", "--only", "drafter == 'ngram'", "--skip", "temperature > 0", "--csv", "a.csv"
    )
    assert code == 0
    assert "a.csv (4 cells)" in out
    with open("a.csv", encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert {(row["drafter"], float(row["temperature"])) for row in rows} == {("ngram", 0.0)}
    assert run(capsys, "report", "a.json", "--only", "k > 99")[0] == 2


def test_files_are_written_instead_of_the_screen_unless_asked(files, capsys):
    files("a.json", grid())
    code, out, _ = run(capsys, "report", "a.json", "--requests", "r.jsonl", "--html", "a.html")
    assert code == 0
    assert out.splitlines() == ["written: r.jsonl (48 records)", "written: a.html (24 cells)"]
    assert "Speed-up over" in run(capsys, "report", "a.json", "--requests", "r.jsonl", "--show")[1]


def test_kinds_are_chosen_and_all_of_them_drawn(files, capsys):
    files("a.json", grid())
    out = run(capsys, "report", "a.json", "--kind", "heatmap")[1]
    assert "by temperature and verifier" in out
    assert "Acceptance by position" not in out
    out = run(capsys, "report", "a.json", "--kind", "all")[1]
    assert "along the text" in out
    with pytest.raises(SystemExit):
        main(["report", "a.json", "--kind", "pie"])
    assert "choose from speed" in capsys.readouterr().err


@pytest.mark.parametrize("extra", [[], ["--kind", "speed,heatmap"], ["--kind", "all"]])
def test_a_picture_is_one_command(files, capsys, extra):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'specdec[plots]'")
    files("a.json", grid())
    code, out, _ = run(capsys, "report", "a.json", "--plot", "a.svg", *extra)
    assert code == 0
    assert out.startswith("written: a.svg")


def test_times_that_lack_and_cells_that_failed_are_no_reason_to_fail(files, capsys):
    made = copy.deepcopy(grid())
    for one in made["cells"][:12]:
        for name in ("speedup", "plain", "speculative", "seconds", "bare_seconds", "ideal_speedup", "efficiency"):
            one[name] = None
    broken = {**made["cells"][0], "status": "failed", "error": {"type": "OutOfMemoryError", "message": "too large"}}
    files("a.json", {**made, "cells": [*made["cells"], {**broken, "setting": {**broken["setting"], "seed": 9}}]})
    code, out, _ = run(capsys, "report", "a.json")
    assert code == 0
    assert out.count("12 cells") == 2
    assert "too large" in out


def test_only_failures_are_nothing_to_report(files, capsys):
    one = grid()["cells"][0]
    failed = {**one, "status": "failed", "error": {"type": "E", "message": "m"}}
    files("a.json", document(failed))
    code, _, err = run(capsys, "report", "a.json")
    assert code == 2
    assert "no cell was finished" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["report", "none.db"], "no such file"),
        (["report", "a.json", "--plot", "a.gif"], "svg or .png"),
        (["report", "a.json", "--csv", "none/a.csv"], "cannot write"),
        (
            ["report", "a.json", "--kind", "pareto", "--only", "k == 1 and drafter == 'model' and temperature == 0"],
            "needs",
        ),
        (["diff", "a.json"], "two documents"),
        (["diff", "a.json", "a.json", "--gate", "a.json"], "two documents"),
        (["diff", "a.json", "a.json", "--tolerance", "0.1"], "--gate"),
        (["diff", "a.json", "a.json", "--level", "0.9"], "level"),
        (["diff", "a.json", "a.json", "--ignore", "colour"], "colour"),
        (["diff", "a.json", "a.json", "--ignore", "k"], "alike"),
    ],
)
def test_wrong_input_is_one_line_and_code_two(files, capsys, argv, message):
    files("a.json", grid())
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_diff_of_equal_stores_says_so_and_exits_with_zero(files, capsys):
    files("a.json", grid())
    code, out, _ = run(capsys, "diff", "a.json", "a.json", "--json", "d.json")
    assert code == 0
    assert "24 cells: 24 with the same rounds" in out
    assert "no identity lost" in out
    found = json.loads(Path("d.json").read_text(encoding="utf-8"))
    assert [pair["acceptance"]["verdict"] for pair in found["pairs"]] == ["same"] * 24


def test_diff_tells_the_environment_first_and_exits_with_one_for_a_lost_identity(files, capsys):
    before = document(cell(rates(16), seed=1, k=2), cell(rates(16), seed=2, k=4))
    after = document(before["cells"][0], cell(rates(16) - 0.2, seed=3, k=4, speed=2.0), device="cuda")
    files("a.json", before)
    files("b.json", after)
    code, out, _ = run(capsys, "diff", "a.json", "b.json")
    assert code == 0  # differences are told; they are no error
    assert out.index("device") < out.index("Accepted tokens per round") < out.index("Speed-up")
    assert "beyond noise" in out
    after["cells"][0]["rows"][1]["identical"] = False
    files("b.json", after)
    code, out, _ = run(capsys, "diff", "a.json", "b.json")
    assert code == 1
    assert "identity lost on p1" in out


def test_a_store_of_two_sweeps_is_no_obstacle(files, capsys):
    old = {**cell(rates(12), seed=2, key="old"), "when": "2026-01-01T00:00:00+00:00"}
    new = {**cell(rates(12), seed=1), "when": "2026-02-01T00:00:00+00:00"}
    files("two.json", document(new, old))
    files("one.json", document(new))
    code, out, _ = run(capsys, "diff", "two.json", "one.json")
    assert code == 0
    assert "the newest counts" in out
    code, out, _ = run(capsys, "diff", "two.json", "--gate", "one.json")
    assert code == 0
    assert "the newest counts" in out
    heads = [line for line in out.splitlines() if line.startswith(("reference", "judged"))]
    assert [("(2026-02-01 00:00, specdec 0.1.0, torch 2.13.0)" in line) for line in heads] == [True, True]


def test_diff_without_common_settings_says_what_to_do(files, capsys):
    files("a.json", document(cell(rates(8), seed=1, target="org/a")))
    files("b.json", document(cell(rates(8), seed=1, target="org/b")))
    code, out, _ = run(capsys, "diff", "a.json", "b.json")
    assert code == 0
    assert "--ignore FIELDS" in out
    out = run(capsys, "diff", "a.json", "b.json", "--ignore", "target,draft")[1]
    assert "paired without target, draft" in out
    assert "target: org/a → org/b" in out


@pytest.mark.parametrize(
    ("seed", "drop", "tolerance", "code", "word"),
    [(1, 0.0, 0.05, 0, "PASS"), (2, 0.3, 0.05, 1, "FAIL"), (2, 0.0, 0.01, 2, "NOT ENOUGH DATA")],
)
def test_the_gates_exit_codes(files, capsys, seed, drop, tolerance, code, word):
    files("reference.json", document(cell(rates(12), seed=1)))
    files("now.json", document(cell(rates(12) - drop, seed=seed)))
    got, out, _ = run(
        capsys, "diff", "now.json", "--gate", "reference.json", "--tolerance", tolerance, "--json", "g.json"
    )
    assert (got, word in out) == (code, True)
    assert json.loads(Path("g.json").read_text(encoding="utf-8"))["exit_code"] == code


def test_help_has_examples(capsys):
    for command in ("report", "diff"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        out = capsys.readouterr().out
        assert f"  specdec {command} " in out
        assert "examples:" in out
