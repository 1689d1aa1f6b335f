"""Keras' layers in a network exchanged for those of ours that compute the same, faster in training.

BatchNorm: Keras composes a training step from means, differences and products, each of which reads and writes the
whole feature map. TensorFlow has one kernel forward and one backward for the same arithmetic. Source: Ioffe and
Szegedy, ICML 2015.

Depthwise convolution: it trains by the fast one of TensorFlow's kernels for the gradient of its filter. On a CPU the kernel for filters of 3x3 is several times as fast, by arithmetic, as that for 5x5, which EfficientNet has in
half of its blocks. The gradient of each weight is a sum by itself, so that four overlapping parts of 3x3 make up that of
5x5. benchmarks/train_step.py measures what either brings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import keras


@keras.saving.register_keras_serializable(package="dlfer")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' BatchNorm over the last axis of [B, H, W, C], with the fused kernel where it trains.

    Configuration, weights and function are those of `keras.layers.BatchNormalization`, and so is the name:
    Keras lays out its weight files by names of classes, and the files of both are to be the same. What the
    kernel does not do (other axes, a mask, statistics over several devices, renorm) and all inference is left
    to Keras.
    """

    def call(self, inputs, training=None, mask=None):
        """Return the normalised [B, H, W, C], and move the statistics where it trains."""
        plain = mask is None and not self.renorm and not self.synchronized
        if not (training and self.trainable and plain and len(inputs.shape) == 4 and self.axis in (-1, 3)):
            return super().call(inputs, training=training, mask=mask)
        return self._train(inputs)

    def _train(self, inputs):
        import tensorflow as tf

        inputs = tf.cast(inputs, tf.float32)
        moving_mean = tf.convert_to_tensor(self.moving_mean)
        moving_variance = tf.convert_to_tensor(self.moving_variance)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs,
            tf.convert_to_tensor(self.gamma) if self.scale else tf.ones_like(moving_mean),
            tf.convert_to_tensor(self.beta) if self.center else tf.zeros_like(moving_mean),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the unbiased variance, sum / (n - 1); Keras' statistics have sum / n.
        count = tf.cast(tf.size(inputs) // tf.size(mean), variance.dtype)
        variance *= (count - 1.0) / count
        self.moving_mean.assign(moving_mean * self.momentum + mean * (1.0 - self.momentum))
        self.moving_variance.assign(moving_variance * self.momentum + variance * (1.0 - self.momentum))
        return tf.cast(outputs, self.compute_dtype)


def list_batch_norms(network: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Return every BatchNorm of `network`, those of networks within it, too."""
    found = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += list_batch_norms(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            found.append(layer)
    return found


def set_norm_momentum(network: keras.Model, momentum: float) -> None:
    """Set the momentum of the moving statistics of every BatchNorm.

    Args:
        network: of any layers, before it is compiled.
        momentum: the weight of what was, in 0..1.
    """
    for layer in list_batch_norms(network):
        layer.momentum = momentum


def count_steps_to_settle(network: keras.Model) -> int:
    """Return after how many steps the slowest statistics have forgotten their first values but for 0.7 %; 0: none."""
    return max((round(5 / (1 - layer.momentum)) for layer in list_batch_norms(network)), default=0)


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


SIZE, PART = 5, 3


@keras.saving.register_keras_serializable(package="dlfer")
class DepthwiseConv2D(keras.layers.DepthwiseConv2D):
    """Keras' depthwise convolution, whose filter of 5x5 gets its gradient in parts where TensorFlow trains on a CPU.

    Configuration, weights and function are those of `keras.layers.DepthwiseConv2D`, and so is the name, by which Keras
    lays out its weight files. Other filters, dilated ones, GPUs and all inference are left to Keras.
    """

    def call(self, inputs, training=None):
        """Return the convolution of [B, H, W, C]."""
        import tensorflow as tf

        plain = self.kernel_size == (SIZE, SIZE) and self.dilation_rate == (1, 1) and len(set(self.strides)) == 1
        known = None not in inputs.shape[1:] and self.data_format == "channels_last"
        if not (training and plain and known) or tf.config.list_logical_devices("GPU"):
            return super().call(inputs)
        kernel = tf.convert_to_tensor(self.kernel)
        outputs = _convolve(inputs, kernel, stride=self.strides[0], padding=self.padding.upper())
        if self.use_bias:
            outputs = outputs + tf.reshape(tf.convert_to_tensor(self.bias), (1, 1, 1, -1))
        return outputs if self.activation is None else self.activation(outputs)


def _convolve(images, kernel, *, stride: int, padding: str):
    """Return the depthwise convolution of [B, H, W, C] by [5, 5, C, M]."""
    import tensorflow as tf

    strides = [1, stride, stride, 1]

    @tf.custom_gradient
    def convolve(images, kernel):
        def compute_gradients(upstream):
            given = tf.raw_ops.DepthwiseConv2dNativeBackpropInput(
                input_sizes=tf.shape(images), filter=kernel, out_backprop=upstream, strides=strides, padding=padding
            )
            return given, _compute_filter_gradient(_pad(images, stride, padding), upstream, kernel.shape, strides)

        return tf.nn.depthwise_conv2d(images, kernel, strides, padding), compute_gradients

    return convolve(images, kernel)


def _pad(images, stride: int, padding: str):
    """Return the images with the zeros around that "same" means."""
    import tensorflow as tf

    if padding == "VALID":
        return images
    sizes = images.shape[1:3]
    totals = [max((-(-size // stride) - 1) * stride + SIZE - size, 0) for size in sizes]
    return tf.pad(images, [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)])


def _compute_filter_gradient(images, upstream, shape, strides: list[int]):
    """Return [5, 5, C, M], the gradient of the filter over padded images, from four overlapping parts of 3x3."""
    import tensorflow as tf

    rows, columns = ((size - 1) * strides[1] + PART for size in upstream.shape[1:3])
    first = SIZE - PART

    def compute_part(top: int, left: int):
        return tf.raw_ops.DepthwiseConv2dNativeBackpropFilter(
            input=images[:, top : top + rows, left : left + columns],
            filter_sizes=[PART, PART, *shape[2:]],
            out_backprop=upstream,
            strides=strides,
            padding="VALID",
        )

    lines = [
        tf.concat([compute_part(top, 0), compute_part(top, first)[:, PART - first :]], axis=1) for top in (0, first)
    ]
    return tf.concat([lines[0], lines[1][PART - first :]], axis=0)


LAYERS = {keras.layers.BatchNormalization: BatchNormalization, keras.layers.DepthwiseConv2D: DepthwiseConv2D}


def use_training_kernels(network: keras.Model) -> keras.Model:
    """Let the layers of `network` that LAYERS names train by TensorFlow's faster kernels; on other backends change nothing.

    The layers stay as they are, with their variables and their place in the graph: only their class changes,
    since a clone of the network would draw its weights a second time, and cost a second building.

    Args:
        network: of any layers, before it is compiled.

    Returns:
        `network` itself.
    """
    if keras.backend.backend() == "tensorflow":
        for layer in network.layers:
            if type(layer) in LAYERS:
                layer.__class__ = LAYERS[type(layer)]
                # What Keras has noted of the arguments of `call` when it made the layer.
                layer._call_signature = inspect.signature(layer.call)
                layer._call_has_training_arg = True
                layer._call_has_context_arg = {"training": True}
    return network
