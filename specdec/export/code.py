"""What of our own code a program was made by. Its hash is in the contract: no kept artefact outlives a change of it."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = "specdec.export"
# They look at artefacts, and make none.
_APART = frozenset({"artifact", "folder", "manifest", "plan", "widths", "code"})


def _imported(source: bytes) -> set[str]:
    """Modules of this package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == _PACKAGE:
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}."):
            found.add((node.module or "").removeprefix(f"{_PACKAGE}.").split(".")[0])
    return found


def sources(module: str, folder: Path | None = None) -> dict[str, bytes]:
    """By name: the module (`specdec.export.executorch`) and those of its package that it imports, directly or not."""
    folder, wanted = folder or Path(__file__).parent, [module.removeprefix(f"{_PACKAGE}.")]
    found: dict[str, bytes] = {}
    while wanted:
        name = wanted.pop()
        path = folder / f"{name}.py"
        if name in found or name in _APART or not path.is_file():
            continue
        found[name] = path.read_bytes()
        wanted += _imported(found[name])
    return found


@cache
def code_hash(module: str, folder: Path | None = None) -> str:
    """Of all that writes the programs of the exporter in this module."""
    digest = hashlib.sha256()
    for name, source in sorted(sources(module, folder).items()):
        digest.update(name.encode() + b"\0" + source + b"\0")
    return digest.hexdigest()[:16]
