"""`specdec verify-backend` on a small artefact: three phases, limits, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_artifacts
import tiny_models

from specdec import cli

TEXT = "".join(f"line {i} of {i * i % 97} words that nobody wrote before\n\n" for i in range(60))


@pytest.fixture(scope="module")
def folder() -> str:
    tiny_artifacts.needs("executorch")
    return str(tiny_artifacts.rounded())


@pytest.fixture
def original(tmp_path: Path) -> str:
    tiny_artifacts.whole().save_pretrained(tmp_path / "original")
    return str(tmp_path / "original")


@pytest.fixture
def run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    (tmp_path / "text.txt").write_text(TEXT)
    small = ("--rows", "3", "--length", "32", "--texts", "2", "--max-new-tokens", "12", "--threads", "1")

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(["verify-backend", folder, "--text", str(tmp_path / "text.txt"), *small, *arguments])
        return (code, *capsys.readouterr())

    return call


def test_the_artefact_is_the_rounded_model(run: Any, original: str, tmp_path: Path) -> None:
    code, out, err = run("--target", original, "--json", str(tmp_path / "found.json"))
    assert code == 0, out + err
    for phase in ("full precision", "rounded, in torch", "artefact", "step_4 against one row"):
        assert phase in out
    assert "speculative texts (k = 3, greedy and sampled): 4 of 4 are the plain ones" in out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reference"] == "rounded, in torch"
    assert found["faults"] == []
    assert found["tokens"] == 3 * 31
    assert found["to_reference"]["sqnr"]["logits"] > 25 > found["to_full"]["artefact"]["sqnr"]["logits"]
    assert found["to_reference"]["sqnr"].keys() == {"logits", "hidden state 1"}
    assert found["loss"]["artefact"] == pytest.approx(found["loss"]["rounded, in torch"], rel=0.01)
    assert found["loss"]["artefact"] != pytest.approx(found["loss"]["full precision"], rel=1e-4)
    assert found["options"]["recipe"] == "w4a8-head8"


def test_limits_that_are_not_met_fail(run: Any, original: str) -> None:
    code, out, _ = run("--target", original, "--min-sqnr", "500")
    assert code == 1
    assert "FAILED: the logits are" in out
    assert "not 500" in out


def test_another_original_is_refused(run: Any, tmp_path: Path) -> None:
    tiny_models.noisy(tiny_artifacts.whole(), 0.01).save_pretrained(tmp_path / "other")
    code, _, err = run("--target", str(tmp_path / "other"))
    assert code == 2
    assert "was exported from another model" in err
    assert "--target ORIGINAL" in run()[2]  # the embedded target


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--rows", "0"), "--rows is a whole number >= 1, not 0"),
        (("--texts", "9"), "--texts 9: texts begin as rows do, and there are 3 rows"),
        (("--min-agreement", "97"), "--min-agreement is a share from 0 to 1, not 97"),
        (("--json", "/no/such/folder/x.json"), "/no/such/folder"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], message: str
) -> None:
    assert cli.main(["verify-backend", str(tmp_path), "--rows", "3", "--texts", "2", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_artefact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify-backend", str(tmp_path)]) == 2
    assert "is no artefact" in capsys.readouterr().err
