"""Keras' optimisers, and how they update their variables: by one kernel for each where TensorFlow has one.

Keras composes an update of Adam from some 25 operations for every variable, which makes 13,000 of the 21,000
operations of a training step of EfficientNet-B3; TensorFlow's own kernels do the same arithmetic in one.
benchmarks/train_step.py measures what that brings.
"""

from __future__ import annotations

import keras

from dlfer.config.schema import OptimizerConfig

OPTIMIZERS = {
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
}
_PASSED_ON = {"beta_1", "beta_2", "epsilon", "momentum", "nesterov", "rho", "weight_decay"}
"""The keys of OptimizerConfig that Keras' optimisers take by the same name."""


def build_optimizer(
    config: OptimizerConfig, learning_rate: float | keras.optimizers.schedules.LearningRateSchedule, *, clip, ema
) -> keras.optimizers.Optimizer:
    """Build the optimiser; weight decay leaves out biases and normalisation unless its scope is "all".

    Args:
        config: name and the keys that it takes; those left out keep Keras' defaults.
        learning_rate: a number (then it may be changed between epochs) or a schedule.
        clip: largest global norm of the gradient, or None.
        ema: decay of the moving average of the weights, or None.
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
    optimizer = type(base.__name__, parts, own)(learning_rate=learning_rate, global_clipnorm=clip, **given)
    if config.weight_decay_scope == "kernels":
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def describe_optimizer(config: OptimizerConfig) -> str:
    """Return name, momentum and weight decay: "sgd (momentum 0.9; weight decay 0.0005, decoupled, kernels only)"."""
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
    """Adds the gradient of an L2 penalty, `penalty` * w, to the gradient of the loss, as PyTorch's `weight_decay` does:
    after clipping, before momentum and moments."""

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
    """`fit` overwrites the weights by their moving average whenever it returns; a stage calls it once an
    epoch and needs the raw weights to go on, so it swaps the average in itself."""

    def finalize_variable_values(self, var_list) -> None:
        """Leave the weights as they are."""

    def _all_reduce_sum_gradients(self, grads_and_vars: list) -> list:
        """Leave the gradients as they are: TensorFlow's loop over several devices sums them before they are
        clipped, where Keras would clip each device's own."""
        return grads_and_vars


class _UpdatesByKernel:
    """Updates float32 variables by TensorFlow's kernels, with what does not depend on a variable computed once.

    Left to Keras: RMSprop, whose kernel wants a momentum where there is none; variables that several devices
    share; gradients that are not dense.
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
        """Return (handle, gradient, number of the variable) -> None."""
        import tensorflow as tf

        step = tf.cast(self.iterations + 1, tf.float32)
        powers = {f"beta{n}_power": beta**step for n, beta in ((1, self.beta_1), (2, self.beta_2))}
        given = {"beta1": self.beta_1, "beta2": self.beta_2, "epsilon": self.epsilon, "lr": rate, **powers}

        def update(handle, gradient, number: int) -> None:
            m, v = (_find_handle(slots[number]) for slots in (self._momentums, self._velocities))
            tf.raw_ops.ResourceApplyAdam(var=handle, m=m, v=v, grad=gradient, **given)

        return update

    def _make_sgd(self, rate):
        """Return (handle, gradient, number of the variable) -> None."""
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
        # Keras asks the schedule for the rate again for every variable.
        share = tf.cast(self.learning_rate, tf.float32) * self.weight_decay
        for variable in variables:
            if self._use_weight_decay(variable):
                variable.assign_sub(variable.value * tf.cast(share, variable.dtype))

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        import tensorflow as tf

        if not self.use_ema or tf.distribute.has_strategy():
            super()._update_model_variables_moving_average(trainable_variables)
            return
        # The average begins with the values after the first step.
        momentum = tf.where(tf.equal(self.iterations.value, 0), 0.0, self.ema_momentum)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            share = tf.cast(1.0 - momentum, variable.dtype)
            average.assign_add((variable.value - average.value) * share)


def _find_handle(variable: keras.Variable):
    """Return what TensorFlow's kernels know a variable by."""
    return variable.value.handle
