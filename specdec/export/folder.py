"""Folders that are whole or not there: written aside, then renamed; kept by key for whoever asks for the same again."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specdec.errors import InputError
from specdec.kernels.build import cache_folder

_PARTIAL = ".partial-"


def artifacts_folder() -> Path:
    """Where artefacts are kept by key."""
    return cache_folder() / "artifacts"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def _sweep(parent: Path) -> None:
    """Remove what exports that were killed have left behind."""
    for path in parent.glob(f".*{_PARTIAL}*"):
        found = re.search(rf"{re.escape(_PARTIAL)}(\d+)-", path.name)
        if found and not _is_running(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def check_free(target: Path) -> None:
    """Raise `InputError` when something stands where a folder is to be written."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already: remove it, or give another --out")


@contextmanager
def aside(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when all went well and disappears otherwise, a kill included.

    Where another process was faster, its folder stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}{_PARTIAL}{os.getpid()}-", dir=target.parent))
    try:
        yield made
        made.chmod(0o755)
        try:
            os.rename(made, target)  # replaces an empty folder too
        except OSError:
            if not (target.is_dir() and any(target.iterdir())):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def duplicate(source: Path, target: Path) -> None:
    """The same folder again, in place of nothing: files are linked where they can be."""
    with aside(target) as made:
        for path in sorted(source.rglob("*")):
            copy = made / path.relative_to(source)
            if path.is_dir():
                copy.mkdir(parents=True, exist_ok=True)
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:  # another file system
                shutil.copy2(path, copy)
