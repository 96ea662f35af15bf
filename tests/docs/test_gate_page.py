"""The commands of docs/gate.md run one after the other, as written, and the gate passes on an unchanged pair."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from specdec.cli import main
from specdec.loading import EMBEDDED

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gate.md"
# The page's own lengths are for those who use it.
SHORTER = {"sweep": ["--limit", "5", "--max-new-tokens", "24", "--backend", "eager"]}


@pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")
def test_the_pages_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    commands = "".join(re.findall(r"^```bash\n(.*?)^```$", text, flags=re.M | re.S)).splitlines()
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "specdec"
        assert main([*words[1:], *SHORTER.get(words[1], [])]) == 0, command
        out = capsys.readouterr().out
        if "--gate" in words:
            assert "PASS (2 pass)" in out


def test_the_workflow_uses_options_that_exist(capsys):
    text = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, flags=re.M | re.S)
    runs = re.findall(r"- run: (specdec .*)", block)
    assert len(runs) == 2
    for command in runs:
        words = shlex.split(command)
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--"))
