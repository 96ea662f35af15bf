"""Documents as files for other programs: JSON as they are, CSV and Parquet with one flat row per cell."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.sweep.setting import FIELDS

# Of a cell, beside its setting: column, and where it stands.
_FIGURES: dict[str, tuple[str, ...]] = {
    "error_type": ("error", "type"),
    "error": ("error", "message"),
    "prompts": ("prompts",),
    "repetitions": ("repetitions",),
    "identical": ("identical",),
    "expects_identity": ("expects_identity",),
    "num_tokens": ("stats", "num_tokens"),
    "num_rounds": ("stats", "num_rounds"),
    "num_draft_tokens": ("stats", "num_draft_tokens"),
    "num_accepted_draft_tokens": ("stats", "num_accepted_draft_tokens"),
    "mean_acceptance_length": ("stats", "mean_acceptance_length"),
    "draft_acceptance_rate": ("stats", "draft_acceptance_rate"),
    "lossless": ("stats", "lossless"),
    "speedup": ("speedup", "median"),
    "speedup_low": ("speedup", "low"),
    "speedup_high": ("speedup", "high"),
    "ideal_speedup": ("ideal_speedup",),
    "efficiency": ("efficiency",),
    "plain_tokens_per_second": ("plain", "tokens_per_second", "median"),
    "tokens_per_second": ("speculative", "tokens_per_second", "median"),
    "slices": ("slices",),
    "clean_slices": ("clean_slices",),
    "target_weight_bytes": ("memory", "target_weights"),
    "draft_weight_bytes": ("memory", "draft_weights"),
    "kv_bytes": ("memory", "kv"),
    "loss": ("quality", "loss"),
    "prefill": ("timing", "prefill"),
    "when": ("when",),
    "cell_seconds": ("cell_seconds",),
}
# Lists go by position, so far.
_POSITIONS = 8
COLUMNS = (
    "key",
    "status",
    *FIELDS,
    *_FIGURES,
    *(f"{kind}_acceptance_{i + 1}" for kind in ("conditional", "joint") for i in range(_POSITIONS)),
)


def flat(cell: Mapping[str, Any]) -> dict[str, Any]:
    """One row: fields of the setting, and figures; None where there is none. Lists and tables are JSON texts."""
    setting = cell["setting"]
    row = {"key": cell.get("key"), "status": cell["status"]}
    row.update({name: _simple(setting.get(name)) for name in FIELDS})
    row.update({name: _simple(_at(cell, path)) for name, path in _FIGURES.items()})
    for kind in ("conditional", "joint"):
        values = _at(cell, ("stats", f"{kind}_acceptance")) or []
        for i in range(_POSITIONS):
            row[f"{kind}_acceptance_{i + 1}"] = values[i] if i < len(values) else None
    return row


def _at(content: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content


def _simple(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple, Mapping)) else value


def check_exports(**paths: str | None) -> None:
    """Fail before the work: `InputError` for a place that cannot be written to, or a library that is missing."""
    for option, path in paths.items():
        if path is None:
            continue
        folder = Path(path).resolve().parent
        if Path(path).is_dir():
            raise InputError(f"--{option} {path}: is a folder; give the name of a file")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise InputError(f"--{option} {path}: cannot write into {folder}")
    if paths.get("parquet") is not None:
        _pyarrow()


def write_json(document: Mapping[str, Any], path: str | Path) -> None:
    """The document, for `load_document` and anybody else."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_csv(document: Mapping[str, Any], path: str | Path) -> None:
    """Columns in the order of `COLUMNS`; nothing where there is no value."""
    with Path(path).open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, COLUMNS)
        writer.writeheader()
        writer.writerows(flat(cell) for cell in document["cells"])


def write_parquet(document: Mapping[str, Any], path: str | Path) -> None:
    """The rows of `write_csv`, with types. Raises `InputError` without pyarrow."""
    pyarrow = _pyarrow()
    import pyarrow.parquet as parquet

    rows = [flat(cell) for cell in document["cells"]]
    columns = {}
    for name in COLUMNS:
        values = [row[name] for row in rows]
        # A column without any value has no type of its own.
        kind = pyarrow.string() if all(value is None for value in values) else None
        columns[name] = pyarrow.array(values, type=kind)
    parquet.write_table(pyarrow.table(columns), str(path))


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            "--parquet needs pyarrow: pip install 'specdec[parquet]' (--csv has the same columns)"
        ) from None
    return pyarrow
