"""What `specdec sweep` shows meanwhile: how far it is, the time left, and the best cells so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from specdec.cli.sweep_screen import cell_table, columns_of, for_people, merit
from specdec.report.pairs import changed
from specdec.sweep.setting import Setting, labels

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.sweep.engine import Progress
    from specdec.sweep.store import Store

_BEST = 5
# What figures depend on, of where they were measured.
_PLACE = ("versions", "device", "processor", "threads")
# Seconds between two drawings, which happen between timed calls only.
_REDRAW = 0.5


class Board:
    """A sweep under way: a line with the time left and the best cells, redrawn in place; lines without a terminal.

    Nothing is drawn by a thread: that would be one of the disturbances.
    """

    def __init__(self, console: Console, store: Store, cells: Mapping[str, Setting], timed: bool):
        self.console, self.store, self.cells, self.timed = console, store, cells, timed
        self.live: Live | None = None
        self._labels = dict(zip(cells.values(), labels(list(cells.values())), strict=True))
        self._now = ""
        self._share = 0.0  # of the running cell
        self._drawn = 0.0
        self._began = time.monotonic()
        self._done: dict[str, dict[str, Any]] = {}
        self._seconds: list[float] = []
        self._num_failed = 0

    def resumed(self, retry_failed: bool, environment: Callable[[Setting], Mapping[str, Any]] | None = None) -> None:
        """Say what the store has already, and what of it was measured elsewhere than `environment` (of a setting)."""
        counts = self.store.counts(self.cells)
        for key in self.cells:
            cell = self.store.cell(key)
            if cell is not None and cell["status"] == "done":
                self._done[key] = cell
        self._num_failed = 0 if retry_failed else counts.failed
        if counts.done or counts.failed:
            failed = f", {counts.failed} of them failed" if counts.failed else ""
            again = " (--retry-failed runs those again)" if counts.failed and not retry_failed else ""
            found = counts.done + counts.failed
            self.say(f"{found} of {counts.total} cells are in the store{failed}{again}; --fresh measures all again")
        if self._done and environment is not None:
            self._warn_of_others(environment)

    def _warn_of_others(self, environment: Callable[[Setting], Mapping[str, Any]]) -> None:
        """Keys know nothing of versions and machines: such cells are taken for finished."""
        document = self.store.document(self._done)
        num_others, differences = 0, dict[str, tuple[Any, Any]]()
        for cell in document["cells"]:
            place = document["environments"].get(cell["environment"])
            if place is None:
                continue
            now = environment(self.cells[cell["key"]])
            found = changed(*({name: where.get(name) for name in _PLACE} for where in (place, now)))
            num_others += bool(found)
            differences.update(found)
        if differences:
            said = "; ".join(f"{name}: {then} → {now}" for name, (then, now) in differences.items())
            self.say(
                f"{num_others} of them were measured by other versions or on another machine ({said}) and are not "
                "measured again: give --fresh to do so, or another --store"
            )

    def say(self, message: str) -> None:
        self.console.print(f"note: {message}", markup=False, style="yellow")

    def __enter__(self) -> Board:
        if self.console.is_terminal and len(self.cells) > 1:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    @property
    def num_over(self) -> int:
        return len(self._done) + self._num_failed

    def starting(self, setting: Setting) -> Progress:
        self._now, self._share = self._labels[setting], 0.0
        self._draw(force=True)

        def tick(done: int, total: int, what: str) -> None:
            self._share = done / max(total, 1)
            self._draw()

        return tick

    def finished(self, cell: Mapping[str, Any]) -> None:
        self._share = 0.0
        self._take(cell)
        self._draw(force=True)

    def look(self) -> None:
        """See what other processes have finished."""
        before = self.num_over
        for key in self.cells:
            if key in self._done:
                continue
            cell = self.store.cell(key)
            if cell is not None and cell["status"] == "done":
                self._take(cell)
        self._num_failed = self.store.counts(self.cells).failed
        self._draw(force=self.num_over > before)

    def _take(self, cell: Mapping[str, Any]) -> None:
        if cell["status"] == "done":
            self._done[cell["key"]] = dict(cell)
        else:
            self._num_failed += 1
        self._seconds.append(cell["cell_seconds"])
        if self.live is None:
            if cell["status"] == "done":
                said = f"{cell['stats']['mean_acceptance_length']:.2f} per round"
                said += f", {cell['speedup']['median']:.2f}×" if cell.get("speedup") else ""
            else:
                said = f"failed: {cell['error']['type']}"
            name = self._labels[self.cells[cell["key"]]]
            self.console.print(f"{self.num_over}/{len(self.cells)} {name}: {said}", markup=False)

    def _left(self) -> str:
        passed = time.monotonic() - self._began
        finished = len(self._seconds) + self._share
        if finished < 0.2:
            return ""
        to_come = max(0.0, len(self.cells) - self.num_over - self._share)
        return f", {for_people(passed / finished * to_come)} left"

    def _draw(self, force: bool = False) -> None:
        if self.live is None or (not force and time.monotonic() - self._drawn < _REDRAW):
            return
        self._drawn = time.monotonic()
        failed = f", {self._num_failed} failed" if self._num_failed else ""
        line = Text(f"{self.num_over} of {len(self.cells)} cells{failed}{self._left()} · {self._now}", style="dim")
        best = sorted(self._done.values(), key=merit, reverse=True)[:_BEST]
        columns = columns_of(list(self.cells.values()))
        shown = Group(line, cell_table(best, self.timed, columns)) if best else Group(line)
        self.live.update(shown, refresh=True)
