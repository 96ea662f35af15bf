"""`specdec sweep` as people run it: tables, files, resuming, exit codes."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sweep_documents import document, settings
from sweep_worker import save_pair

from specdec import cli
from specdec.bench import bare
from specdec.cli import sweep_screen
from specdec.cli.sweep_board import Board
from specdec.errors import InputError
from specdec.loading import EMBEDDED
from specdec.sweep import engine, export, identity
from specdec.sweep.engine import Run
from specdec.sweep.store import Store, load_document

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sweeps.md"
# Of the page's commands: how long they take is not what is tested.
SHORTER = ("--limit", "1", "--max-new-tokens", "6", "--repetitions", "1", "--warmup", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def sweep(folder, capsys, monkeypatch):
    """Runs the command on a tiny pair; returns (exit code, stdout, stderr)."""
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)

    def call(*arguments: str, pair: bool = True):
        models = ("--target", str(folder / "target"), "--prompts", str(folder / "prompts.txt"), "--backend", "eager")
        usual = ("--max-new-tokens", "8", "--limit", "2", "--acceptance-only")
        given = [*(models if pair else ()), *(usual if pair else ()), *arguments]
        code = invoke("sweep", *given)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def invoke(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def test_a_table_and_every_export(sweep, folder, tmp_path):
    files = {kind: tmp_path / f"cells.{kind}" for kind in ("json", "csv")}
    outputs = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    code, out, err = sweep("--drafter", f"ngram,{folder / 'draft'}", "--k", "1,3", "--temperature", "0,0.8", *outputs)
    assert code == 0
    table = [line for line in out.splitlines() if re.match(r"(ngram|draft) ", line)]
    assert len(table) == 8
    assert len({line.index("✓") for line in table}) == 1, "columns are aligned"
    assert "8/8" in err
    made = load_document(files["json"])
    assert [cell["setting"]["k"] for cell in made["cells"]] == [1, 3] * 4
    rows = list(csv.DictReader(files["csv"].open(encoding="utf-8")))
    assert list(rows[0]) == list(export.COLUMNS)
    for row, cell in zip(rows, made["cells"], strict=True):
        assert float(row["mean_acceptance_length"]) == cell["stats"]["mean_acceptance_length"]
        assert row["drafter"] == cell["setting"]["drafter"]
        assert row["speedup"] == ""
        assert row["status"] == "done"


def test_timed_cells_say_what_was_timed(sweep, monkeypatch):
    monkeypatch.setattr(engine, "compare", lambda *a, **o: real(*a, **{**o, "gate": engine.Gate(read=lambda: None)}))
    from specdec.bench.compare import compare as real

    monkeypatch.setattr("specdec.cli.screen.warm_up", lambda *_: None)
    base = ("--drafter", "ngram", "--k", "2", "--repetitions", "2", "--warmup", "1")
    flags = cli.build_parser("sweep").parse_args(["sweep", *base])
    assert not flags.acceptance_only
    code, out, _ = sweep(*base, "--prompts", "built-in", "--only", "prompt_set != 'built-in'")
    assert code == 0
    assert "acceptance alone" in out
    code, out, _ = _timed(sweep, *base)
    assert code == 0
    assert "prefilled once and forked" in out
    assert re.search(r"\d\.\d\d× +\d\.\d\d – \d\.\d\d", out)
    _, out, _ = _timed(sweep, *base, "--with-prefill")
    assert "prefill included" in out


def _timed(sweep, *arguments):
    """The same without --acceptance-only."""
    import specdec.cli.sweep as command

    real = command.build_run
    command.build_run = lambda given: Run(repetitions=2, fork=not given.with_prefill)
    try:
        return sweep(*arguments)
    finally:
        command.build_run = real


def test_a_sweep_goes_on_where_it_was(sweep, tmp_path, monkeypatch):
    store = str(tmp_path / "sweep.db")
    assert sweep("--drafter", "ngram", "--k", "1,2", "--store", store)[0] == 0
    ran = []
    real = engine.accept
    monkeypatch.setattr(engine, "accept", lambda *a, **o: ran.append(1) or real(*a, **o))
    code, out, err = sweep("--drafter", "ngram", "--k", "1,2,3", "--store", store)
    assert code == 0
    assert "2 of 3 cells are in the store" in err
    assert len(ran) == 1
    assert "3 cells" in out
    code, out, _ = sweep("--drafter", "ngram", "--k", "2", "--store", store, "--json", str(tmp_path / "one.json"))
    assert len(load_document(tmp_path / "one.json")["cells"]) == 1, "this sweep's cells, not all of the store's"
    assert len(load_document(store)["cells"]) == 3


def test_cells_from_elsewhere_are_told_and_measured_again_when_asked_for(sweep, tmp_path, monkeypatch):
    store = str(tmp_path / "sweep.db")
    asked = ("--drafter", "ngram", "--k", "1,2", "--store", store)
    real, accept = identity.environment, engine.accept

    def older(*arguments):
        found = real(*arguments)
        return {**found, "machine": "another name", "versions": {**found["versions"], "specdec": "0.0.1"}}

    with monkeypatch.context() as then:
        then.setattr(identity, "environment", older)
        sweep(*asked)
        assert "other versions" not in sweep(*asked)[2]
    sweep("--drafter", "ngram", "--k", "4", "--store", store)
    ran = []
    monkeypatch.setattr(engine, "accept", lambda *a, **o: ran.append(1) or accept(*a, **o))
    said = " ".join(sweep(*asked)[2].split())
    assert "2 of them were measured by other versions" in said
    assert "versions.specdec: 0.0.1 →" in said
    assert "machine:" not in said, "a name makes no difference"
    assert not ran
    assert "2 to run" in sweep(*asked, "--fresh", "--dry-run")[1]
    assert len(load_document(store)["cells"]) == 3, "only looked at"
    code, _, err = sweep(*asked, "--fresh")
    assert code == 0
    assert len(ran) == 2
    assert "in the store" not in err
    document = load_document(store)
    assert [cell["setting"]["k"] for cell in document["cells"]] == [1, 2, 4], "the other sweep's cell is still there"
    assert {place["versions"]["specdec"] for place in document["environments"].values()} != {"0.0.1"}
    assert len(document["environments"]) == 1
    assert "other versions" not in sweep(*asked)[2]


def test_failures_are_told_once_for_each_reason(sweep):
    code, out, _ = sweep("--drafter", "ngram,sufix", "--k", "1,2,3,4")
    assert code == 0
    assert "4 failed" in out
    assert out.count("did you mean 'suffix'") == 1
    assert "sufix k=1 T=0, sufix k=2 T=0, sufix k=3 T=0 and 1 more: UnknownPluginError" in out
    assert sweep("--drafter", "sufix", "--k", "1")[0] == 1, "nothing ran"


def test_a_bug_exits_1(sweep, monkeypatch):
    assert sweep("--drafter", "ngram", "--k", "1")[0] == 0
    monkeypatch.setattr(engine, "has_bug", lambda cell: True)
    assert sweep("--drafter", "ngram", "--k", "1")[0] == 1


def test_dry_run_runs_nothing(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "accept", lambda *_, **__: pytest.fail("a cell was run"))
    store = str(tmp_path / "sweep.db")
    code, out, _ = sweep("--drafter", "ngram", "--k", "1,2", "--store", store, "--dry-run")
    assert code == 0
    assert "2 cells: 0 done, 0 failed, 2 to run" in out
    assert re.search(r"about \d+ s", out)
    assert load_document(store)["cells"] == []


def test_several_processes(sweep, tmp_path):
    file = tmp_path / "out.json"
    code, _, err = sweep("--drafter", "ngram", "--k", "1,2,3", "--jobs", "2", "--threads", "1", "--json", str(file))
    assert code == 0
    assert "disturb" not in err, "acceptance is not disturbed"
    cells = load_document(file)["cells"]
    assert [cell["setting"]["k"] for cell in cells] == [1, 2, 3]
    assert not any(cell["timing"]["alone"] for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--k", "a"), "list of whole numbers"),
        (("--tree", "4,x"), "list of trees"),
        (("--temperature", "hot"), "list of numbers"),
        (("--policy", "throughput", "--k", "2"), "add it"),
        (("--only", "k <"), "no expression"),
        (("--only", "k == 77"), "none of"),
        (("--prompts", "./nowhere.jsonl"), "cannot read prompts"),
        (("--target", "./nowhere"), "no such folder"),
        (("--csv", "./nowhere/x.csv"), "cannot write"),
        (("--store", "./nowhere/x.db"), "no folder"),
        (("--jobs", "0"), "--jobs"),
        (("--repetitions", "0"), "repetitions"),
        (("--config", "nowhere.toml"), "no such file"),
        (("--batch", "0"), "batch"),
    ],
)
def test_wrong_input_in_one_line(capsys, arguments, words):
    assert invoke("sweep", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", captured.err), captured.err
    assert words in captured.err


def test_flags_and_files_do_not_contradict(tmp_path, capsys):
    file = tmp_path / "cells.py"
    file.write_text("CELLS = [{'k': 2, 'drafter': 'ngram'}]", encoding="utf-8")
    assert invoke("sweep", "--config", str(file), "--k", "1,2", "--dry-run") == 2
    assert "--config gives the axes" in capsys.readouterr().err


def test_parquet_needs_pyarrow(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert invoke("sweep", "--parquet", str(tmp_path / "x.parquet")) == 2
    assert "specdec[parquet]" in capsys.readouterr().err


def test_parquet_round_trip(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    made = document(5, num_failed=2)
    export.write_parquet(made, tmp_path / "x.parquet")
    rows = parquet.read_table(tmp_path / "x.parquet").to_pylist()
    assert rows == [export.flat(cell) for cell in made["cells"]]


def test_json_round_trip(tmp_path):
    made = document(4, num_failed=1)
    export.write_json(made, tmp_path / "x.json")
    assert load_document(tmp_path / "x.json") == made
    with pytest.raises(InputError, match="folder"):
        export.check_exports(json=str(tmp_path))


# ------------------------------------------------------------------ the screen


def printed(**options) -> str:
    out = io.StringIO()
    sweep_screen.show(Console(file=out, width=100, highlight=False), document(**options), Run(), 0)
    return out.getvalue()


def test_the_table_names_what_varies_and_hides_what_does_not():
    text = printed(num_cells=12)
    head = next(line for line in text.splitlines() if line.startswith("drafter"))
    assert head.split() == ["drafter", "k,", "tree", "per", "round", "accepted", "speed-up", "95", "%", "same"]
    assert "greedy, up to 64 new tokens" in text
    assert "batch" in next(line for line in printed(num_cells=96).splitlines() if line.startswith("drafter"))
    assert max(map(len, printed(num_cells=96).splitlines())) <= 100


def test_the_board_counts_and_shows_the_best_without_a_thread():
    made = document(4)
    cells = dict(zip([cell["key"] for cell in made["cells"]], settings(4), strict=True))
    out = io.StringIO()
    with Store() as store:
        store.add(made["cells"][0])
        board = Board(Console(file=out, width=100, force_terminal=True, highlight=False), store, cells, True)
        board.resumed(False)
        assert "1 of 4 cells are in the store" in out.getvalue()
        with board:
            assert board.live is not None
            assert not board.live.auto_refresh
            tick = board.starting(settings(4)[1])
            tick(1, 2, "x")
            board.finished(made["cells"][1])
            store.add(made["cells"][2])
            board.look()
        assert board.num_over == 3
        assert "3 of 4 cells" in out.getvalue()
        assert re.search(r"2 of 4 cells, \d+ s left", out.getvalue())
        assert not re.search(r" -\d", re.sub(r"\x1b[^m]*m", "", out.getvalue())), "no time is negative"
        best = max(made["cells"][:3], key=sweep_screen.merit)
        assert f"{best['speedup']['median']:.2f}×" in out.getvalue()


# ------------------------------------------------------------------ the page


def page_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("specdec")]


@pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")
def test_the_commands_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bare, "_SECONDS", 0.0)
    monkeypatch.setattr("specdec.cli.screen.warm_up", lambda *_: None)
    tables = re.findall(r"^```(toml|json)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)
    for kind, content in tables:
        Path(f"sweep.{kind}").write_text(content, encoding="utf-8")
    commands = page_commands()
    assert len(commands) >= 5
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        more = SHORTER if words[0] == "sweep" else ()
        more += ("--acceptance-only",) if command != commands[0] else ()
        code = invoke(*words, *more)
        captured = capsys.readouterr()
        assert code == 0, f"{command}\n{captured.err[-2000:]}"
        assert captured.out.strip()
    assert json.loads(Path("cells.json").read_text(encoding="utf-8"))["cells"]
