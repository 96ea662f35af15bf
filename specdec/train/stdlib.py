"""The source of the Python standard library as training text: every machine with Python has it.

The embedded target was trained on it. Files are held out by a hash of their path, so the held-out set is the same on
every machine with the same Python version; built-in prompts come from held-out files only.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from specdec.train.data import Document

HELD_OUT_PERCENT = 3
# Tables rather than code: they would teach a model to count in hexadecimal.
_SKIPPED = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "idlelib/Icons", "test/encoded_modules")
_MIN_BYTES, _MAX_BYTES = 200, 200_000


def root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative: str) -> bool:
    """By the path under the standard library's folder, with forward slashes."""
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT


def _paths() -> list[str]:
    """Of usable files, relative to the root, sorted."""
    found = []
    for folder, folders, names in os.walk(root()):
        # Installed packages lie under the same root, and walking through them takes far longer than the rest.
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        where = Path(folder).relative_to(root())
        found += [(where / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(path for path in found if not any(part in path for part in _SKIPPED))


def documents() -> list[Document]:
    """One per file, in the order of their paths."""
    found = []
    for relative in _paths():
        path = root() / relative
        if not _MIN_BYTES < path.stat().st_size < _MAX_BYTES:
            continue
        try:
            found.append(Document(path.read_text(encoding="utf-8"), is_held_out(relative)))
        except UnicodeDecodeError:
            continue  # a test fixture in another encoding
    return found
