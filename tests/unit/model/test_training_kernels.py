"""Depthwise convolution with the filter's gradient in parts against Keras' own layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from dlfer.model.training_kernels import DepthwiseConv2D, use_training_kernels

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the kernel is TensorFlow's")

CASES = [
    # height, width, stride, padding, multiplier
    (9, 9, 1, "same", 1),
    (9, 8, 2, "same", 1),
    (11, 7, 2, "valid", 2),
    (6, 6, 1, "valid", 1),
    (2, 3, 1, "same", 1),
    (3, 2, 2, "same", 1),
]


def differentiate(layer: keras.layers.Layer, images: np.ndarray, **given) -> list[np.ndarray]:
    """Return the output, and the gradients of a loss with respect to the images and the layer's weights."""
    import tensorflow as tf

    images = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = layer(images, **given)
        loss = tf.reduce_sum(outputs**2 * tf.range(outputs.shape[-1], dtype=tf.float32))
    return [outputs, *tape.gradient(loss, [images, *(variable.value for variable in layer.trainable_variables)])]


@pytest.mark.parametrize("options", [{"use_bias": False}, {"activation": "relu"}])
@pytest.mark.parametrize(("height", "width", "stride", "padding", "multiplier"), CASES)
def test_output_and_gradients_are_those_of_keras(height, width, stride, padding, multiplier, options):
    images = np.random.default_rng(0).normal(size=(4, height, width, 6)).astype("float32")
    given = {"strides": stride, "padding": padding, "depth_multiplier": multiplier, **options}
    ours, keras_own = DepthwiseConv2D(5, **given), keras.layers.DepthwiseConv2D(5, **given)
    for layer in (ours, keras_own):
        layer.build(images.shape)
    ours.set_weights(keras_own.get_weights())
    found, expected = differentiate(ours, images, training=True), differentiate(keras_own, images)
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-4)


def build_network(kernel_size: int = 5, **given) -> keras.Model:
    keras.utils.set_random_seed(1)
    images = keras.Input((12, 12, 3))
    x = keras.layers.DepthwiseConv2D(kernel_size, name="depthwise", **given)(images)
    x = keras.layers.BatchNormalization(name="norm")(x)
    return keras.Model(images, keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x)))


def list_filter_gradients(network: keras.Model, *, training: bool = True) -> list[tuple[int, ...]]:
    """Return the sizes of the filters, or parts of one, whose gradients the graph of a step computes."""
    import tensorflow as tf

    @tf.function
    def step(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(network(images, training=training))
        return tape.gradient(loss, network.get_layer("depthwise").kernel.value)

    graph = step.get_concrete_function(tf.TensorSpec((2, 12, 12, 3), tf.float32)).graph
    found = [op for op in graph.get_operations() if op.type == "DepthwiseConv2dNativeBackpropFilter"]
    return [tuple(op.outputs[0].shape[:2]) for op in found]


def test_in_training_the_gradient_is_computed_in_parts():
    assert list_filter_gradients(build_network()) == [(5, 5)]
    assert list_filter_gradients(use_training_kernels(build_network())) == [(3, 3)] * 4


@pytest.mark.parametrize("given", [{"kernel_size": 3}, {"dilation_rate": 2}])
def test_other_filters_are_left_to_keras(given):
    whole = list_filter_gradients(build_network(**given))
    assert list_filter_gradients(use_training_kernels(build_network(**given))) == whole


def test_inference_is_left_to_keras():
    assert list_filter_gradients(use_training_kernels(build_network()), training=False) == [(5, 5)]


def test_several_steps_give_the_weights_of_keras_and_files_are_the_same(tmp_path):
    ours, keras_own = use_training_kernels(build_network()), build_network()
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(8, 12, 12, 3)).astype("float32"), rng.normal(size=(8, 3))) for _ in range(5)]
    for network in (ours, keras_own):
        network.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
        for images, targets in batches:
            network.train_on_batch(images, targets)
    for variable, other in zip(ours.variables, keras_own.variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), other.numpy(), atol=1e-5, err_msg=variable.path)
    keras_own.save_weights(tmp_path / "keras.weights.h5")
    anew = use_training_kernels(build_network())
    anew.load_weights(tmp_path / "keras.weights.h5")
    for variable, other in zip(anew.variables, keras_own.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), other.numpy())
