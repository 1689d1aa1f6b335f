"""Asking a training to stop: SIGTERM and --max-hours, looked at between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class StopControl:
    """Remembers why training should stop; the stage asks it after each step.

    Args:
        max_hours: stop after so many hours from now; None never.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self._reason = self._reason or reason

    def get_reason(self) -> str | None:
        """Return "SIGTERM", "--max-hours" or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "--max-hours"
        return self._reason

    @contextmanager
    def watch_signals(self) -> Iterator[StopControl]:
        """Turn SIGTERM into a request while inside; elsewhere than in the main thread do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.request("SIGTERM"))
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)
