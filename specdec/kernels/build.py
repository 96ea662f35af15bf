"""Finds the library of native kernels, or compiles it once with the system's compiler into a cache of the user's.

`python -m specdec.kernels.build` compiles into the package itself, and so does `pip install --no-build-isolation .`:
for installations that are made on one machine and used on others of the same kind. No compiler is needed there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
PREBUILT = Path(__file__).parent / "prebuilt"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 30  # what the notice says; two cores of a server take 15, one busy core 40
TIMEOUT = 900

# Contraction is off: a product and a sum are fused where the source says so, the same in every tile shape.
FLAGS = ("-O3", "-fPIC", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma")
VARIANTS = {
    "avx2.cpp": ("-mavx2", "-mfma"),
    "avx512.cpp": AVX512,
    "avx512bf16.cpp": (*AVX512, "-mavx512bf16", "-mavx512vnni"),
}


class BuildFailure(Exception):
    """No library, and in one line why; `specdec.kernels.why_not()` passes it on."""


@dataclass(frozen=True)
class Unit:
    """One source file and what it is compiled with. A variant that the compiler refuses is left out of the library."""

    source: Path
    flags: tuple[str, ...]
    optional: bool = False


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _units() -> list[Unit]:
    from torch.utils.cpp_extension import include_paths  # slow to import, and seldom needed

    # Newer torch headers need C++20.
    standard = "c++20" if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 10) else "c++17"
    includes = tuple(flag for path in include_paths() for flag in ("-isystem", path))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    openmp = ("-fopenmp",) if _openmp() else ()
    torch_flags = (f"-std={standard}", abi, *openmp, *includes)
    units = [Unit(SOURCES / name, torch_flags) for name in ("ops.cpp", "packed_ops.cpp")]
    units.append(Unit(SOURCES / "portable.cpp", ("-std=c++17",)))
    if _is_x86():
        units += [Unit(SOURCES / name, ("-std=c++17", *flags), optional=True) for name, flags in VARIANTS.items()]
    return [unit for unit in units if unit.source.exists()]


def _openmp() -> bool:
    return sys.platform == "linux" and bool(torch.backends.openmp.is_available())


def _link_flags() -> list[str]:
    from torch.utils.cpp_extension import library_paths

    flags = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    if _openmp():
        # torch's own copy, when it ships one: two OpenMP pools in one process would fight for the cores.
        own = sorted(path for folder in library_paths() for path in Path(folder).glob("libgomp*.so*"))
        flags += [str(own[0])] if own else ["-fopenmp"]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    return flags


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        found = shutil.which(name)
        if found:
            return found
    raise BuildFailure("no C++ compiler found (install g++ or clang++, or set CXX)")


def _run(command: list[str]) -> str:
    """The first line of what went wrong, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{Path(command[0]).name}: {error}"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"{Path(command[0]).name} ended with status {done.returncode}"])[0][:300]


@lru_cache(maxsize=8)
def _compiler_version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailure(f"the compiler {compiler} does not run: {error}") from error
    return done.stdout


def key(*more: str) -> str:
    """What a library is good for: these sources, this torch, this machine."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    facts = (torch.__version__, str(torch.compiled_with_cxx11_abi()), sys.platform, platform.machine(), *FLAGS, *more)
    digest.update("\0".join(facts).encode())
    return digest.hexdigest()[:24]


def cache_folder() -> Path:
    """`$SPECDEC_CACHE`, else `$XDG_CACHE_HOME/specdec`, else `~/.cache/specdec`."""
    if os.environ.get("SPECDEC_CACHE"):
        return Path(os.environ["SPECDEC_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process compiles, the others wait for it. The lock goes with its process, however that ends."""
    import fcntl  # not on Windows, where compile() refuses before it comes here

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compile_to(target: Path, compiler: str) -> None:
    """Compiles and links into `target`, which appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        units = _units()
        objects = [Path(folder) / f"{unit.source.stem}.o" for unit in units]

        def one(unit: Unit, output: Path) -> str:
            return _run([compiler, *FLAGS, *unit.flags, "-c", str(unit.source), "-o", str(output)])

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            failures = list(pool.map(one, units, objects))
        for unit, failure in zip(units, failures, strict=True):
            if failure and not unit.optional:
                raise BuildFailure(f"compile error: {failure}")
        built = [str(output) for output, failure in zip(objects, failures, strict=True) if not failure]
        library = Path(folder) / target.name
        failure = _run([compiler, "-shared", *built, "-o", str(library), *_link_flags()])
        if failure:
            raise BuildFailure(f"link error: {failure}")
        os.replace(library, target)


def prebuilt() -> Path | None:
    """The library that came with the package, if it is of these sources and for this torch and kind of machine."""
    path = PREBUILT / f"kernels-{key()}.so"
    return path if path.exists() else None


def prebuild(folder: Path) -> Path:
    """Compiles into `folder`, in place of what lay there. Raises `BuildFailure`."""
    target = folder / f"kernels-{key()}.so"
    for old in folder.glob("kernels-*.so"):
        if old != target:
            old.unlink()
    if not target.exists():
        if os.name == "nt":
            raise BuildFailure("native kernels are not built on Windows")
        folder.mkdir(parents=True, exist_ok=True)
        compile_to(target, _compiler())
    return target


def compiled() -> Path:
    """The library from the user's cache, or compiled now. Raises `BuildFailure`."""
    if os.name == "nt":
        raise BuildFailure("native kernels are not built on Windows")
    compiler = _compiler()
    folder = cache_folder() / "kernels"
    target = folder / f"kernels-{key(compiler, _compiler_version(compiler))}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if not target.exists():
                print(f"specdec: compiling native kernels once (about {SECONDS} s)", file=sys.stderr)
                compile_to(target, compiler)
    except OSError as error:
        raise BuildFailure(f"cannot write the cache {folder}: {error.strerror or error} (set SPECDEC_CACHE)") from error
    return target


if __name__ == "__main__":
    print(prebuild(PREBUILT))
