"""BatchNorm that trains by TensorFlow's fused kernel.

Keras composes a training step of BatchNorm from means, differences and products, each of which reads and
writes the whole feature map. TensorFlow has one kernel forward and one backward for the same arithmetic;
benchmarks/train_step.py measures what it brings. Source: Ioffe and Szegedy, ICML 2015.
"""

from __future__ import annotations

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
