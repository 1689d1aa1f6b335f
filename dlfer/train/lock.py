"""One process at a time computes what several may share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from dlfer.errors import TrainingStopped
from dlfer.train.control import StopControl
from dlfer.train.watch import TrainingListener


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
