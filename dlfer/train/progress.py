"""Who is told about the progress of a training: nobody, or a person, who sees one bar a stage and one line an epoch."""

from __future__ import annotations

import sys
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dlfer.config.names import STAGES
from dlfer.runs.run import format_duration
from dlfer.runs.text import escape_text


class TrainingListener:
    """Is told about the progress of a training; this one keeps the last losses and stays silent.

    Attributes:
        recent_losses: the last running losses, for the message when one is not finite.
    """

    def __init__(self) -> None:
        self.recent_losses: deque[float] = deque(maxlen=20)

    def close(self) -> None:
        """The stage has ended, in whatever way."""

    def say(self, text: str) -> None:
        """A sentence for the person who watches."""

    def warn(self, text: str) -> None:
        """A sentence that the person who watches must not miss; without a style of its own it is said."""
        self.say(text)

    def finish_part(self, what: str, done: int, total: int | None) -> None:
        """Of work that is no training, e.g. "features of train", `done` of `total` (None: not known) are done."""

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """An epoch (from 0) begins at `step` of `steps`."""

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        """`step` steps of the epoch are done; loss and accuracy are running means."""
        self.recent_losses.append(loss)

    def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
        """An epoch is done and validated; `row` is its line of history."""


class WarningListener(TrainingListener):
    """Shows warnings on stderr, and nothing else."""

    def warn(self, text: str) -> None:
        print(escape_text(text, keep="\n\t"), file=sys.stderr, flush=True)


HEARTBEAT_SECONDS = 60.0


class ConsoleListener(TrainingListener):
    """Writes to stderr. Without a terminal there is no bar, but a line a minute with the time left."""

    def __init__(self) -> None:
        super().__init__()
        # In a notebook plain lines, since Rich would make an output of its own of each.
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
        """Start a bar, and the clock of what is left, unless they are those of `what` already."""
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

    def _beat(self, text: str, done: int, total: int | None) -> None:
        """Without a terminal, say `text` once a minute, and the time left where the total is known."""
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_beat >= HEARTBEAT_SECONDS:
            self.last_beat = now
            if total is None:
                self.say(text)
                return
            left = (now - self.started) / max(1, done - self.done_before) * (total - done)
            self.say(f"{text}, about {format_duration(left, is_estimate=True)} left")

    def finish_part(self, what: str, done: int, total: int | None) -> None:
        # The first batch is done when it is first heard of, and took longer than those that follow.
        self._begin(what, done, total)
        self.progress.update(self.task, completed=done, description=what)
        self._beat(f"{what}: {done:,} done" if total is None else f"{what}: {done:,} of {total:,}", done, total)

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
        self._beat(text, done, epochs * steps)

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
