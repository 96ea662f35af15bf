"""Where weights came from: `provenance.json` beside them, and digests of models."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from specdec.errors import InputError

PROVENANCE = "provenance.json"
_PACKAGES = ("specdec", "torch", "transformers", "accelerate")
# Numbers of each parameter that take part in a fingerprint: reading all of a large model would take minutes.
_SAMPLE = 4096


def fingerprint(model: Any) -> str:
    """sha256 over a model's shape and a sample of every parameter: tells models apart, whatever folder they are in."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        found.update(flat[::step][:_SAMPLE].to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()[:16]


def draft_fingerprint(drafter: Any) -> str | None:
    """Of the model that a drafter asks; None for drafters without one."""
    model = getattr(drafter, "model", None)
    return fingerprint(model) if isinstance(model, torch.nn.Module) else None


def versions() -> dict[str, str]:
    return {**{name: version(name) for name in _PACKAGES}, "python": platform.python_version()}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """`content` with the date and versions, as `folder/provenance.json`."""
    today = datetime.date.today().isoformat()
    write_json(folder / PROVENANCE, {**content, "date": today, "versions": versions()})


def read(folder: Path) -> dict[str, Any]:
    """What `write` wrote; `InputError` where there is nothing, or something else."""
    try:
        content = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder} has no readable {PROVENANCE}: it was not written by `specdec train`") from error
    if not isinstance(content, dict) or "kind" not in content:
        raise InputError(f"{folder / PROVENANCE} does not name the kind of drafter")
    return content
