"""Gradients of a Keras function with respect to what it is given, on the backends that can be asked for them here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from dlfer.errors import EnvironmentProblem

Function = Callable[[list[Any]], Any]
Gradient = Callable[[list[Any], Any], list[Any]]


def build_gradient(function: Function) -> Callable[[Sequence[np.ndarray], np.ndarray], list[np.ndarray]]:
    """Return what computes the gradient of a weighted sum of a function's outputs with respect to its arguments.

    Args:
        function: from a list of tensors to one tensor, by Keras layers and `keras.ops` alone.

    Returns:
        (arguments, weights) -> float32 arrays of the arguments' shapes; the weights have the output's shape.

    Raises:
        EnvironmentProblem: the backend is neither tensorflow nor jax.
    """
    backend = keras.backend.backend()
    if backend not in _BUILDERS:
        raise EnvironmentProblem(
            f"Grad-CAM: the backend is {backend}, expected one of {', '.join(_BUILDERS)}, whose gradients are known "
            "here. Say KERAS_BACKEND=tensorflow (or jax), or --method occlusion, which needs no gradients."
        )
    gradient = _BUILDERS[backend](function)

    def compute(values: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
        tensors = [keras.ops.convert_to_tensor(value, "float32") for value in values]
        found = gradient(tensors, keras.ops.convert_to_tensor(weights, "float32"))
        return [keras.ops.convert_to_numpy(one) for one in found]

    return compute


def _build_tensorflow(function: Function) -> Gradient:
    import tensorflow as tf

    # As a graph, in which the gradients of the weights, that nobody asks for, are left out. Eagerly they are computed,
    # too, and in TensorFlow 2.21 on a CPU that of a strided convolution ends the process (conv2d_backprop_filter).
    @tf.function(autograph=False)
    def gradient(tensors, weights):
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(function(tensors) * weights)
        return tape.gradient(total, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)

    return gradient


def _build_jax(function: Function) -> Gradient:
    import jax

    return jax.grad(lambda tensors, weights: keras.ops.sum(function(tensors) * weights))


_BUILDERS: dict[str, Callable[[Function], Gradient]] = {"tensorflow": _build_tensorflow, "jax": _build_jax}
