"""Replacements for Keras layers that compute the same function but train faster under TensorFlow.

BatchNorm: Keras composes a training step from means, differences and products, each of which reads and writes the
whole feature map. TensorFlow has one forward and one backward kernel for the same arithmetic. Source: Ioffe and
Szegedy, ICML 2015.

Depthwise convolution: on a CPU, TensorFlow's filter-gradient kernel for 3x3 is several times as fast, per operation, as
that for 5x5 filters, which half of EfficientNet's blocks have. The gradient of each weight is an independent sum, so
four overlapping 3x3 gradients make up the 5x5 one. benchmarks/train_step.py measures the gain of both replacements.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import keras


@keras.saving.register_keras_serializable(package="dlfer")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' BatchNorm over the last axis of [B, H, W, C], with TensorFlow's fused kernel in training.

    Configuration, weights and function are those of `keras.layers.BatchNormalization`. The class name is the same,
    too, because Keras structures weight files by class names, and the files of both must be interchangeable.
    Inference and what the kernel does not support (other axes, a mask, statistics synchronised over devices, renorm)
    use Keras' implementation.
    """

    def call(self, inputs, training=None, mask=None):
        """Return the normalised inputs, [B, H, W, C]; in training, update the moving statistics."""
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
        # The kernel returns the unbiased variance, sum / (n - 1); Keras' moving variance uses sum / n.
        count = tf.cast(tf.size(inputs) // tf.size(mean), variance.dtype)
        variance *= (count - 1.0) / count
        self.moving_mean.assign(moving_mean * self.momentum + mean * (1.0 - self.momentum))
        self.moving_variance.assign(moving_variance * self.momentum + variance * (1.0 - self.momentum))
        return tf.cast(outputs, self.compute_dtype)


def list_batch_norms(network: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Return the BatchNorm layers of `network` and of the models nested in it."""
    found = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += list_batch_norms(layer)
        elif isinstance(layer, keras.layers.BatchNormalization):
            found.append(layer)
    return found


def set_norm_momentum(network: keras.Model, momentum: float) -> None:
    """Set the momentum of the moving statistics of every BatchNorm layer.

    Args:
        network: any network that is not yet compiled.
        momentum: weight of the previous statistics in each update, in 0..1.
    """
    for layer in list_batch_norms(network):
        layer.momentum = momentum


def count_steps_to_settle(network: keras.Model) -> int:
    """Return the steps until initial values make up 0.7 % of the slowest moving statistics; 0 without BatchNorm."""
    return max((round(5 / (1 - layer.momentum)) for layer in list_batch_norms(network)), default=0)


def compute_fused(compute: Callable, *values):
    """Return `compute(*values)`, compiled by XLA into one kernel inside a TensorFlow graph on the CPU.

    Computed operation by operation, the random warp passes over all pixels of a batch some thirty times, mostly waiting
    for memory; fused into one loop it takes a tenth of the time. In other cases `compute` is called as it is: JAX and
    networks on a GPU are compiled as a whole, and eager calls are too few to be worth compiling for.

    Args:
        compute: a function from tensors, or dicts of them, to tensors; all sizes but that of the first axis are static.
            It is compiled for each size of the first axis, in a fraction of a second, so this size should not vary.
        values: its arguments.
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
    """Keras' depthwise convolution, with the gradient of 5x5 filters computed in parts in training on a CPU.

    Configuration, weights and function are those of `keras.layers.DepthwiseConv2D`, and so is the class name, by which
    Keras structures weight files. Other filter sizes, dilation, GPUs and inference use Keras' implementation.
    """

    def call(self, inputs, training=None):
        """Return the convolution of inputs [B, H, W, C]."""
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
    """Return the depthwise convolution of images [B, H, W, C] with a kernel [5, 5, C, M]."""
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
    """Return the images with explicit zero padding: that of "SAME", or none for "VALID"."""
    import tensorflow as tf

    if padding == "VALID":
        return images
    sizes = images.shape[1:3]
    totals = [max((-(-size // stride) - 1) * stride + SIZE - size, 0) for size in sizes]
    return tf.pad(images, [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)])


def _compute_filter_gradient(images, upstream, shape, strides: list[int]):
    """Return the gradient of the filter, [5, 5, C, M], for padded images, from four overlapping 3x3 parts."""
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
    """Replace the classes of `network`'s layers by their faster versions in LAYERS; do nothing on other backends.

    Only the class of each layer is changed, in place, since cloning the network would initialise its weights a second
    time and take as long as building it again.

    Args:
        network: any network that is not yet compiled.

    Returns:
        `network` itself.
    """
    if keras.backend.backend() == "tensorflow":
        for layer in network.layers:
            if type(layer) in LAYERS:
                layer.__class__ = LAYERS[type(layer)]
                # Update what Keras recorded about the arguments of `call` when it created the layer.
                layer._call_signature = inspect.signature(layer.call)
                layer._call_has_training_arg = True
                layer._call_has_context_arg = {"training": True}
    return network
