"""BatchNorm by the fused kernel against Keras' own layer."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from dlfer.config.sections import ModelConfig
from dlfer.model.backbones import build_backbone
from dlfer.model.stage_network import build_feature_extractor
from dlfer.model.training_kernels import BatchNormalization, use_training_kernels

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the kernel is TensorFlow's")


def build_network(*, scale: bool = True, center: bool = True) -> keras.Model:
    keras.utils.set_random_seed(1)
    images = keras.Input((9, 9, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, name="conv1")(images)
    x = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3, scale=scale, center=center, name="norm1")(x)
    x = keras.layers.ReLU(name="relu")(x)
    x = keras.layers.Conv2D(4, 3, name="conv2")(x)
    x = keras.layers.BatchNormalization(epsilon=1e-5, name="norm2")(x)
    x = keras.layers.Dense(3, name="head")(keras.layers.GlobalAveragePooling2D()(x))
    return keras.Model(images, x)


def train(network: keras.Model, *, steps: int = 5) -> list[float]:
    network.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        images = rng.normal(2.0, 3.0, (16, 9, 9, 3)).astype("float32")
        losses.append(float(network.train_on_batch(images, rng.normal(size=(16, 3)).astype("float32"))))
    return losses


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_gives_the_losses_weights_and_statistics_of_keras(scale, center):
    ours, keras_own = (
        use_training_kernels(build_network(scale=scale, center=center)),
        build_network(scale=scale, center=center),
    )
    np.testing.assert_allclose(train(ours), train(keras_own), rtol=1e-5)
    for variable, other in zip(ours.variables, keras_own.variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), other.numpy(), atol=1e-5, err_msg=variable.path)


def test_a_frozen_norm_keeps_its_statistics_and_gives_what_keras_gives():
    ours, keras_own = use_training_kernels(build_network()), build_network()
    for network in (ours, keras_own):
        network.get_layer("norm1").trainable = False
    before = ours.get_layer("norm1").get_weights()
    np.testing.assert_allclose(train(ours), train(keras_own), rtol=1e-5)
    for value, other in zip(before, ours.get_layer("norm1").get_weights(), strict=True):
        np.testing.assert_array_equal(value, other)


def test_one_value_a_channel_has_no_variance():
    layer, keras_own = BatchNormalization(momentum=0.5), keras.layers.BatchNormalization(momentum=0.5)
    images = np.full((1, 1, 1, 2), 3.0, "float32")
    np.testing.assert_allclose(layer(images, training=True), keras_own(images, training=True), atol=1e-5)
    for value, other in zip(layer.get_weights(), keras_own.get_weights(), strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)


def test_what_the_kernel_does_not_do_is_left_to_keras():
    rng = np.random.default_rng(0)
    vectors, images = rng.normal(size=(8, 5)).astype("float32"), rng.normal(size=(4, 3, 5, 2)).astype("float32")
    for values, options in ((vectors, {}), (images, {"axis": 1}), (images, {"renorm": True})):
        ours, keras_own = BatchNormalization(**options), keras.layers.BatchNormalization(**options)
        np.testing.assert_allclose(ours(values, training=True), keras_own(values, training=True), atol=1e-5)
        for value, other in zip(ours.get_weights(), keras_own.get_weights(), strict=True):
            np.testing.assert_allclose(value, other, atol=1e-5)


def test_weight_files_are_those_of_keras_both_ways(tmp_path):
    ours, keras_own = use_training_kernels(build_network()), build_network()
    train(ours, steps=1)
    ours.save_weights(tmp_path / "ours.weights.h5")
    keras_own.load_weights(tmp_path / "ours.weights.h5")
    for variable, other in zip(ours.variables, keras_own.variables, strict=True):
        np.testing.assert_array_equal(variable.numpy(), other.numpy())
    train(keras_own, steps=1)
    keras_own.save_weights(tmp_path / "keras.weights.h5")
    ours.load_weights(tmp_path / "keras.weights.h5")
    np.testing.assert_array_equal(
        ours.get_layer("norm2").moving_variance.numpy(), keras_own.get_layer("norm2").moving_variance.numpy()
    )


def test_a_network_made_from_its_configuration_keeps_the_kernel():
    anew = keras.Model.from_config(use_training_kernels(build_network()).get_config())
    assert type(anew.get_layer("norm1")) is BatchNormalization


def test_backbones_train_by_the_kernel():
    norms = [
        layer for layer in build_backbone("resnet_nano").layers if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert norms
    assert all(type(layer) is BatchNormalization for layer in norms)


def test_the_momentum_of_the_experiment_reaches_every_norm_of_every_branch():
    config = ModelConfig(family="hybrid", branches=("resnet_nano", "efficientnet_nano"), norm_momentum=0.75)
    backbone, _ = build_feature_extractor(config)
    branches = [layer for layer in backbone.layers if isinstance(layer, keras.Model)]
    norms = [layer for branch in branches for layer in branch.layers if "BatchNorm" in type(layer).__name__]
    assert len(branches) == 2
    assert norms
    assert {layer.momentum for layer in norms} == {0.75}
    own, _ = build_feature_extractor(ModelConfig(backbone="resnet_nano"))
    assert {layer.momentum for layer in own.layers if "BatchNorm" in type(layer).__name__} == {0.9}
