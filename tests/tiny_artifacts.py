"""Small models as artefacts: exported once per machine and kept, since some backends take half a minute for one."""

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
from specdec import registry
from specdec.export.aoti import AotiOptions
from specdec.export.executorch import ExecutorchOptions
from specdec.export.openvino import OpenvinoOptions
from specdec.export.options import Options
from specdec.export.qnn import QnnOptions
from specdec.kernels import ops

#: Narrow graphs and a small context, so that steps are cut and contexts end.
SMALL = ExecutorchOptions(prefill_len=8, k=(0, 3), max_seq_len=96, max_nodes=16, hidden=(0, 1, 2))


#: The same of other backends.
OF_OTHERS: dict[str, Options] = {
    "aoti": AotiOptions(max_seq_len=96, hidden=(0, 1, 2)),
    "openvino": OpenvinoOptions(prefill_len=8, k=(0, 3), max_seq_len=96, max_nodes=16, hidden=(0, 1, 2)),
    "qnn": QnnOptions(prefill_len=8, k=(0, 3), max_seq_len=96, max_nodes=16, hidden=(0, 1, 2)),
}


def needs(backend: str) -> None:
    """Skip where what a backend is made of is not installed."""
    if backend == "aoti":
        if not ops.available():
            pytest.skip(str(ops.why_not()))
    elif find_spec({"qnn": "onnxruntime_qnn"}.get(backend, backend)) is None:
        pytest.skip(f"{backend} is not installed: pip install 'specdec[{backend}]'")


def needs_executorch() -> None:
    needs("executorch")


def _folder(backend: str) -> Path:
    """Of artefacts made by this very code."""
    code = hashlib.sha256()
    for name in ("step", backend):
        code.update((Path(next(iter(specdec.export.__path__))) / f"{name}.py").read_bytes())
    return Path(tempfile.gettempdir()) / f"specdec-tests-{getpass.getuser()}" / code.hexdigest()[:12]


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def export(model: Any, options: Options = SMALL, **more: Any) -> Path:
    """The artefact's folder; nobody may write to it."""
    needs(options.backend)
    from specdec.export.artifact import export as make

    folder = _folder(options.backend)
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


def exported(backend: str = "executorch") -> Path:
    """`model()` with its tokenizer."""
    return export(model(), OF_OTHERS.get(backend, SMALL), tokenizer=byte_tokenizer())


@cache
def opened(backend: str = "executorch") -> Any:
    """The backend on `model()`; every test forks its own."""
    needs(backend)
    from specdec.export.artifact import ArtifactModel

    return registry.find("backend", backend).open(ArtifactModel.open(exported(backend)))


#: Weights of 4 bits and a head of 8, as few graphs as show everything.
ROUNDED = ExecutorchOptions(prefill_len=1, k=(0, 3), max_seq_len=64, max_nodes=8, hidden=(1,), recipe="w4a8-head8")


@cache
def whole() -> Any:
    """One layer whose shapes every recipe can take, for `rounded()`."""
    shape = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
    return tiny_models.tiny("llama", dtype=torch.float32, vocab_size=TEXT_VOCAB, **shape)


def rounded() -> Path:
    """`whole()` by the recipe of `ROUNDED`, with its tokenizer."""
    return export(whole(), ROUNDED, tokenizer=byte_tokenizer())
