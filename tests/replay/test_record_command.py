"""`specdec record` and `specdec replay`, as typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import specdec.cli.record as record_command
from specdec.cli import main
from specdec.loading import EMBEDDED
from specdec.sweep.setting import Setting
from specdec.sweep.store import load_document

needs_pair = pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")
SHORT = ["--limit", "2", "--max-new-tokens", "12", "--depth", "4", "--top-m", "8", "--no-costs"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "trace.safetensors"
    assert main(["record", "--out", str(path), "--drafter", "ngram", *SHORT]) == 0
    return path


@needs_pair
def test_record_states_the_size_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.safetensors"
    assert main(["record", "--out", str(path), *SHORT]) == 0
    shown = capsys.readouterr()
    assert "2 prompts of at most 12 tokens" in shown.err
    assert "KiB" in shown.err
    assert "24 tokens" in shown.out
    assert "written:" in shown.out
    assert path.is_file()


@needs_pair
def test_large_recordings_need_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record_command, "_LARGE", 100)
    path = tmp_path / "t.safetensors"
    assert main(["record", "--out", str(path), "--drafter", "ngram", *SHORT]) == 2
    assert "--yes" in capsys.readouterr().err
    assert not path.exists()
    assert main(["record", "--out", str(path), "--drafter", "ngram", *SHORT, "--yes"]) == 0


@needs_pair
def test_replay_prints_a_table_and_writes_cells(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cells.json"
    policies = ["--policy", "heuristic:k=2;limit=4,throughput:k=2;limit=4"]
    words = ["replay", str(trace), "--k", "1,4,9", "--tree", "2,2", *policies, "--verifier", "coupled,ratio"]
    assert main([*words, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "k=4" in shown
    assert "exact" in shown
    assert "estimated ±" in shown
    assert "not told" in shown
    assert "--depth 9" in shown
    document = load_document(out)
    done = [cell for cell in document["cells"] if cell["status"] == "done"]
    failed = [cell for cell in document["cells"] if cell["status"] == "failed"]
    assert len(done) == 8
    assert {cell["error"]["type"] for cell in failed} == {"InputError", "IncompatiblePairError"}
    assert len({cell["key"] for cell in document["cells"]}) == len(document["cells"])
    four = next(cell for cell in done if cell["setting"]["k"] == 4)
    setting = Setting.of(four["setting"])
    assert (setting.drafter, setting.target, setting.limit, setting.max_new_tokens) == ("ngram", "embedded", 2, 12)
    assert four["replayed"]["exact"]
    assert four["speedup"] is None
    assert four["identical"] is None
    assert [row["num_tokens"] for row in four["rows"]] == [12, 12]
    emitted = [sum(row["rounds"]["emitted"]) for row in four["rows"]]
    assert all(count >= 12 for count in emitted)
    assert four["stats"]["num_rounds"] == sum(len(row["rounds"]["nodes"]) for row in four["rows"])


@needs_pair
def test_costs_give_predictions(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), "--k", "2"]) == 0
    assert "dicted" not in capsys.readouterr().out  # nothing was timed
    costs = tmp_path / "costs.json"
    costs.write_text(json.dumps({"verify": {"1": 1.0, "5": 1.2}, "draft": 0.01, "other": 0.02}))
    assert main(["replay", str(trace), "--k", "2", "--costs", str(costs)]) == 0
    assert "run it to know" in capsys.readouterr().out
    costs.write_text("{")
    assert main(["replay", str(trace), "--costs", str(costs)]) == 2
    assert "--costs" in capsys.readouterr().err


@needs_pair
def test_the_commands_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "replay.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("specdec re")]
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    for command in commands:
        words = shlex.split(command)[1:]
        if words[0] == "record":
            words += ["--limit", "1", "--max-new-tokens", "10", "--no-costs"]
        assert main(words) == 0, command
    assert (tmp_path / "replayed.json").is_file()
    assert "not told" not in capsys.readouterr().out


@needs_pair
def test_nothing_to_tell_is_an_error(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), "--tree", "2,2"]) == 2
    assert "chains, not trees" in capsys.readouterr().out
    assert main(["replay", str(trace), "--max-new-tokens", "99"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["replay", "nothing.safetensors"], "no file"),
        (["record", "--out", "nowhere/t.safetensors"], "--out"),
        (["record", "--out", "t.safetensors", "--depth", "0"], "--depth"),
        (["record", "--out", "t.safetensors", "--top-m", "-1"], "--top-m"),
        (["record", "--out", "t.safetensors", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_input(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_replay_of_bad_lists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["replay", "t", "--k", "two"])
    assert "whole numbers" in capsys.readouterr().err
