"""Who claims a cell, and whether that process still lives."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Of a process that cannot be looked at: on another machine, or in another container.
SILENCE = 900.0


@dataclass(frozen=True)
class Owner:
    """A process. `host`: where process numbers mean the same; `born`: tells it from a later one of the same number.

    `heartbeat`: when it was last heard of, in seconds since 1970.
    """

    host: str
    pid: int
    born: str
    heartbeat: float = 0.0

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        return cls(_host(), os.getpid(), _born(os.getpid()))

    def as_tuple(self) -> tuple[str, int, str]:
        return self.host, self.pid, self.born

    def is_alive(self, now: float) -> bool:
        """Whether it still runs; one elsewhere counts as dead after 15 minutes without a sign."""
        if self.host != _host() or os.name != "posix":
            return now - self.heartbeat < SILENCE
        if self.pid == os.getpid():
            return self.born == _born(self.pid)
        if not _exists(self.pid):
            return False
        born = _born(self.pid)
        return not born or not self.born or born == self.born


def _host() -> str:
    """The machine, this start of it, and the container: process numbers are told apart by all three."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8])
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return ":".join(parts)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to somebody else
        return True
    with suppress(OSError, IndexError):
        # A killed child that nobody has waited for yet is still listed.
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return True


def _born(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty where the system does not tell."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return fields[19]
    return ""
