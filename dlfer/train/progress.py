"""Progress reports of a training, stopping it at a checkpoint, file locks and cluster detection, without TensorFlow.

On a terminal, a training shows one progress bar per stage and one line per epoch. A file lock keeps two processes from
computing the same thing, and environment variables show whether this process is one of several hosts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dlfer.config.names import STAGES
from dlfer.errors import EnvironmentProblem, TrainingStopped
from dlfer.runs.run import format_duration
from dlfer.runs.text import escape_text


class TrainingListener:
    """A listener for the progress of a training; this base class only records recent losses and prints nothing.

    Attributes:
        recent_losses: the last running losses, for the error message when a loss is not finite.
    """

    def __init__(self) -> None:
        self.recent_losses: deque[float] = deque(maxlen=20)

    def close(self) -> None:
        """Handle the end of a stage, whether it finished, failed or was stopped."""

    def say(self, text: str) -> None:
        """Show a message to the user."""

    def warn(self, text: str) -> None:
        """Show an important message to the user; by default like any other message."""
        self.say(text)

    def report_progress(self, what: str, done: int, total: int | None) -> None:
        """Handle progress of work other than training, e.g. "features of train"; `total` is None if unknown."""

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """Handle the start of an epoch (from 0) at `step` of `steps`."""

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        """Handle the end of a step; `step` steps of the epoch are done, and loss and accuracy are running means."""
        self.recent_losses.append(loss)

    def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
        """Handle the end of an epoch, after validation; `row` is its row of the history."""


class WarningListener(TrainingListener):
    """A listener that prints warnings to stderr and nothing else."""

    def warn(self, text: str) -> None:
        print(escape_text(text, keep="\n\t"), file=sys.stderr, flush=True)


HEARTBEAT_SECONDS = 60.0


class ConsoleListener(TrainingListener):
    """A listener that writes to stderr: a progress bar, or without a terminal one line a minute with the time left."""

    def __init__(self) -> None:
        super().__init__()
        # In a notebook, Rich would create a separate output for each line.
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True, force_jupyter=False)
        self.progress: Progress | None = None
        self.task = None
        self.stage = ""
        self.position = (0, 0, 0, 0)
        self.started = self.last_beat = time.monotonic()
        self.done_before = 0

    def say(self, text: str) -> None:
        self.console.print(escape_text(text, keep="\n\t"), markup=False)

    def warn(self, text: str) -> None:
        self.console.print(escape_text(text, keep="\n\t"), markup=False, style="bold red")

    def _begin(self, what: str, done: int, total: int | None) -> None:
        """Start a progress bar for `what`, and the timer for the time left, unless it is already shown."""
        if what == self.stage and self.progress is not None:
            return
        self.close()
        self.stage = what
        self.started = self.last_beat = time.monotonic()
        self.done_before = done
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, completed=done, figures="")
        self.progress.start()

    def _print_heartbeat(self, text: str, done: int, total: int | None) -> None:
        """Without a terminal, print `text` once a minute, with the time left if the total is known."""
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            if total is None:
                self.say(text)
                return
            left = (now - self.started) / max(1, done - self.done_before) * (total - done)
            self.say(f"{text}, about {format_duration(left, is_estimate=True)} left")

    def report_progress(self, what: str, done: int, total: int | None) -> None:
        # The first call comes after the first batch, which takes longer, so the time left is estimated without it.
        self._begin(what, done, total)
        self.progress.update(self.task, completed=done, description=what)
        self._print_heartbeat(
            f"{what}: {done:,} done" if total is None else f"{what}: {done:,} of {total:,}", done, total
        )

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self._begin(stage, epoch * steps + step, epochs * steps)
        self.position = (epoch, epochs, step, steps)
        self.progress.update(self.task, description=f"{STAGES[stage]} epoch {epoch + 1}/{epochs}")

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        epoch, epochs, _, steps = self.position
        done = epoch * steps + step
        figures = f"loss {loss:.3f} accuracy {accuracy:.1%}"
        self.progress.update(self.task, completed=done, figures=figures)
        text = f"{STAGES[self.stage]} epoch {epoch + 1}/{epochs}, step {step}/{steps}: {figures}"
        self._print_heartbeat(text, done, epochs * steps)

    def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
        self.say(
            f"{STAGES[stage]} epoch {row['epoch']}/{self.position[1]}: "
            f"train {row['train_accuracy']:.1%}, validation {row['validation_accuracy']:.1%} "
            f"(macro F1 {row['validation_macro_f1']:.3f}, loss {row['validation_loss']:.3f}), "
            f"{row['images_per_second']:,.0f} images/s" + ("  <- best" if is_best else "")
        )
        if row["epoch"] == self.position[1]:
            self.close()

    def close(self) -> None:
        """Remove the progress bar."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopControl:
    """A request to stop training, with its reason; a stage checks it after each step.

    Args:
        max_hours: time limit in hours from now; None sets no limit.
        parent: process id of the parent; training stops when that process has ended. None does not check this.
    """

    def __init__(self, max_hours: float | None = None, *, parent: int | None = None) -> None:
        self._reason: str | None = None
        self._deadline = None if max_hours is None else time.monotonic() + max_hours * 3600
        self._parent = parent

    def request(self, reason: str) -> None:
        """Request a stop; only the first reason is kept."""
        self._reason = self._reason or reason

    def get_reason(self) -> str | None:
        """Return the reason to stop: "Ctrl-C", "SIGTERM", "--max-hours", "the end of its parent process" or None."""
        if self._reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "--max-hours"
        if self._reason is None and self._parent is not None and os.getppid() != self._parent:
            self._reason = "the end of its parent process"
        return self._reason

    @contextmanager
    def watch_signals(self) -> Iterator[StopControl]:
        """Turn SIGTERM and the first Ctrl-C into stop requests inside the block; do nothing outside the main thread.

        A second Ctrl-C interrupts immediately, like Ctrl-C outside the block.
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
        # os.write and not print, since the signal may have interrupted a print.
        os.write(2, b"\nCtrl-C: stopping at a checkpoint after this step; once more to stop at once.\n")


@contextmanager
def hold_lock(path: Path, what: str, control: StopControl, listener: TrainingListener) -> Iterator[None]:
    """Hold a file lock inside the block, waiting while another process holds it unless a stop is requested.

    Args:
        path: path of the lock file.
        what: description of the work under the lock, for messages.
        control: stop requests, checked every second while waiting.
        listener: receives a message when waiting begins.

    Raises:
        TrainingStopped: a stop was requested while waiting.
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
    """Return whether the environment describes a cluster of several processes, without importing TensorFlow.

    Raises:
        EnvironmentProblem: it is to be read from Slurm's variables, and these do not describe a job step.
    """
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
        if not tasks.isdecimal():
            raise EnvironmentProblem(
                f"{CLUSTER_VARIABLE}=slurm: found SLURM_STEP_NUM_TASKS {tasks or 'missing'}, expected the number of tasks, which srun "
                f"sets. Start the processes with srun, or unset {CLUSTER_VARIABLE} for a training on one host."
            )
        return int(tasks) > 1
    return len(_read_tf_config().get("cluster", {}).get("worker", ())) > 1


def is_follower() -> bool:
    """Return whether this process belongs to a cluster and is not its chief."""
    if not describes_cluster():
        return False
    if os.environ.get(CLUSTER_VARIABLE) == "slurm":
        return os.environ.get("SLURM_PROCID", "0") != "0"
    return int(_read_tf_config().get("task", {}).get("index", 0)) != 0


def check_alone(verb: str) -> None:
    """Check that this process does not belong to a cluster.

    Raises:
        EnvironmentProblem: it does, and the command `verb` does not support several hosts.
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
