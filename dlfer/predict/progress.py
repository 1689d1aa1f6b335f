"""How far a prediction is, on stderr: a bar with the time left; without a terminal a line a minute."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

HEARTBEAT_SECONDS = 60.0


class ProgressLine:
    """Shows one thing at a time; another name begins anew."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = None
        self._what = ""
        self._first = 0
        self._started = self._last_beat = 0.0

    def show(self, what: str, done: int, total: int | None) -> None:
        """Tell that `done` of `total` (None: not known) are done."""
        if what != self._what or self._bar is None:
            self._start(what, done, total)
        self._bar.update(self._task, completed=done)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_beat >= HEARTBEAT_SECONDS:
            self._last_beat = now
            self._console.print(self._describe(done, total, now - self._started), markup=False)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def _start(self, what: str, done: int, total: int | None) -> None:
        self.close()
        # The first of them waited for the others of its batch: the time left is told from what follows it.
        self._what, self._first = what, done
        self._started = self._last_beat = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(what, total=total, completed=done)
        self._bar.start()

    def _describe(self, done: int, total: int | None, elapsed: float) -> str:
        if total is None:
            return f"{self._what}: {done:,} done"
        left = elapsed / max(1, done - self._first) * (total - done)
        return f"{self._what}: {done:,} of {total:,}, about {left / 60:.0f} min left"
