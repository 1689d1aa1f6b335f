"""Losses, learning-rate schedules and optimisers, built from their sections of the experiment.

Keras composes Adam's update of each variable from some 25 operations, which are 13,000 of the 21,000 operations of a
training step of EfficientNet-B3; TensorFlow's kernel does the same arithmetic in one operation.
benchmarks/train_step.py measures the gain.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from dlfer.config.schema import LossConfig, OptimizerConfig, ScheduleConfig
from dlfer.model.paper_backbones import AUXILIARY_LOSS_WEIGHT

LOG_OF_NOTHING = float(np.finfo(np.float32).min) / 2
"""A finite stand-in for log(0) in float32: its exponential is 0, and gradients through it stay finite."""


def build_loss(config: LossConfig, *, auxiliary: int = 0, class_weights: np.ndarray | None = None) -> keras.losses.Loss:
    """Build the loss between one-hot (or mixed) targets [B, C] and logits [B, C].

    "binary_crossentropy" treats the C outputs as independent binary classifications, as a sigmoid head does. "focal" is
    the categorical focal loss (Lin et al. 2017) without its class weights, for which there is `balance: class_weight`.

    Args:
        config: the section `loss`.
        auxiliary: number of auxiliary heads; if it is not 0, logits are [B, 1 + auxiliary, C].
        class_weights: weights of the classes, float [C], applied to their shares of a target; None weights all by 1.
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
    """A class-weighted loss: the sum over classes k of w_k t_k L(one-hot k, logits), with weights w and targets t.

    All losses L here are linear in targets that sum to one, including label smoothing, so the sum is equal to
    m L(w t / m, logits) with m = sum over k of w_k t_k. For a one-hot target it is L times the weight of its class.
    """

    def __init__(self, base: keras.losses.Loss, class_weights: np.ndarray) -> None:
        super().__init__(name=base.name)
        self.base = base
        self.class_weights = np.asarray(class_weights, np.float32)

    def call(self, y_true, y_pred):
        """Return the loss of each row, float [B]."""
        weighted = ops.cast(y_true, "float32") * self.class_weights
        total = ops.sum(weighted, axis=-1)
        # A row of total weight 0 has the loss 0, whatever its target.
        return total * self.base.call(weighted / ops.maximum(total, 1e-12)[:, None], y_pred)


class WithAuxiliary(keras.losses.Loss):
    """A loss of logits [B, 1 + A, C]: that of the main head plus AUXILIARY_LOSS_WEIGHT times that of each auxiliary."""

    def __init__(self, base: keras.losses.Loss) -> None:
        super().__init__(name=base.name)
        self.base = base

    def call(self, y_true, y_pred):
        """Return the loss of each row, float [B]."""
        total = self.base.call(y_true, y_pred[:, 0])
        for number in range(1, y_pred.shape[1]):
            total = total + AUXILIARY_LOSS_WEIGHT * self.base.call(y_true, y_pred[:, number])
        return total


def take_own_logits(logits):
    """Return the logits of the main head, [B, C], given logits [B, C] or [B, 1 + A, C]."""
    return logits[:, 0] if len(logits.shape) == 3 else logits


def compute_hits(y_true, y_pred):
    """Return float [B], 1 where the class of the main head's largest logit is that of the largest target."""
    return ops.cast(ops.equal(ops.argmax(y_true, axis=-1), ops.argmax(take_own_logits(y_pred), axis=-1)), "float32")


