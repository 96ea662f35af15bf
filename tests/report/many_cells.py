"""Documents of many cells, quickly: a dozen made-up cells, again at other temperatures."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from sweep_documents import document

TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 1.0)
_DOZEN = 12


@cache
def _dozen() -> dict[str, Any]:
    return document(_DOZEN)


def many(num_cells: int, *, num_failed: int = 0) -> dict[str, Any]:
    """`num_cells` cells (at most 60): drafters and k vary fastest, then temperatures; the last `num_failed` failed."""
    made = copy.deepcopy(_dozen())
    cells = []
    for number in range(num_cells):
        cell = copy.deepcopy(made["cells"][number % _DOZEN])
        cell["setting"]["temperature"] = TEMPERATURES[number // _DOZEN]
        cell["key"] = f"{number:016x}"
        if number >= num_cells - num_failed:
            head = {name: cell[name] for name in ("key", "setting", "label", "when")}
            error = {"type": "MemoryBudgetError", "message": "the caches of a text do not fit"}
            cell = {**head, "status": "failed", "error": error, "cell_seconds": 0.1}
        cells.append(cell)
    return {**made, "cells": cells}
