"""Who is told about the progress of a training."""

from __future__ import annotations

from collections import deque


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

    def finish_part(self, what: str, done: int, total: int) -> None:
        """Of work that is no training, e.g. "features of train", `done` of `total` are done."""

    def start_epoch(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """An epoch (from 0) begins at `step` of `steps`."""

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        """`step` steps of the epoch are done; loss and accuracy are running means."""
        self.recent_losses.append(loss)

    def finish_epoch(self, stage: str, row: dict, *, is_best: bool) -> None:
        """An epoch is done and validated; `row` is its line of history."""
