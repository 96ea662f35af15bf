"""Prompt sets: the built-in one, JSONL in several projects' formats, and plain text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import InputError

BUILT_IN = Path(__file__).with_name("prompts.jsonl")
# Where a row's text may stand: our own, many projects', Spec-Bench's, GSM8K's.
_KEYS = ("text", "prompt", "turns", "question")
_IDS = ("id", "question_id", "task_id")


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    category: str = ""


def _text(row: Mapping[str, Any], where: str) -> str:
    for key in _KEYS:
        value = row.get(key)
        if isinstance(value, list) and value:
            value = value[0]  # the first turn of a conversation
        if isinstance(value, str) and value:
            return value
    raise InputError(f"{where}: no text under any of {', '.join(_KEYS)}; the row has {', '.join(row) or 'nothing'}")


def _row(line: str, number: int, name: str) -> Prompt:
    where = f"{name}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg})") from error
    if isinstance(row, str) and row:
        return Prompt(str(number), row)
    if not isinstance(row, dict):
        raise InputError(f"{where}: a row is an object or a string, not {type(row).__name__}")
    identity = next((str(row[key]) for key in _IDS if key in row), str(number))
    return Prompt(identity, _text(row, where), str(row.get("category", "")))


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file, or the built-in held-out ones: beginnings of Python source.

    `.jsonl`, or lines that begin with `{`: one JSON object per line with `text`, `prompt`, `turns` (Spec-Bench; the
    first turn) or `question` (GSM8K). Anything else: one prompt per line, empty lines skipped. Raises `InputError`
    for a file that cannot be read or holds nothing.
    """
    source = Path(path) if path is not None else BUILT_IN
    if limit is not None and limit < 1:
        raise InputError(f"limit is a number of prompts >= 1, not {limit}")
    try:
        content = source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read prompts from {source}: {reason}") from error
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise InputError(f"{source} holds no prompts")
    as_json = source.suffix in (".jsonl", ".ndjson") or lines[0][1].lstrip().startswith("{")
    lines = lines[:limit]
    if as_json:
        return [_row(line, number, source.name) for number, line in lines]
    return [Prompt(str(number), line.rstrip("\r")) for number, line in lines]
