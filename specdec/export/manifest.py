"""What an artefact says of itself, and whether it is true.

`manifest.json` lists every file with its size and hash, and the contract: options, model, graphs, versions. The program
carries the same contract inside, so that neither can be exchanged or edited alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.export.exporter import exporter
from specdec.export.options import Options

FILE = "manifest.json"
FORMAT = "specdec-artifact"
VERSION = 1
_BLOCK = 1 << 22


class ArtifactError(InputError):
    """An artefact is incomplete, was changed, or was made for something else; the message names the field."""


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def is_artifact(folder: str | Path) -> bool:
    """Whether a folder says that it is one of ours; `Manifest.read` tells whether it is whole."""
    path = Path(folder) / FILE
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _flat(value[key], f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def difference(one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The first field, by name, in which two documents differ, and what each says; None where they agree."""
    a, b = dict(_flat(one)), dict(_flat(other))
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            return name, a.get(name), b.get(name)
    return None


@dataclass(frozen=True)
class Manifest:
    """`contract`: backend, options, model, versions; see `contract_of`. `about`: sizes, seconds, date: for people."""

    contract: dict[str, Any]
    files: dict[str, dict[str, Any]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        return str(self.contract["backend"])

    @property
    def options(self) -> Options:
        return exporter(self.backend).options.of(self.contract["options"])

    @property
    def model(self) -> dict[str, Any]:
        found: dict[str, Any] = self.contract["model"]
        return found

    @property
    def key(self) -> str:
        return key_of(self.contract)

    def write(self, folder: Path) -> None:
        document = {"format": FORMAT, "version": VERSION, **self.contract, "files": self.files, "about": self.about}
        (folder / FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: str | Path, *, check_files: bool = True) -> Manifest:
        """Raises `ArtifactError` naming what is missing or differs."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise ArtifactError(f"{folder} is no artefact: it has no {FILE}; make one with `specdec export`")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} is not valid JSON ({error}); export the model again") from error
        if not isinstance(document, dict):
            raise ArtifactError(f"{path} is no manifest of ours; export the model again")
        for name, expected in (("format", FORMAT), ("version", VERSION)):
            if document.get(name) != expected:
                raise ArtifactError(f"{path}: {name} is {document.get(name)!r}, and this version reads {expected!r}")
        parts = ("backend", "options", "model", "versions")
        missing = [name for name in (*parts, "files") if not isinstance(document.get(name), (dict, str))]
        if missing:
            raise ArtifactError(f"{path} lacks {missing[0]}; export the model again")
        manifest = Manifest({name: document[name] for name in parts}, document["files"], document.get("about", {}))
        if check_files:
            manifest.check_files(Path(folder))
        return manifest

    def check_files(self, folder: Path) -> None:
        for name, facts in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{folder}: {name} is missing; export the model again")
            if path.stat().st_size != facts["bytes"]:
                raise _changed(folder, f"files.{name}.bytes", facts["bytes"], path.stat().st_size)
            found = sha256_of(path)
            if found != facts["sha256"]:
                raise _changed(folder, f"files.{name}.sha256", facts["sha256"], found)
        program = exporter(self.backend).program
        if program not in self.files:
            raise ArtifactError(f"{folder}: the manifest lists no {program}; export the model again")

    def check_contract(self, folder: str | Path, inside: str) -> None:
        """`inside`: the contract that the program carries, as JSON."""
        found = difference(self.contract, json.loads(inside))
        if found is not None:
            raise _changed(Path(folder), *found)


def _changed(folder: Path, name: str, said: Any, found: Any) -> ArtifactError:
    return ArtifactError(
        f"{folder}: {name} is {said!r} in the manifest and {found!r} in what lies there; the artefact was changed "
        "after its export, or put together from several. Export the model again"
    )


def key_of(contract: Mapping[str, Any]) -> str:
    """What an artefact is cached by: the same key means the same program."""
    return hashlib.sha256(json.dumps(contract, sort_keys=True).encode()).hexdigest()[:16]


def listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a folder that is about to become an artefact."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}
