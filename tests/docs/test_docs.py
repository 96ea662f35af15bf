"""The documentation is true: its Python blocks run, its commands run, and the loop it shows is the loop."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import specdec.decoder
from specdec.loading import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Shortens the long commands: what is tested is that they run as written, not how long they take.
_FEW = ["--limit", "2", "--repetitions", "1", "--max-new-tokens", "16"]
SHORTER = {
    "compare": _FEW,
    "certify": ["--pairs", "1"],
    "sweep": [*_FEW, "--drafter", "ngram", "--k", "2"],
    "bench": ["--prompts", "1", "--repetitions", "1", "--max-new-tokens", "16", "--retries", "0"],
}

needs_pair = pytest.mark.skipif(not (EMBEDDED / "target" / "config.json").exists(), reason="no embedded pair")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def readme_commands() -> list[str]:
    lines = "\n".join(blocks(ROOT / "README.md", "bash")).replace("\\\n", " ").splitlines()
    return [line.split("&&")[-1].strip().removeprefix(".venv/bin/") for line in lines if "specdec " in line]


@needs_pair
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_as_written(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}  # dataclasses look their module up
    for block in blocks(page, "python"):
        if block.lstrip().startswith("def decode("):
            continue  # the loop itself, compared below
        exec(compile(block, str(page.name), "exec"), namespace)


def test_the_readme_shows_the_loop_that_runs():
    shown = [block for block in blocks(ROOT / "README.md", "python") if block.lstrip().startswith("def decode(")]
    assert shown == [inspect.getsource(specdec.decoder.decode)]


@needs_pair
@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_run(command, tmp_path):
    words = shlex.split(command, comments=True)
    assert words[0] == "specdec"
    result = subprocess.run(
        [sys.executable, "-m", *words, *SHORTER.get(words[1], [])],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip()


def test_every_page_is_reachable_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]
    assert not missing


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
