"""What a person sees of a run, and how they stop it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from specdec.train.objective import Losses


class StopSignal:
    """Turns the first interrupt or termination into a wish that the loop looks at between steps; a second one kills."""

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python has no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class Progress:
    """A bar with the time left, the loss and the newest held-out numbers; a line for each evaluation.

    `console` None shows nothing.
    """

    def __init__(self, console: Console | None):
        self.console = console
        self._bar: Any = None
        self._task: Any = None
        self._newest = ""
        self._share: float | None = None  # when this process began
        self._began = 0.0

    def __enter__(self) -> Progress:
        if self.console is not None and self.console.is_terminal:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(24), TaskProgressColumn(), TextColumn("{task.fields[line]}"))
            self._bar = Bar(*columns, console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, line="evaluating")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        if self.console is not None:
            self.console.print(line, markup=False)

    def step(self, share: float, state: Any, losses: Losses) -> None:
        now = time.monotonic()
        if self._share is None:
            self._share, self._began = share, now
        if self._bar is None:
            return
        done = share - self._share
        left = duration((1 - share) * (now - self._began) / done) + " left" if done > 0 else ""
        metrics = "  ".join(f"{name} {float(value):.3f}" for name, value in losses.metrics.items())
        loss = f"step {state.step}  loss {float(losses.loss.detach()):.4f}"
        line = "  ".join(part for part in (left, loss, metrics, self._newest) if part)
        self._bar.update(self._task, completed=min(share, 1.0), line=line)

    def held_out(self, row: Mapping[str, Any], described: str, is_best: bool) -> None:
        self._newest = "held-out: " + described.partition(";")[0]
        mark = "  best" if is_best else ""
        self.say(f"step {row['step']:>6}  {duration(row['seconds']):>7}  {described}{mark}")
