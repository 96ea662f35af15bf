"""Which releases of the packages that write and run artefacts work together: those that were tried."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence

import torch

from specdec.errors import InputError


def tried(package: str, known: Mapping[str, Sequence[str]], message: str) -> str:
    """The installed version of a package. `known`: its releases, and those of torch that each was found to work with.

    Raises `InputError` when the package is not there, `message` then says what to type, or when it was never tried
    with the torch that is.
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the {package} backend needs the package {package}: {message}") from None
    release, torch_release = (".".join(v.split("+")[0].split(".")[:2]) for v in (version, torch.__version__))
    if torch_release not in known.get(release, ()):
        pairs = "; ".join(f"{package} {name} with torch {', '.join(those)}" for name, those in known.items())
        raise InputError(
            f"{package} {version} with torch {torch.__version__} was never tried with specdec: use {pairs}"
        )
    return version
