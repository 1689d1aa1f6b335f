"""Stopping a training at a checkpoint, the lock for what one process computes at a time, and whether this process is one
of several hosts by its environment, all without TensorFlow."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dlfer.errors import EnvironmentProblem, TrainingStopped
from dlfer.train.progress import TrainingListener


class StopControl:
    """Remembers why training should stop; the stage asks it after each step.

    Args:
        max_hours: stop after so many hours from now; None never.
        parent: number of the process that this one works for; stop when that is gone.
    """

    def __init__(self, max_hours: float | None = None, *, parent: int | None = None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._parent = parent

    def request(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self._reason = self._reason or reason

    def get_reason(self) -> str | None:
        """Return "Ctrl-C", "SIGTERM", "--max-hours", "the end of its parent process" or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "--max-hours"
        if self._reason is None and self._parent is not None and os.getppid() != self._parent:
            self._reason = "the end of its parent process"
        return self._reason

    @contextmanager
    def watch_signals(self) -> Iterator[StopControl]:
        """Turn SIGTERM and the first Ctrl-C into a request while inside; elsewhere than in the main thread do nothing.

        A second Ctrl-C interrupts at once, as Ctrl-C does outside.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        signal.signal(signal.SIGTERM, lambda *_: self.request("SIGTERM"))
        signal.signal(signal.SIGINT, self._interrupt)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.request("Ctrl-C")
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nCtrl-C: stopping at a checkpoint after this step; once more to stop at once.\n")


@contextmanager
def hold_lock(path: Path, what: str, control: StopControl, listener: TrainingListener) -> Iterator[None]:
    """Hold a file lock; while another process has it, wait, say so once, and heed a wish to stop.

    Args:
        path: of the lock file.
        what: is computed under it, in words.
        control: asked each second whether to stop.
        listener: told that it waits.

    Raises:
        TrainingStopped: the control asked for it while waiting.
    """
    lock, has_said = FileLock(path), False
    while True:
        try:
            lock.acquire(timeout=1)
            break
        except Timeout:
            if not has_said:
                listener.say(f"{what}: another process is at work on it ({path}); waiting")
                has_said = True
            reason = control.get_reason()
            if reason is not None:
                raise TrainingStopped(
                    f"{what} stopped by {reason} while another process is at work on it.", reason=reason
                ) from None
    try:
        yield
    finally:
        lock.release()


CLUSTER_VARIABLE = "DLFER_CLUSTER"


def describes_cluster() -> bool:
    """Tell from the environment, without TensorFlow, whether this process is one of several."""
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return len(_read_tf_config().get("cluster", {}).get("worker", ())) > 1


def is_follower() -> bool:
    """Tell whether this process is one of several and not the first, which leads them."""
    if not describes_cluster():
        return False
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        return os.environ.get("SLURM_PROCID", "0") != "0"
    return int(_read_tf_config().get("task", {}).get("index", 0)) != 0


def check_alone(verb: str) -> None:
    """Raise unless this process works alone.

    Raises:
        EnvironmentProblem: it is one of several, and `verb` is not done over hosts.
    """
    if describes_cluster():
        raise EnvironmentProblem(
            f"dlfer {verb}: the environment describes several hosts (TF_CONFIG or {CLUSTER_VARIABLE}), and only "
            "dlfer run works over several. Unset the two, or run each member by dlfer run."
        )


def _read_tf_config() -> dict:
    text = os.environ.get("TF_CONFIG", "{}")
    try:
        config = json.loads(text)
        if isinstance(config, dict) and isinstance(config.get("cluster", {}), dict):
            return config
    except json.JSONDecodeError:
        config = None
    raise EnvironmentProblem(
        f"TF_CONFIG: found {text[:200]!r}, expected JSON such as "
        '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}.'
    )
