"""Where the cells of a sweep are kept: one SQLite file that several processes may write to at once.

Tables (docs/sweeps.md has every column): `cells`, one finished cell in a row, as JSON; `wanted`, the cells that sweeps
asked for, in their order; `claims`, who runs which cell now; `environments`, where cells were run.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import InputError
from specdec.report.markup import finite
from specdec.sweep.owner import Owner
from specdec.sweep.setting import canonical, digest
from specdec.sweep.sqlite_errors import PATIENCE, explained, patiently

SCHEMA = 1
# "spec", in the header of the file: whose database it is.
APPLICATION = 0x73706563
_MAGIC = b"SQLite format 3\x00"

_TABLES = """
CREATE TABLE IF NOT EXISTS environments (id TEXT PRIMARY KEY, first_seen REAL NOT NULL, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS wanted (
    key TEXT PRIMARY KEY, position INTEGER NOT NULL, setting TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, status TEXT NOT NULL, finished REAL NOT NULL, environment TEXT, document TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS claims (
    key TEXT PRIMARY KEY, host TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL, heartbeat REAL NOT NULL);
"""


@dataclass(frozen=True)
class Counts:
    """Cells of a store, or of one sweep in it."""

    total: int
    done: int
    failed: int
    running: int  # by processes that live, as far as can be told

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed


class Store:
    """Cells in the SQLite file `path`, or in memory (None). To be closed, or used in a `with`.

    Every method is one transaction: a process that is killed leaves either all of it or nothing. Safe between
    processes, not between threads: one store object belongs to the thread that made it.
    Raises `InputError` for a file that is damaged, of another program, or of another version of this one.
    """

    def __init__(self, path: str | Path | None = None, owner: Owner | None = None):
        self.path = Path(path) if path is not None else None
        self.owner = owner or Owner.here()
        if self.path is not None:
            _check_place(self.path)
        with explained(self.path):
            self._connection = sqlite3.connect(self.path or ":memory:", timeout=PATIENCE, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._connection.close()
                raise

    def _open(self) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {int(1000 * PATIENCE)}")
        _check_schema(self._connection, self.path, new_is_fine=True)
        # A log beside the file lets others read while one writes; some file systems have no room for it.
        patiently(lambda: self._connection.execute("PRAGMA journal_mode = WAL").fetchone())
        self._connection.execute("PRAGMA synchronous = FULL")
        with self._transaction() as run:
            _check_schema(self._connection, self.path, new_is_fine=True)
            for statement in _TABLES.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {APPLICATION}")
            run(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        with explained(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        with explained(self.path):
            return self._connection.execute(query, values).fetchall()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this process still claims, and the file."""
        with self._transaction() as run:
            run("DELETE FROM claims WHERE host = ? AND pid = ? AND born = ?", self.owner.as_tuple())
        self._connection.close()

    def want(self, cells: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Add these (key, setting) to what the store is for; those that it knows keep their place."""
        with self._transaction() as run:
            (place,) = run("SELECT coalesce(max(position), 0) FROM wanted").fetchone()
            for position, (key, setting) in enumerate(cells, place + 1):
                run("INSERT OR IGNORE INTO wanted VALUES (?, ?, ?)", (key, position, canonical(setting)))

    def forget(self, keys: Iterable[str]) -> int:
        """Take finished cells out, so that they are measured again; how many there were. They keep their places."""
        with self._transaction() as run:
            return sum(run("DELETE FROM cells WHERE key = ?", (key,)).rowcount for key in keys)

    def claim(self, keys: Iterable[str], retry_failed: bool = False, since: float | None = None) -> str | None:
        """The first of `keys` that nobody has finished and nobody alive is running, now ours; None: there is none.

        Claims of processes that are dead are taken over. `retry_failed`: cells that failed count as not finished,
        unless they did so after `since` (seconds since 1970): another process has then tried them again already.
        """
        last = float("inf") if since is None else since
        with self._transaction() as run:
            rows = run("SELECT key, status, finished FROM cells")
            over = {key for key, status, when in rows if status == "done" or not retry_failed or when > last}
            held = {key: Owner(*rest) for key, *rest in run("SELECT key, host, pid, born, heartbeat FROM claims")}
            now = time.time()
            for key in keys:
                if key in over or (key in held and held[key].is_alive(now)):
                    continue
                run("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?, ?)", (key, *self.owner.as_tuple(), now))
                return key
        return None

    def beat(self) -> None:
        """Tell processes elsewhere that this one still runs what it claimed."""
        with self._transaction() as run:
            mine = self.owner.as_tuple()
            run("UPDATE claims SET heartbeat = ? WHERE host = ? AND pid = ? AND born = ?", (time.time(), *mine))

    def release(self, key: str) -> None:
        """Give back a claim without a result."""
        with self._transaction() as run:
            run("DELETE FROM claims WHERE key = ? AND host = ? AND pid = ? AND born = ?", (key, *self.owner.as_tuple()))

    def add(self, cell: Mapping[str, Any], environment: Mapping[str, Any] | None = None) -> bool:
        """Append a finished cell and give its claim back. False: somebody else had finished it, and theirs stays.

        A cell that had failed is replaced. Numbers that JSON does not have (NaN, infinities) are kept as null.
        """
        key, status, place = cell["key"], cell["status"], None
        if status not in ("done", "failed"):
            raise InputError(f"a cell is done or failed, not {status!r}")
        text = json.dumps(finite(cell), ensure_ascii=False, allow_nan=False)
        with self._transaction() as run:
            if environment is not None:
                place = digest(environment)
                row = (place, time.time(), json.dumps(dict(environment), ensure_ascii=False))
                run("INSERT OR IGNORE INTO environments VALUES (?, ?, ?)", row)
            known = run("SELECT status FROM cells WHERE key = ?", (key,)).fetchone()
            taken = known is None or known[0] == "failed"
            if taken:
                run("INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?)", (key, status, time.time(), place, text))
                asked = (key, canonical(cell["setting"]))
                run("INSERT OR IGNORE INTO wanted SELECT ?1, coalesce(max(position), 0) + 1, ?2 FROM wanted", asked)
            run("DELETE FROM claims WHERE key = ? AND host = ? AND pid = ? AND born = ?", (key, *self.owner.as_tuple()))
        return taken

    def cell(self, key: str) -> dict[str, Any] | None:
        """A finished cell, or None."""
        found = self._rows("SELECT document FROM cells WHERE key = ?", (key,))
        return dict(json.loads(found[0][0])) if found else None

    def counts(self, keys: Iterable[str] | None = None) -> Counts:
        """How far the cells `keys` are (None: all that the store was ever asked for)."""
        chosen = set(keys) if keys is not None else {key for (key,) in self._rows("SELECT key FROM wanted")}
        status = [s for key, s in self._rows("SELECT key, status FROM cells") if key in chosen]
        rows = self._rows("SELECT key, host, pid, born, heartbeat FROM claims")
        now = time.time()
        running = sum(key in chosen and Owner(*rest).is_alive(now) for key, *rest in rows)
        return Counts(len(chosen), status.count("done"), status.count("failed"), running)

    def document(self, keys: Iterable[str] | None = None) -> dict[str, Any]:
        """What the store holds, as `--json` writes it; only the cells `keys`, if given. Cells come in their order."""
        with explained(self.path):
            return _document(self._connection, set(keys) if keys is not None else None)


def _document(connection: sqlite3.Connection, keys: set[str] | None = None) -> dict[str, Any]:
    query = (
        "SELECT cells.key, cells.environment, cells.document FROM cells LEFT JOIN wanted USING (key) "
        "ORDER BY coalesce(wanted.position, 1 << 60), cells.finished"
    )
    rows = [row for row in connection.execute(query).fetchall() if keys is None or row[0] in keys]
    places = dict(connection.execute("SELECT id, document FROM environments ORDER BY first_seen").fetchall())
    used = [place for place in places if any(row[1] == place for row in rows)]
    cells = [{**json.loads(text), "environment": place} for _, place, text in rows]
    environments = {place: json.loads(places[place]) for place in used}
    last: dict[str, Any] = next((environments[row[1]] for row in reversed(rows) if row[1] in environments), {})
    return {"schema": SCHEMA, "environment": last, "environments": environments, "cells": cells}


def load_document(path: str | Path) -> dict[str, Any]:
    """The document (`schema`, `environment`, `cells`) that a store or its JSON export holds; changes neither.

    A JSON document has no more than it was written with: `environments`, and a cell's `environment`, may be missing.
    Raises `InputError` for anything else.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a store of `specdec sweep --store`, or its --json export")
    with file.open("rb") as opened:
        magic = opened.read(len(_MAGIC))
    if magic != _MAGIC:
        return _read_json(file)
    with explained(file):
        # A reader that may not write would leave its log behind. Where nobody can write, there is none.
        writable = os.access(file.resolve().parent, os.W_OK) and os.access(file, os.W_OK)
        mode = "mode=rw" if writable else "mode=ro&immutable=1"
        connection = sqlite3.connect(f"{file.resolve().as_uri()}?{mode}", uri=True, timeout=PATIENCE)
        try:
            connection.execute("PRAGMA query_only = ON")
            _check_schema(connection, file, new_is_fine=False)
            return _document(connection)
        finally:
            connection.close()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is neither a store of `specdec sweep` nor JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("cells"), list):
        raise InputError(f'{file} is not what `specdec sweep --json` writes: it has no list of "cells"')
    if content.get("schema") != SCHEMA:
        raise InputError(_other_version(file, content.get("schema")))
    for number, cell in enumerate(content["cells"], 1):
        if not isinstance(cell, dict) or not {"setting", "status"} <= set(cell):
            raise InputError(f'{file}: cell {number} has no "setting" and "status"; is the file damaged?')
    return {"environment": {}, **content}


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file for the store")
    if not path.resolve().parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.resolve().parent}")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as opened:
            if opened.read(len(_MAGIC)) != _MAGIC:
                raise InputError(f"{path} is there already and is no store of `specdec sweep`; give another name")


def _other_version(path: Path | None, version: Any) -> str:
    return (
        f"{path} has schema {version}, and this version of specdec reads schema {SCHEMA}: use the version that "
        "wrote it, or another file"
    )


def _check_schema(connection: sqlite3.Connection, path: Path | None, new_is_fine: bool) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if new_is_fine and not tables and not application and not version:
        return
    if application != APPLICATION:
        raise InputError(f"{path} is a database of another program; give another name for the store")
    if version != SCHEMA:
        raise InputError(_other_version(path, version))
