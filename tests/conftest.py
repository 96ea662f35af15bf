"""Shared fixtures. Helpers are plain modules in this folder (`tiny_models`, …), which pytest puts on the path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specdec.runtime import graph
from specdec.runtime.backends import compiled

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels for a GPU run on the CPU; triton reads it when imported

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models are faster on one thread, and sums come out the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _no_graphs_by_themselves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On a busy machine steps take long enough for a graph to be made in the background, and kept for whoever comes.

    Its bits are not those of the step in Python, which most tests compare with. Tests of graphs ask for them.
    """
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("graphs")
    patch.setattr(graph, "folder", lambda: folder)
    patch.setattr(compiled, "SECONDS_BEFORE", float("inf"))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data that lie beside the checkout; tests that need them are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared beside the checkout")
    return SHARED
