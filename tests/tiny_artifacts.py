"""Small models as ExecuTorch artefacts: exported once per machine and kept, since lowering takes half a minute."""

from __future__ import annotations

import getpass
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_text import TEXT_VOCAB, byte_tokenizer

import specdec.export
from specdec.export.executorch import ExecutorchOptions

#: Narrow graphs and a small context, so that steps are cut and contexts end.
SMALL = ExecutorchOptions(prefill_len=8, k=(0, 3), max_seq_len=96, max_nodes=16, hidden=(0, 1, 2))


def needs_executorch() -> None:
    """Skip where the extra is not installed."""
    if find_spec("executorch") is None:
        pytest.skip("executorch is not installed: pip install 'specdec[executorch]'")


def _folder() -> Path:
    """Of artefacts made by this very code."""
    code = hashlib.sha256()
    for name in ("step", "executorch"):
        code.update((Path(next(iter(specdec.export.__path__))) / f"{name}.py").read_bytes())
    return Path(tempfile.gettempdir()) / f"specdec-tests-{getpass.getuser()}" / code.hexdigest()[:12]


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def export(model: Any, options: ExecutorchOptions = SMALL, **more: Any) -> Path:
    """The artefact's folder; nobody may write to it."""
    needs_executorch()
    from specdec.export.artifact import export as make

    folder = _folder()
    before = os.environ.get("SPECDEC_CACHE")
    os.environ["SPECDEC_CACHE"] = str(folder)
    try:
        with _one_at_a_time(folder):
            return make(model, options, **more)
    finally:
        del os.environ["SPECDEC_CACHE"]
        if before is not None:
            os.environ["SPECDEC_CACHE"] = before


@cache
def model() -> Any:
    """Sliding windows, grouped heads, and room for the tokens of `byte_tokenizer`."""
    return tiny_models.tiny("mistral", dtype=torch.float32, vocab_size=TEXT_VOCAB)


def exported() -> Path:
    """`model()` with its tokenizer."""
    return export(model(), tokenizer=byte_tokenizer())


@cache
def opened() -> Any:
    """The backend on `model()`; every test forks its own."""
    needs_executorch()
    from specdec.export.artifact import ArtifactModel
    from specdec.runtime.backends.executorch import ExecutorchBackend

    return ExecutorchBackend.open(ArtifactModel.open(exported()))
