"""Losses and learning-rate schedules, built from their sections of the experiment."""

from __future__ import annotations

import math

import keras
from keras import ops

from dlfer.config.schema import LossConfig, ScheduleConfig
from dlfer.model.googlenet import AUXILIARY_LOSS_WEIGHT


def build_loss(config: LossConfig, *, auxiliary: int = 0) -> keras.losses.Loss:
    """Build the loss between one-hot (or mixed) targets [B, C] and logits [B, C].

    binary_crossentropy sees the C outputs as C yes-or-no questions, as a sigmoid head answers them;
    focal is the categorical focal loss (Lin et al. 2017) without class weights: those are
    `balance: class_weight`.

    Args:
        config: its section.
        auxiliary: number of auxiliary heads; with some, logits are [B, 1 + auxiliary, C].
    """
    if auxiliary:
        return WithAuxiliary(build_loss(config))
    if config.name == "binary_crossentropy":
        return keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=config.label_smoothing)
    if config.name == "focal":
        return FocalFromLogits(gamma=config.gamma, label_smoothing=config.label_smoothing)
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing)


class WithAuxiliary(keras.losses.Loss):
    """A loss of logits [B, 1 + A, C]: of the first ones, plus AUXILIARY_LOSS_WEIGHT times that of each of the others."""

    def __init__(self, base: keras.losses.Loss) -> None:
        super().__init__(name=base.name)
        self.base = base

    def call(self, y_true, y_pred):
        """Return float [B], the loss of each row."""
        total = self.base.call(y_true, y_pred[:, 0])
        for number in range(1, y_pred.shape[1]):
            total = total + AUXILIARY_LOSS_WEIGHT * self.base.call(y_true, y_pred[:, number])
        return total


def take_own_logits(logits):
    """Return the network's own logits [B, C] of [B, C] or [B, 1 + A, C]."""
    return logits[:, 0] if len(logits.shape) == 3 else logits


def compute_hits(y_true, y_pred):
    """Return float [B], 1 where the network's own largest logit is that of the largest target."""
    return ops.cast(ops.equal(ops.argmax(y_true, axis=-1), ops.argmax(take_own_logits(y_pred), axis=-1)), "float32")


@keras.saving.register_keras_serializable(package="dlfer")
class FocalFromLogits(keras.losses.Loss):
    """Categorical focal loss: sum over classes of -y (1 - p)^gamma log p, from logits.

    Keras' own version turns logits into clipped probabilities first; this one takes log_softmax, so
    that it stays exact where a probability is small.
    """

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Return float [B], the loss of each row."""
        logs = ops.log_softmax(y_pred, axis=-1)
        targets = ops.cast(y_true, logs.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[-1]
        return -ops.sum(targets * ops.power(1 - ops.exp(logs), self.gamma) * logs, axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), "gamma": self.gamma, "label_smoothing": self.label_smoothing}


def build_schedule(
    config: ScheduleConfig, learning_rate: float, *, steps_per_epoch: int, epochs: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Build the schedule of one phase; plateau gives a number, which the stage lowers between epochs."""
    if config.name == "plateau" or (config.name == "constant" and not config.warmup_epochs):
        return learning_rate
    return StageSchedule(config.model_dump(), learning_rate, steps_per_epoch, epochs)


@keras.saving.register_keras_serializable(package="dlfer")
class StageSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant, step or cosine with restarts, as a function of the step.

    Args:
        config: fields of ScheduleConfig.
        learning_rate: the rate at the end of the warm-up.
        steps_per_epoch, epochs: of the phase.
    """

    def __init__(self, config: dict, learning_rate: float, steps_per_epoch: int, epochs: int) -> None:
        self.config = dict(config)
        self.learning_rate = learning_rate
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs

    def __call__(self, step):
        """Return the rate, float32, at `step` (from 0)."""
        config = self.config
        step = ops.cast(step, "float32")
        warmup = config["warmup_epochs"] * self.steps_per_epoch
        after = ops.maximum(step - warmup, 0.0)
        if config["name"] == "cosine":
            period = max(1.0, (self.epochs * self.steps_per_epoch - warmup) / (config["restarts"] + 1))
            # The last period ends at its end; the ones before fall back to its start.
            index = ops.minimum(ops.floor(after / period), float(config["restarts"]))
            part = ops.minimum((after - index * period) / period, 1.0)
            factor = config["final"] + (1 - config["final"]) * 0.5 * (1 + ops.cos(math.pi * part))
        elif config["name"] == "step":
            epoch = ops.floor(step / self.steps_per_epoch)
            times = ops.floor((epoch - config["start_epoch"]) / config["every_epochs"]) + 1
            factor = ops.power(config["factor"], ops.maximum(times, 0.0))
        else:
            factor = ops.ones_like(step)
        if warmup:
            factor = factor * ops.minimum((step + 1) / warmup, 1.0)
        return self.learning_rate * factor

    def get_config(self) -> dict:
        return {
            "config": self.config,
            "learning_rate": self.learning_rate,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
        }
