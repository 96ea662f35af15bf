"""SQLite's errors as ours, and patience with other processes."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specdec.errors import InputError

# Seconds to wait for another process's transaction, each of which takes milliseconds.
PATIENCE = 60.0


@contextmanager
def explained(path: Path | None) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise InputError(f"cannot use the store {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise InputError(f"the store {path} is damaged ({error}): start another one, or restore a copy") from error


def patiently(call: Callable[[], Any]) -> Any:
    """SQLite does not wait for others when it changes the kind of journal."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.01)
