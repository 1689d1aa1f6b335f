"""VGG19 with BatchNorm against the published count."""

import keras
import numpy as np
import pytest

from dlfer.model.paper_backbones import build_vgg_bn


def test_parameters_are_those_of_the_published_network_with_batch_norm():
    """143,678,248 with 1000 classes, without BatchNorm's moving statistics, dense layers of 4096 included."""
    network = build_vgg_bn()
    weights = sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)
    assert weights + (7 * 7 * 512 + 1) * 4096 + 4097 * 4096 + 4097 * 1000 == 143_678_248
    assert network.compute_output_shape((1, 224, 224, 3)) == (1, 7, 7, 512)
    assert network.compute_output_shape((1, 48, 48, 3)) == (1, 1, 1, 512)


def test_each_convolution_is_followed_by_batch_norm_and_relu():
    network = build_vgg_bn(((1, 4), (2, 8)))
    kinds = [type(layer).__name__ for layer in network.layers[1:]]
    triple = ["Conv2D", "BatchNormalization", "ReLU"]
    assert kinds == [*triple, "MaxPooling2D", *triple, *triple, "MaxPooling2D"]


def test_convolutions_start_he_normal_by_fan_out_and_without_bias():
    layer = build_vgg_bn(((2, 64),)).get_layer("block1_conv2")
    assert isinstance(layer, keras.layers.Conv2D)
    assert np.asarray(layer.kernel).std() == pytest.approx(np.sqrt(2 / (9 * 64)), rel=0.02)
    assert not np.asarray(layer.bias).any()
