"""Where the library comes from; and when it cannot be built, one line that names the cause, never an exception."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from specdec import kernels
from specdec.kernels import build, ops

ROOT = Path(__file__).parents[2]

ASK = "from specdec import kernels; print(kernels.available()); print(kernels.why_not())"


def ask(tmp_path: Path, **environment: str) -> list[str]:
    """`available()` and `why_not()` in a process of its own, with an empty cache."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "SPECDEC_NATIVE")}
    environment = {**clean, "SPECDEC_CACHE": str(tmp_path / "cache"), **environment}
    command = [sys.executable, "-c", ASK]  # which would also import from the folder it stands in
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
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


def test_a_prebuilt_library_that_does_not_load_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that was made where system libraries are newer."""
    monkeypatch.setattr(build, "PREBUILT", tmp_path)
    (tmp_path / f"kernels-{build.key()}.so").write_text("rubbish")
    loaded: list[str] = []

    def load(path: str) -> None:
        loaded.append(path)
        if Path(path).parent == tmp_path:
            raise OSError("invalid ELF header")

    monkeypatch.setattr(ops.torch.ops, "load_library", load)
    monkeypatch.setattr(ops, "compiled", lambda: Path("/the/cache/kernels.so"))
    ops._load()
    assert loaded == [str(tmp_path / f"kernels-{build.key()}.so"), "/the/cache/kernels.so"]


@pytest.mark.skipif(not kernels.available(), reason="there is no library to put into a wheel")
@pytest.mark.skipif(os.name == "nt", reason="shell scripts stand in for compilers")
class TestWheel:
    def wheel(self, tmp_path: Path, **environment: str) -> Path:
        """The project's wheel, made from a copy of its sources, without build isolation."""
        source, out = tmp_path / "source", tmp_path / "out"
        unneeded = shutil.ignore_patterns("__pycache__", "prebuilt", "*.safetensors")
        for name in ("specdec", "drafters", "verifiers"):
            shutil.copytree(ROOT / name, source / name, ignore=unneeded)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
            shutil.copy(ROOT / name, source / name)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
        clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "SPECDEC_NATIVE")}
        done = subprocess.run(
            [*command, str(source)], env={**clean, **environment}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        (wheel,) = out.iterdir()
        return wheel

    def libraries(self, wheel: Path) -> list[str]:
        return [name for name in zipfile.ZipFile(wheel).namelist() if "/prebuilt/" in name]

    def test_holds_the_kernels_and_needs_no_compiler_then(self, tmp_path: Path) -> None:
        ready = build.prebuilt() or build.compiled()
        # Stands in for half a minute of compiling: each call gives the library that is there already.
        script = f'while [ $# -gt 0 ]; do [ "$1" = -o ] && cp "{ready}" "$2"; shift; done'
        path = f"{fake_compiler(tmp_path, script)}{os.pathsep}{os.environ['PATH']}"
        wheel = self.wheel(tmp_path, PATH=path)
        assert self.libraries(wheel) == [f"specdec/kernels/prebuilt/kernels-{build.key()}.so"]
        assert "-py3-none-" in wheel.name
        assert not wheel.name.endswith("-any.whl")
        zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
        answer = ask(tmp_path, PATH=str(tmp_path), PYTHONPATH=str(tmp_path / "installed"))
        assert answer == ["True", ""]

    def test_without_a_compiler_is_for_any_machine(self, tmp_path: Path) -> None:
        wheel = self.wheel(tmp_path, PATH=str(tmp_path))
        assert self.libraries(wheel) == []
        assert wheel.name.endswith("-py3-none-any.whl")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECDEC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_folder() == Path.home() / ".cache" / "specdec"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert build.cache_folder() == Path("/elsewhere/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "/here")
    assert build.cache_folder() == Path("/here")
