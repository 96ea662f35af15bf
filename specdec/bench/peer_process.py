"""A process of its own for a peer: its threads are not ours, and its CPU time can be told from that of others.

Both ends speak lines of JSON: a request `[name, {arguments}]`, then an answer `{"value": ...}` or `{"error": "..."}`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from specdec.errors import SpecdecError

# Converting a model of some billion weights takes minutes.
_TIMEOUT = 1800.0
_TIME_TO_END = 10.0


class PeerError(SpecdecError, RuntimeError):
    """A peer failed, or said something else than what is known of it."""


class PeerProcess:
    """`python -m module`, whose `main` calls `serve`."""

    def __init__(self, module: str):
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (until close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
        )

    def ask(self, request: str, /, **arguments: Any) -> Any:
        """One request, answered. Raises `PeerError` when it fails, or the process ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: the answer is what says why
            self._process.stdin.write(json.dumps([request, arguments]) + "\n")
            self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT)
        if not ready:
            self._process.kill()
            raise PeerError(f"no answer in {_TIMEOUT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with status {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "nothing was printed"

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far; 0 where the system does not tell."""
        with suppress(AttributeError, OSError):  # the clock that clock_getcpuclockid(3) gives on Linux
            return time.clock_gettime((~self._process.pid << 3) | 2)
        return 0.0

    def close(self) -> None:
        if self._log.closed:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_TIME_TO_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """The other end: answers until its input ends. What a library prints goes to the log, not between the lines."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": handlers[name](**arguments)}
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            answer = {"error": first}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
