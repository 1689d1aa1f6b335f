"""Watching a training: what Keras says after each step, and who is told about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import keras

if TYPE_CHECKING:
    from dlfer.train.state import StageState


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


class StepWatcher(keras.callbacks.Callback):
    """Counts the steps of one epoch in the stage's state and hands each on.

    Keras gives running means since `fit` began; an epoch that goes on in the middle adds the sums that
    were done before.
    """

    def __init__(self, state: StageState, after_step: Callable[[float, float], None]) -> None:
        super().__init__()
        self.stage_state = state
        self.before = dict(state.sums)
        self.after_step = after_step

    def on_train_batch_end(self, batch: int, logs=None) -> None:
        state, before = self.stage_state, self.before
        state.step += 1
        steps = state.step - before["steps"]
        state.sums = {"steps": state.step} | {
            name: before[name] + float(logs[name]) * steps for name in ("loss", "accuracy")
        }
        self.after_step(state.sums["loss"] / state.step, state.sums["accuracy"] / state.step)
