"""A study as a person watches it: sentences on stderr, and one bar for each member where several train at a time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dlfer.config.schema import STAGES


class StudyConsole:
    """Writes to stderr; on a terminal it can show bars below what is said.

    Args:
        console: where to; stderr by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._bars: dict[str, TaskID] = {}

    def say(self, text: str, *, style: str | None = None) -> None:
        """Say a sentence; it stays above the bars."""
        self.console.print(text, markup=False, style=style)

    def show_bars(self) -> None:
        """Begin to show bars, where this is a terminal."""
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[value]}"),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._progress.start()

    def hide_bars(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._bars = None, {}

    def start(self, title: str) -> None:
        """A member begins."""
        if self._progress is not None:
            self._bars[title] = self._progress.add_task(title, total=None, value="starting")

    def update(self, title: str, event: Mapping[str, Any]) -> None:
        """Show where a member is: `event` is what its process says of a stage or an epoch."""
        if self._progress is None or title not in self._bars:
            return
        row = event.get("row") or {}
        accuracy = row.get("validation_accuracy")
        value = STAGES[event["stage"]] + ("" if accuracy is None else f", validation {accuracy:.1%}")
        self._progress.update(self._bars[title], total=event["epochs"], completed=event.get("epoch", 0), value=value)

    def stop(self, title: str) -> None:
        """A member has ended."""
        if self._progress is not None and title in self._bars:
            self._progress.remove_task(self._bars.pop(title))
