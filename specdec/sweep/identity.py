"""What tells the models and prompts of two cells apart, found without loading them; and where cells are run."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from specdec import registry
from specdec.sweep.setting import EMBEDDED, Setting

# Of a large file, this many bytes at its beginning, its end and evenly between are read.
_PIECE, _PIECES = 1 << 16, 16
# What models are made of: other files in their folders do not change them.
_PARTS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.model", "*.tiktoken", "merges.txt", "*.jinja")


def models(setting: Setting) -> dict[str, Any]:
    """Of target and drafter, and of files that options of drafter and policy name.

    Folders and files are told apart by their contents (a few pieces of large ones), hub ids by their names.
    """
    from specdec.loading import EMBEDDED as SHIPPED

    pair = SHIPPED if setting.target == EMBEDDED else None
    drafts = setting.draft or setting.drafter
    own = pair / ("draft" if drafts == "model" else drafts) if pair is not None else None
    is_plugin = drafts in registry.available("drafter")  # whatever else of that name lies about
    options = {**setting.drafter_options, **{f"policy {k}": v for k, v in setting.policy_options.items()}}
    return {
        "target": _named(str(pair / "target") if pair is not None else setting.target),
        "drafter": _named(str(own)) if own is not None and own.is_dir() else drafts if is_plugin else _named(drafts),
        "options": {name: _named(value) for name, value in sorted(options.items()) if isinstance(value, str)},
    }


def _named(name: str) -> str:
    path = Path(name)
    if path.is_dir():
        return "folder " + _folder(str(path.resolve()))
    if path.is_file():
        return "file " + _file(str(path.resolve()), path.stat().st_mtime_ns)
    return name


@lru_cache(maxsize=256)
def _folder(folder: str) -> str:
    found = sorted({path for pattern in _PARTS for path in Path(folder).glob(pattern) if path.is_file()})
    whole = hashlib.sha256()
    for path in found:
        whole.update(f"{path.name} {_file(str(path), path.stat().st_mtime_ns)}\n".encode())
    return whole.hexdigest()[:16]


@lru_cache(maxsize=4096)
def _file(path: str, changed: int) -> str:
    size = Path(path).stat().st_size
    found = hashlib.sha256(str(size).encode())
    with Path(path).open("rb") as opened:
        if size <= _PIECE * _PIECES:
            found.update(opened.read())
        else:
            for piece in range(_PIECES):
                opened.seek(piece * (size - _PIECE) // (_PIECES - 1))
                found.update(opened.read(_PIECE))
    return found.hexdigest()[:16]


def environment(device: Any, threads: int) -> Mapping[str, Any]:
    """Versions, device, processor, threads: what figures of speed depend on besides the setting."""
    from importlib.metadata import version

    import torch

    from specdec.fit.plan import processor

    names = ("specdec", "torch", "transformers")
    kind = torch.device(device)
    return {
        "versions": {**{name: version(name) for name in names}, "python": platform.python_version()},
        "device": f"{kind} ({torch.cuda.get_device_name(kind)})" if kind.type == "cuda" else str(kind),
        "processor": processor(),
        "machine": platform.node(),
        "threads": threads,
    }
