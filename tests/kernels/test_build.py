"""What happens when the library cannot be built: one line that names the cause, never an exception."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specdec import kernels
from specdec.kernels import build

ASK = "from specdec import kernels; print(kernels.available()); print(kernels.why_not())"


def ask(tmp_path: Path, **environment: str) -> list[str]:
    """`available()` and `why_not()` in a process of its own, with an empty cache."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "SPECDEC_NATIVE")}
    environment = {**clean, "SPECDEC_CACHE": str(tmp_path / "cache"), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def fake_compiler(tmp_path: Path, script: str) -> str:
    folder = tmp_path / "bin"
    folder.mkdir()
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(folder)


@pytest.mark.skipif(build.PREBUILT.exists(), reason="this installation needs no compiler")
@pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in for compilers")
class TestFailures:
    def test_a_failing_compiler_is_quoted(self, tmp_path: Path) -> None:
        script = (
            '[ "$1" = --version ] && exit 0\necho "note: x" >&2\necho "ops.cpp:1: fatal error: no header" >&2\nexit 1'
        )
        answer = ask(tmp_path, PATH=fake_compiler(tmp_path, script))
        assert answer == ["False", "compile error: ops.cpp:1: fatal error: no header"]
        assert not list((tmp_path / "cache").rglob("*.so"))

    def test_a_compiler_that_gives_no_library(self, tmp_path: Path) -> None:
        """Every call succeeds and the last one writes rubbish, as after a full disk."""
        script = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo rubbish > "$2"; shift; done'
        available, reason = ask(tmp_path, PATH=fake_compiler(tmp_path, script))
        assert available == "False"
        assert reason

    def test_no_compiler(self, tmp_path: Path) -> None:
        assert ask(tmp_path, PATH=str(tmp_path)) == [
            "False",
            "no C++ compiler found (install g++ or clang++, or set CXX)",
        ]

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file where the folder should be")
        available, reason = ask(tmp_path, PATH=fake_compiler(tmp_path, "exit 0"))
        assert available == "False"
        assert reason.startswith(f"cannot write the cache {tmp_path / 'cache'}")


def test_switched_off(tmp_path: Path) -> None:
    assert ask(tmp_path, SPECDEC_NATIVE="0") == ["False", "SPECDEC_NATIVE=0"]


def test_an_unknown_variant_is_not_ignored() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], env={**os.environ, "SPECDEC_ISA": "sse9"}, capture_output=True, text=True
    )
    available, reason = done.stdout.splitlines()
    assert available == "False"
    assert reason.startswith("SPECDEC_ISA=sse9 is not one of ") or not kernels.available()


def test_the_key_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.key()
    assert build.key() == before
    assert build.key("another compiler") != before
    for path in build.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.key() == before
    (tmp_path / "kernels.h").write_text("// changed")
    assert build.key() != before


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_folder() == Path.home() / ".cache" / "specdec"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert build.cache_folder() == Path("/elsewhere/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "/here")
    assert build.cache_folder() == Path("/here")
