"""Files of prompts: plain or gzip, JSON or text, as records; what they hold is `specdec.bench.prompts`' business."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.errors import InputError

# Every known prompt set is far smaller; a few kilobytes of gzip can hold gigabytes of zeros.
MAX_UNPACKED = 256 << 20
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_JSON_LINES = (".jsonl", ".ndjson")


def _unpack(packed: bytes, path: Path) -> bytes:
    """What gzip bytes hold. `InputError` when it grows past `MAX_UNPACKED`, which is noticed while it is unpacked."""
    parts, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as stream:
            while part := stream.read(_CHUNK):
                size += len(part)
                if size > MAX_UNPACKED:
                    raise InputError(
                        f"{path} unpacks to more than {MAX_UNPACKED >> 20} MiB from {len(packed):,} bytes, "
                        "which no prompt set needs; if it is meant to, unpack it yourself and give the unpacked file"
                    )
                parts.append(part)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"cannot read prompts from {path}: the gzip file is damaged ({error})") from error
    return b"".join(parts)


def read_text(path: Path) -> str:
    """A UTF-8 file, unpacked if it is gzip (told by its first bytes, not by its name). `InputError` if unreadable."""
    try:
        content = path.read_bytes()
        return (_unpack(content, path) if content.startswith(_GZIP) else content).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"cannot read prompts from {path}: {reason}") from error


def _lines(content: str, name: str, as_json: bool) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if not as_json:
            yield where, line.rstrip("\r")
            continue
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not valid JSON ({error.msg})") from error
        except RecursionError as error:
            raise InputError(f"{where}: JSON nested too deeply to be a prompt") from error


def _whole(content: str) -> list[Any] | None:
    """The elements of a file that is one JSON array, or the one object of a file that is spread over lines."""
    try:
        found = json.loads(content)
    except (json.JSONDecodeError, RecursionError):
        return None
    return found if isinstance(found, list) else [found] if isinstance(found, dict) else None


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """`(where it stands, record)`: objects or strings of a JSON array or of JSON lines, else the lines of a text.

    Told by content: a file that begins with `{` or is named `.jsonl` has JSON lines; one that begins with `[` and is
    valid JSON as a whole is an array. Raises `InputError` for what cannot be read, naming the line.
    """
    content = read_text(path)
    head = content.lstrip()[:1]
    if not head:
        raise InputError(f"{path} holds no prompts")
    name = path.name.removesuffix(".gz")
    as_lines = name.endswith(_JSON_LINES)
    if not as_lines and (head == "[" or name.endswith(".json")):
        found = _whole(content)
        if found is not None:
            return ((f"{path.name}, element {number}", row) for number, row in enumerate(found, 1))
        if name.endswith(".json") and head == "[":
            raise InputError(f"{path.name}: not valid JSON, though it begins like an array")
    return _lines(content, path.name, as_lines or head == "{")