@keras.saving.register_keras_serializable(package="dlfer")
class FocalFromLogits(keras.losses.Loss):
    """A categorical focal loss from logits: the sum over classes of -y (1 - p)^gamma log p.

    Keras' version first converts logits to clipped probabilities, and where 1 - p is rounded to 0, the gradient of its
    power is infinite for gamma below 1. Here (1 - p)^gamma is exp(gamma log(1 - p)), with log(1 - p) computed from the
    other classes, so that value and gradient are finite for every gamma >= 0.
    """

    def __init__(self, gamma: float = 2.0, label_smoothing: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.label_smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Return the loss of each row, float [B]."""
        logs = ops.log_softmax(y_pred, axis=-1)
        targets = ops.cast(y_true, logs.dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / targets.shape[-1]
        factor = ops.exp(self.gamma * compute_log_complements(logs)) if self.gamma else 1.0
        return -ops.sum(targets * factor * logs, axis=-1)

    def get_config(self) -> dict:
        return {**super().get_config(), "gamma": self.gamma, "label_smoothing": self.label_smoothing}


def compute_log_complements(logs):
    """Return log(1 - p), float [B, C], without cancellation, given log p, float [B, C].

    Only the largest p of a row can be so near to 1 that 1 - p is rounded to 0; there, 1 - p is the sum of the others.
    """
    is_largest = ops.equal(ops.arange(logs.shape[-1]), ops.cast(ops.argmax(logs, axis=-1), "int32")[..., None])
    of_largest = ops.logsumexp(ops.where(is_largest, LOG_OF_NOTHING, logs), axis=-1, keepdims=True)
    # The largest p is replaced by 0, since the gradient of the values that are not selected must be finite, too.
    of_others = ops.log1p(-ops.where(is_largest, 0.0, ops.exp(logs)))
    return ops.where(is_largest, of_largest, of_others)


def build_schedule(
    config: ScheduleConfig, learning_rate: float, *, steps_per_epoch: int, epochs: int
) -> float | keras.optimizers.schedules.LearningRateSchedule:
    """Build the schedule of one phase; for "plateau", return a number, which the stage lowers between epochs."""
    if config.name == "plateau" or (config.name == "constant" and not config.warmup_epochs):
        return learning_rate
    return StageSchedule(config.model_dump(), learning_rate, steps_per_epoch, epochs)


def compute_rates(
    schedule: float | keras.optimizers.schedules.LearningRateSchedule, num_steps: int
) -> tuple[float, float]:
    """Return the largest learning rate of `num_steps` steps, and that of the last step."""
    if isinstance(schedule, int | float):
        return float(schedule), float(schedule)
    rates = ops.convert_to_numpy(schedule(np.arange(max(1, num_steps))))
    return float(rates.max()), float(rates[-1])


@keras.saving.register_keras_serializable(package="dlfer")
class StageSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule with linear warm-up, followed by a constant, a step or a cosine schedule with restarts.

    The rate of "step" in epoch e (from 0) is learning_rate * factor^floor(max(0, e - start_epoch) / every_epochs). A
    warm-up scales the rates of its own steps and does not shift these epochs.

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
        """Return the learning rate, float32, of `step` (from 0)."""
        config = self.config
        epoch = ops.floor_divide(ops.cast(step, "int32"), self.steps_per_epoch)
        step = ops.cast(step, "float32")
        warmup = config["warmup_epochs"] * self.steps_per_epoch
        after = ops.maximum(step - warmup, 0.0)
        if config["name"] == "cosine":
            period = max(1.0, (self.epochs * self.steps_per_epoch - warmup) / (config["restarts"] + 1))
            # After the last step of a period the rate restarts, except at the end of the last period.
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


OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
}
_PASSED_ON = {"beta_1", "beta_2", "epsilon", "momentum", "nesterov", "rho", "weight_decay"}
"""Keys of OptimizerConfig that are passed to Keras' optimisers under the same names."""


def build_optimizer(
    config: OptimizerConfig,
    learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
    *,
    clip,
    ema,
    clip_scope="global",
) -> keras.optimizers.Optimizer:
    """Build the optimiser; weight decay excludes biases and normalisation parameters unless its scope is "all".

    Args:
        config: name and settings of the optimiser; settings that are None keep Keras' defaults.
        learning_rate: a number, which may be changed between epochs, or a schedule.
        clip: largest norm of the gradient, or None.
        ema: decay of the moving average of the weights, or None.
        clip_scope: "global", the norm of all gradients together, or "variable", that of each variable's gradient.
    """
    given = config.model_dump(include=_PASSED_ON, exclude_none=True)
    if ema is not None:
        given |= {"use_ema": True, "ema_momentum": ema}
    base = OPTIMIZERS[config.name]
    parts = (_KeepsRawWeights, base)
    if keras.backend.backend() == "tensorflow":
        parts = (_UpdatesByKernel, *parts)
    own = {}
    if config.weight_decay_kind == "l2":
        parts, own = (_AddsPenalty, *parts), {"penalty": given.pop("weight_decay")}
    limit = {"global": "global_clipnorm", "variable": "clipnorm"}[clip_scope]
    optimizer = type(base.__name__, parts, own)(learning_rate=learning_rate, **{limit: clip}, **given)
    if config.weight_decay_scope == "kernels":
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def describe_optimizer(config: OptimizerConfig) -> str:
    """Return a description like "sgd (momentum 0.9; weight decay 0.0005, decoupled, kernels only)"."""
    decay = config.weight_decay
    if decay is None and config.name == "adamw":
        decay = keras.optimizers.AdamW().weight_decay
    parts = [f"momentum {config.momentum:g}{', Nesterov' if config.nesterov else ''}"] if config.momentum else []
    if decay:
        kind = {"decoupled": "decoupled", "l2": "L2 in the gradient"}[config.weight_decay_kind]
        scope = {"kernels": "kernels only", "all": "all weights"}[config.weight_decay_scope]
        parts.append(f"weight decay {decay:g}, {kind}, {scope}")
    return config.name + (f" ({'; '.join(parts)})" if parts else "")


class _AddsPenalty:
    """A mixin that adds the gradient of an L2 penalty, `penalty` * w, like PyTorch's `weight_decay`: after clipping,
    before momentum and moments."""

    penalty: float

    def _backend_update_step(self, grads, trainable_variables, learning_rate) -> None:
        penalised = [
            gradient + keras.ops.cast(self.penalty * variable, gradient.dtype)
            if self._use_weight_decay(variable)
            else gradient
            for gradient, variable in zip(grads, trainable_variables, strict=True)
        ]
        super()._backend_update_step(penalised, trainable_variables, learning_rate)


class _KeepsRawWeights:
    """A mixin that keeps the raw weights after `fit`, which would overwrite them with their moving average.

    A stage calls `fit` once per epoch and continues from the raw weights; it applies the average itself."""

    def finalize_variable_values(self, var_list) -> None:
        """Leave the weights unchanged."""

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        """Leave the gradients unchanged: our loop over several devices has summed them already, so that the sum is
        clipped, where Keras would clip each device's gradients before summing them."""
        return grads_and_vars


class _UpdatesByKernel:
    """A mixin that updates float32 variables with TensorFlow's kernels; values common to all are computed once.

    Keras' own update is used for RMSprop, whose kernel requires a momentum variable that Keras may not have; for
    variables distributed over several devices; and for sparse gradients.
    """

    def _backend_update_step(self, grads, trainable_variables, learning_rate) -> None:
        import tensorflow as tf

        plain = not tf.distribute.has_strategy() and all(
            isinstance(gradient, tf.Tensor) and variable.dtype == "float32"
            for gradient, variable in zip(grads, trainable_variables, strict=True)
        )
        make = {keras.optimizers.Adam: self._make_adam, keras.optimizers.SGD: self._make_sgd}
        found = next((make[base] for base in make if isinstance(self, base)), None)
        if not plain or found is None:
            super()._backend_update_step(grads, trainable_variables, learning_rate)
            return
        update = found(tf.cast(learning_rate, tf.float32))
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            update(_find_handle(variable), tf.cast(gradient, tf.float32), self._get_variable_index(variable))

    def _make_adam(self, rate):
        """Return a function (handle, gradient, number of the variable) that updates a variable."""
        import tensorflow as tf

        step = tf.cast(self.iterations + 1, tf.float32)
        powers = {f"beta{n}_power": beta**step for n, beta in ((1, self.beta_1), (2, self.beta_2))}
        given = {"beta1": self.beta_1, "beta2": self.beta_2, "epsilon": self.epsilon, "lr": rate, **powers}

        def update(handle, gradient, number: int) -> None:
            m, v = (_find_handle(slots[number]) for slots in (self._momentums, self._velocities))
            tf.raw_ops.ResourceApplyAdam(var=handle, m=m, v=v, grad=gradient, **given)

        return update

    def _make_sgd(self, rate):
        """Return a function (handle, gradient, number of the variable) that updates a variable."""
        import tensorflow as tf

        def update(handle, gradient, number: int) -> None:
            tf.raw_ops.ResourceApplyGradientDescent(var=handle, alpha=rate, delta=gradient)

        def update_with_momentum(handle, gradient, number: int) -> None:
            tf.raw_ops.ResourceApplyKerasMomentum(
                var=handle,
                accum=_find_handle(self.momentums[number]),
                lr=rate,
                grad=gradient,
                momentum=self.momentum,
                use_nesterov=self.nesterov,
            )

        return update_with_momentum if self.momentum else update

    def _apply_weight_decay(self, variables) -> None:
        import tensorflow as tf

        if self.weight_decay is None or tf.distribute.has_strategy():
            super()._apply_weight_decay(variables)
            return
        # Computed once; Keras evaluates the schedule again for every variable.
        share = tf.cast(self.learning_rate, tf.float32) * self.weight_decay
        for variable in variables:
            if self._use_weight_decay(variable):
                variable.assign_sub(variable.value * tf.cast(share, variable.dtype))

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        import tensorflow as tf

        if not self.use_ema or tf.distribute.has_strategy():
            super()._update_model_variables_moving_average(trainable_variables)
            return
        # The average is initialised with the values after the first step.
        momentum = tf.where(tf.equal(self.iterations.value, 0), 0.0, self.ema_momentum)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            share = tf.cast(1.0 - momentum, variable.dtype)
            average.assign_add((variable.value - average.value) * share)


def _find_handle(variable: keras.Variable):
    """Return the resource handle of a variable for TensorFlow's kernels."""
    return variable.value.handle
