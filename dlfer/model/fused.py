"""Chains of operations on every pixel as one loop, where they would else be a loop each."""

from __future__ import annotations

from collections.abc import Callable

import keras


def compute_fused(compute: Callable, *values):
    """Return `compute(*values)`; in a graph that TensorFlow runs on the CPU, XLA makes one kernel of it.

    Operation by operation the random warp goes some thirty times over all pixels of a batch, most of the time waiting
    for memory; in one loop it costs a tenth. Elsewhere nothing is changed: JAX and networks on a GPU are compiled as
    a whole, and eager calls are too few to be worth a compilation.

    Args:
        compute: of tensors, or dicts of them, to tensors; shapes other than the first axis' are known. Each size of
            that axis is compiled for, which takes a part of a second, so that it should not vary.
        values: what it is called with.
    """
    if keras.backend.backend() != "tensorflow":
        return compute(*values)
    import tensorflow as tf

    if tf.executing_eagerly() or tf.config.list_logical_devices("GPU"):
        return compute(*values)
    return tf.function(compute, autograph=False, jit_compile=True)(*values)
