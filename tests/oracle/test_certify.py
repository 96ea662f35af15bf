"""`specdec certify` passes what is exact and fails what is not: by name, by exit status, and as data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from specdec.chance import Chance
from specdec.cli import certify
from specdec.errors import InputError, UnknownPluginError
from specdec.proposal import Proposal
from specdec.verifier import Verdict, Verifier


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    certify.add_parser(parser.add_subparsers())
    args = parser.parse_args(["certify", *arguments])
    status = args.run(args)
    assert isinstance(status, int)
    return status


def test_table_json_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "certificate.json"
    names = ("ratio", "greedy", "typical")
    assert run(*(a for name in names for a in ("--verifier", name)), "--pairs", "2", "--json", str(file)) == 0
    printed = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert content["passed"] is True
    assert {result["verifier"] for result in content["results"]} == set(names)
    for result in content["results"]:
        assert {"verifier", "law", "pairs", "tv_max", "expected_tokens", "lossless", "passed"} <= result.keys()
        assert result["pairs"] >= 2
        assert result["law"] in printed
    by_name = {(r["verifier"], r["law"]): r for r in content["results"]}
    assert by_name["ratio", "sampled chain"]["tv_max"] <= 1e-12
    lossy = by_name["typical", "sampled chain"]
    assert lossy["passed"]
    assert not lossy["lossless"]
    assert lossy["tv_max"] > 0.01
    assert "lossy" in printed


def test_bad_input() -> None:
    with pytest.raises(UnknownPluginError, match="recursive"):
        run("--verifier", "recursiv")
    with pytest.raises(InputError, match="--pairs"):
        run("--pairs", "0")
    with pytest.raises(InputError, match="no folder"):
        run("--json", "missing/folder/file.json")


PLUGIN = """
from specdec.verifiers import Ratio

class Mine(Ratio):
    name = "mine"

class Hasty(Ratio):
    name = "hasty"
    def verify(self, p, proposal, position, chance):
        return super().verify(p.roll(1, -1), proposal, position, chance)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package, as pip would install it."""
    (tmp_path / "some_rules.py").write_text(PLUGIN)
    info = tmp_path / "some_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[specdec.verifiers]\nmine = some_rules:Mine\nhasty = some_rules:Hasty\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("plugin")
def test_rules_of_another_package_are_certified_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--verifier", "mine", "--pairs", "2") == 0
    assert run("--verifier", "hasty", "--pairs", "2") == 1
    assert "FAILED" in capsys.readouterr().out


# A rule broken in one place. Each line names what is replaced, where, and by what.


def _unchanged(residual: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return otherwise


def _same_row(q: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return q


def _walk_off_by_one(tree, y: torch.Tensor) -> Verdict:
    matched = int((tree.tokens == y[:-1]).long().cumprod(0).sum()) if tree.is_chain else 0
    return Verdict.of(matched - 1, y[max(0, matched - 1)])


def _uniform_rows(self: Proposal, p: torch.Tensor) -> torch.Tensor:
    return torch.full_like(p[: len(self.tree)], 1 / p.shape[-1])


def _fresh_noise(self, p: torch.Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
    from specdec.verifier import walk

    return walk(proposal.tree, chance.draw(p))


def _raises(self, p: torch.Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
    raise RuntimeError("out of order")


def _own_randomness(self, p: torch.Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
    return Verdict.of(-1, torch.multinomial(p[0], 1)[0])


def _leaves_float64(verify):
    def rounded(self, p: torch.Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        return verify(self, p.float(), proposal, position, chance)

    return rounded


BREAKS = [
    ("ratio", "specdec.verifiers.ratio.positive_part", _unchanged),
    ("ratio", "specdec.proposal.Proposal.chain_distributions", _uniform_rows),
    ("ratio", "specdec.verifiers.ratio.Ratio.verify", _raises),
    ("ratio", "specdec.verifiers.ratio.Ratio.verify", _own_randomness),
    ("block", "specdec.verifiers.block.positive_part", _unchanged),
    ("block", "specdec.proposal.Proposal.chain_distributions", _uniform_rows),
    ("recursive", "specdec.verifiers.recursive.positive_part", _unchanged),
    ("recursive", "specdec.verifiers.recursive.without", _same_row),
    ("traversal", "specdec.verifiers.traversal.positive_part", _unchanged),
    ("traversal", "specdec.verifiers.traversal.without", _same_row),
    ("match", "specdec.verifiers.match.walk", _walk_off_by_one),
    ("greedy", "specdec.verifiers.greedy.walk", _walk_off_by_one),
    ("coupled", "specdec.verifiers.coupled.walk", _walk_off_by_one),
    ("typical", "specdec.verifiers.typical.Typical.lossless", True),
]


@pytest.mark.parametrize(("name", "where", "what"), BREAKS, ids=[f"{n}-{w.split('.')[-1]}" for n, w, _ in BREAKS])
def test_a_rule_broken_by_hand_fails(
    name: str, where: str, what: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(where, what)
    assert run("--verifier", name, "--pairs", "1") == 1
    assert "FAILED" in capsys.readouterr().out


def test_reasons_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from specdec.verifiers import Coupled, Ratio

    def reasons(name: str) -> set[str]:
        file = tmp_path / f"{name}.json"
        assert run("--verifier", name, "--pairs", "1", "--json", str(file)) == 1
        return {result["error"] for result in json.loads(file.read_text())["results"] if result["error"]}

    with monkeypatch.context() as patch:
        patch.setattr(Coupled, "verify", _fresh_noise)
        assert reasons("coupled") == {"says that it keeps the seed, and does not"}
    with monkeypatch.context() as patch:
        patch.setattr(Ratio, "verify", _raises)
        assert reasons("ratio") == {"RuntimeError: out of order"}
    with monkeypatch.context() as patch:
        patch.setattr(Ratio, "verify", _leaves_float64(Ratio.verify))
        assert reasons("ratio") == {"rounds: the rule leaves the dtype of p"}


def test_a_rule_that_takes_nothing_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line failed because there was none: only "no draft" is left, and that must still be exact."""
    from specdec.verifiers import Ratio

    def never(self: Verifier, p: torch.Tensor, proposal: Proposal, position: int, chance: Chance) -> Verdict:
        return Verdict.of(-1, p[0].argmax())

    monkeypatch.setattr(Ratio, "draws", ())
    monkeypatch.setattr(Ratio, "verify", never)
    assert run("--verifier", "ratio", "--pairs", "1") == 1
