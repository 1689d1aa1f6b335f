"""The training as a person watches it: one bar a stage with the time left, one line an epoch."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dlfer.config.schema import STAGES
from dlfer.runs.run import format_duration
from dlfer.train.watch import TrainingListener

HEARTBEAT_SECONDS = 60.0


class ConsoleListener(TrainingListener):
    """Writes to stderr. Without a terminal there is no bar, but a line a minute with the time left."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.task = None
        self.stage = ""
        self.position = (0, 0, 0, 0)
        self.started = self.last_beat = time.monotonic()
        self.done_before = 0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(text, markup=False, style="bold red")

    def _start_bar(self, total: int, completed: int) -> None:
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
        self.task = self.progress.add_task("", total=total, completed=completed, figures="")
        self.progress.start()

    def finish_part(self, what: str, done: int, total: int) -> None:
        if what != self.stage or self.progress is None:
            self.close()
            self.stage = what
            self.started = self.last_beat = time.monotonic()
            # The first batch is done when it is first heard of, and took longer than those that follow.
            self.done_before = done
            self._start_bar(total, done)
        self.progress.update(self.task, completed=done, description=what)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            left = (now - self.started) / max(1, done - self.done_before) * (total - done)
            self.say(f"{what}: {done:,} of {total:,}, about {format_duration(left, is_estimate=True)} left")

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        if stage != self.stage or self.progress is None:
            self.close()
            self.stage = stage
            self.started = self.last_beat = time.monotonic()
            self.done_before = epoch * steps + step
            self._start_bar(epochs * steps, self.done_before)
        self.position = (epoch, epochs, step, steps)
        self.progress.update(self.task, description=f"{STAGES[stage]} epoch {epoch + 1}/{epochs}")

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        epoch, epochs, _, steps = self.position
        done = epoch * steps + step
        figures = f"loss {loss:.3f} accuracy {accuracy:.1%}"
        self.progress.update(self.task, completed=done, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            left = (now - self.started) / max(1, done - self.done_before) * (epochs * steps - done)
            self.say(
                f"{STAGES[self.stage]} epoch {epoch + 1}/{epochs}, step {step}/{steps}: {figures}, "
                f"about {format_duration(left, is_estimate=True)} left"
            )

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
        """Take the bar away."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
