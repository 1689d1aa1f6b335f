"""Losses and learning-rate schedules, built from their sections of the experiment."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from dlfer.config.schema import LossConfig, ScheduleConfig
from dlfer.model.paper_backbones import AUXILIARY_LOSS_WEIGHT

LOG_OF_NOTHING = float(np.finfo(np.float32).min) / 2
"""A logarithm whose exponential is 0 in float32, and whose gradient stays finite."""


def build_loss(config: LossConfig, *, auxiliary: int = 0, class_weights: np.ndarray | None = None) -> keras.losses.Loss:
    """Build the loss between one-hot (or mixed) targets [B, C] and logits [B, C].

    binary_crossentropy sees the C outputs as C yes-or-no questions, as a sigmoid head answers them;
    focal is the categorical focal loss (Lin et al. 2017) without class weights: those are
    `balance: class_weight`.

    Args:
        config: its section.
        auxiliary: number of auxiliary heads; with some, logits are [B, 1 + auxiliary, C].
        class_weights: float [C], what the share of each class in a target counts; None is 1 for all.
    """
    if class_weights is not None:
        return ClassWeighted(build_loss(config, auxiliary=auxiliary), class_weights)
    if auxiliary:
        return WithAuxiliary(build_loss(config))
    if config.name == "binary_crossentropy":
        return keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=config.label_smoothing)
    if config.name == "focal":
        return FocalFromLogits(gamma=config.gamma, label_smoothing=config.label_smoothing)
    return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=config.label_smoothing)


class ClassWeighted(keras.losses.Loss):
    """A loss L in which the share t_k of class k in a target counts w_k: sum over k of w_k t_k L(one-hot k, logits).

    All losses here are linear in targets that sum to one, label smoothing included, so that this is the total
    m = sum over k of w_k t_k, times the loss of the target w_k t_k / m. For a one-hot target it is the row's loss
    times the weight of its class.
    """

    def __init__(self, base: keras.losses.Loss, class_weights: np.ndarray) -> None:
        super().__init__(name=base.name)
        self.base = base
        self.class_weights = np.asarray(class_weights, np.float32)

    def call(self, y_true, y_pred):
        """Return float [B], the loss of each row."""
        weighted = ops.cast(y_true, "float32") * self.class_weights
        total = ops.sum(weighted, axis=-1)
        # Where nothing counts, the target does not matter.
        return total * self.base.call(weighted / ops.maximum(total, 1e-12)[:, None], y_pred)


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

    Keras' own version turns logits into clipped probabilities first, and the power of a 1 - p that is rounded to 0
    has an infinite gradient for gamma below 1. This one computes (1 - p)^gamma as exp(gamma log(1 - p)) with
    log(1 - p) from the other classes, so that value and gradient are finite for every gamma from 0 on.
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
        factor = ops.exp(self.gamma * compute_log_complements(logs)) if self.gamma else 1.0
        return -ops.sum(targets * factor * logs, axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), "gamma": self.gamma, "label_smoothing": self.label_smoothing}


def compute_log_complements(logs):
    """Return log(1 - p), float [B, C], of probabilities p given as their logarithms, float [B, C], without cancellation.

    Only the largest p of a row can be near 1, where 1 - p would be rounded to 0: there, it is the sum of the others.
    """
    is_largest = ops.equal(ops.arange(logs.shape[-1]), ops.cast(ops.argmax(logs, axis=-1), "int32")[..., None])
    of_largest = ops.logsumexp(ops.where(is_largest, LOG_OF_NOTHING, logs), axis=-1, keepdims=True)
    # p = 0 in place of the largest: the gradient of what is not selected must be finite, too.
    of_others = ops.log1p(-ops.where(is_largest, 0.0, ops.exp(logs)))
    return ops.where(is_largest, of_largest, of_others)


def build_schedule(
    config: ScheduleConfig, learning_rate: float, *, steps_per_epoch: int, epochs: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Build the schedule of one phase; plateau gives a number, which the stage lowers between epochs."""
    if config.name == "plateau" or (config.name == "constant" and not config.warmup_epochs):
        return learning_rate
    return StageSchedule(config.model_dump(), learning_rate, steps_per_epoch, epochs)


def compute_rates(
    schedule: float | keras.optimizers.schedules.LearningRateSchedule, num_steps: int
) -> tuple[float, float]:
    """Return the largest rate of `num_steps` steps, and the rate of the last one."""
    if isinstance(schedule, int | float):
        return float(schedule), float(schedule)
    rates = ops.convert_to_numpy(schedule(np.arange(max(1, num_steps))))
    return float(rates.max()), float(rates[-1])


@keras.saving.register_keras_serializable(package="dlfer")
class StageSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant, step or cosine with restarts, as a function of the step.

    The rate of "step" in epoch e (from 0) is learning_rate * factor^floor(max(0, e - start_epoch) / every_epochs); a
    warm-up multiplies the rates of its own steps and moves no epoch.

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
        epoch = ops.floor_divide(ops.cast(step, "int32"), self.steps_per_epoch)
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
            times = ops.floor_divide(ops.maximum(epoch - config["start_epoch"], 0), config["every_epochs"])
            factor = ops.power(config["factor"], ops.cast(times, "float32"))
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
