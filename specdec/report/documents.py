"""Documents of cells, read from a store or its JSON export and narrowed to what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.errors import InputError


def load(path: str | Path, only: Sequence[str] = (), skip: Sequence[str] = ()) -> dict[str, Any]:
    """The document of a store or of its JSON: cells of which every expression of `only` and none of `skip` is true.

    Raises `InputError` for a file that is neither, for filters that leave nothing, and for a document without cells.
    """
    from specdec.sweep.filters import Filter
    from specdec.sweep.setting import Setting
    from specdec.sweep.store import load_document

    document = load_document(path)
    if not document["cells"]:
        raise InputError(f"{path} has no cells yet: run `specdec sweep --store {path}` first")
    keep, leave = [Filter(text) for text in only], [Filter(text) for text in skip]
    if not keep and not leave:
        return document

    def fits(content: dict[str, Any]) -> bool:
        setting = Setting.of(content)
        return all(one(setting) for one in keep) and not any(one(setting) for one in leave)

    cells = [cell for cell in document["cells"] if fits(cell["setting"])]
    if not cells:
        raise InputError(f"none of the {len(document['cells'])} cells of {path} is left by --only and --skip")
    return {**document, "cells": cells}
