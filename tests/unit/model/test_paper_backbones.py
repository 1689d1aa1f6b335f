"""GoogLeNet against table 1 and section 5 of the paper."""

import keras
import numpy as np
import pytest

from dlfer.model.paper_backbones import (
    BLOCKS,
    AuxiliaryPooling,
    build_auxiliary_head,
    build_basic_resnet,
    build_googlenet,
    build_vgg_bn,
)

# Rows of table 1 at 224 pixels: side, channels.
TABLE = {
    "conv1": (112, 64),
    "pool1": (56, 64),
    "conv2": (56, 192),
    "pool2": (28, 192),
    "inception_3a": (28, 256),
    "inception_3b": (28, 480),
    "pool3": (14, 480),
    "inception_4a": (14, 512),
    "inception_4b": (14, 512),
    "inception_4c": (14, 512),
    "inception_4d": (14, 528),
    "inception_4e": (14, 832),
    "pool4": (7, 832),
    "inception_5a": (7, 832),
    "inception_5b": (7, 1024),
}


@pytest.fixture(scope="module")
def network():
    return build_googlenet()


def test_blocks_have_the_shapes_of_the_table(network):
    ends = keras.Model(network.input, [network.get_layer(name).output for name in TABLE])
    shapes = ends.compute_output_shape((1, 224, 224, 3))
    assert [(shape[1], shape[2], shape[3]) for shape in shapes] == [(s, s, c) for s, c in TABLE.values()]
    assert network.compute_output_shape((1, 48, 48, 3)) == (1, 2, 2, 1024)


def test_parameters_with_a_thousand_classes_are_the_published_ones(network):
    without_heads = network.count_params() + 1025 * 1000
    assert without_heads == 6_998_552
    heads = [build_auxiliary_head(1000, name=f"auxiliary_{block}") for block in ("4a", "4d")]
    for head, channels in zip(heads, (512, 528), strict=True):
        head.build((None, 14, 14, channels))
    assert without_heads + sum(head.count_params() for head in heads) == 13_378_280


def test_a_block_joins_four_branches_in_the_order_of_the_table(network):
    branches = [f"inception_4d_{branch}" for branch in ("1x1", "3x3", "5x5", "pool_projection")]
    ends = keras.Model(
        network.input, [network.get_layer(name).output for name in (*branches, "inception_4d_pool", "inception_4d")]
    )
    *parts, pooled, whole = (np.asarray(value) for value in ends(draw(64)))
    assert [part.shape[-1] for part in parts] == [BLOCKS["4d"][i] for i in (0, 2, 4, 5)]
    assert np.array_equal(np.concatenate(parts, axis=-1), whole)
    assert (whole >= 0).all()
    # The reductions, and the projection behind the pooling, are 1x1 convolutions with a ReLU.
    layer = network.get_layer("inception_4d_pool_projection")
    expected = np.maximum(pooled @ np.asarray(layer.kernel)[0, 0] + np.asarray(layer.bias), 0)
    assert np.allclose(parts[-1], expected, atol=1e-5)
    assert network.get_layer("inception_4d_3x3_reduce").filters == BLOCKS["4d"][1]
    assert network.get_layer("inception_4d_5x5_reduce").filters == BLOCKS["4d"][3]
    assert network.get_layer("inception_4d_5x5").kernel_size == (5, 5)


def test_signals_keep_their_size_through_the_untrained_network(network):
    """Without BatchNorm the initialisation alone keeps gradients alive."""
    features = np.asarray(network(draw(64)))
    assert 0.05 < features.std() < 20


def test_pooling_is_the_paper_s_at_its_size():
    maps = np.random.default_rng(0).normal(size=(2, 14, 14, 3)).astype(np.float32)
    expected = np.asarray(keras.layers.AveragePooling2D(5, strides=3)(maps))
    assert np.allclose(np.asarray(AuxiliaryPooling()(maps)), expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 13, 15, 19, 28])
def test_pooling_averages_windows_at_any_size(size):
    rng = np.random.default_rng(size)
    maps = rng.normal(size=(1, size, size, 1)).astype(np.float32)
    width = int(np.ceil(5 * size / 14))
    starts = [round(k * (size - width) / 3) for k in range(4)]
    expected = [[maps[0, r : r + width, c : c + width].mean() for c in starts] for r in starts]
    assert np.allclose(np.asarray(AuxiliaryPooling()(maps))[0, ..., 0], expected, atol=1e-6)
    # The first and the last row of the map count.
    assert (starts[0], starts[-1] + width) == (0, size)


def test_pooling_works_where_the_size_is_not_known_before():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, AuxiliaryPooling()(inputs))
    assert model.output.shape == (None, 4, 4, 3)
    maps = np.random.default_rng(0).normal(size=(2, 6, 9, 3)).astype(np.float32)
    assert np.allclose(model.predict(maps, verbose=0), np.asarray(AuxiliaryPooling()(maps)), atol=1e-6)


def test_heads_have_the_same_weights_at_every_size():
    counts = []
    for size in (2, 3, 14):
        head = build_auxiliary_head(7)
        logits = head(np.ones((2, size, size, 8), np.float32))
        assert logits.shape == (2, 7)
        counts.append(head.count_params())
    assert len(set(counts)) == 1


def test_head_gives_logits_in_float32():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        head = build_auxiliary_head(3)
        logits = head(np.random.default_rng(0).normal(size=(4, 3, 3, 8)))
    finally:
        keras.config.set_dtype_policy(before)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert (np.asarray(logits) < 0).any()


def draw(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


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


@pytest.mark.parametrize(
    ("repeats", "with_seven", "with_thousand"),
    [((2, 2, 2, 2), 11_180_103, 11_689_512), ((3, 4, 6, 3), 21_288_263, 21_797_672)],
)
def test_parameters_are_the_published_ones(repeats, with_seven, with_thousand):
    """They are counted without BatchNorm's moving statistics."""
    network = build_basic_resnet(repeats, stem="imagenet")
    weights = sum(int(np.prod(weight.shape)) for weight in network.trainable_weights)
    assert weights + 513 * 7 == with_seven
    assert weights + 513 * 1000 == with_thousand
    convolutions = [
        layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size != (1, 1)
    ]
    # With the dense layer: 18 and 34.
    assert len(convolutions) + 1 == 2 * sum(repeats) + 2


def test_stages_have_the_shapes_of_the_paper():
    network = build_basic_resnet((2, 2, 2, 2), stem="imagenet")
    names = ["conv1_relu", "conv2_block2_out", "conv3_block2_out", "conv4_block2_out", "conv5_block2_out"]
    stages = keras.Model(network.input, [network.get_layer(name).output for name in names])
    shapes = stages.compute_output_shape((1, 224, 224, 3))
    assert [tuple(shape[1:]) for shape in shapes] == [
        (112, 112, 64),
        (56, 56, 64),
        (28, 28, 128),
        (14, 14, 256),
        (7, 7, 512),
    ]


def test_small_stem_keeps_the_resolution_of_the_image():
    network = build_basic_resnet((1, 1, 1, 1), widths=(4, 8, 12, 16), stem="small")
    stem = network.get_layer("conv1_conv")
    assert (stem.kernel_size, stem.strides) == ((3, 3), (1, 1))
    assert not any(isinstance(layer, keras.layers.MaxPooling2D) for layer in network.layers)
    first = keras.Model(network.input, network.get_layer("conv2_block1_out").output)
    assert first.compute_output_shape((1, 40, 40, 3)) == (1, 40, 40, 4)
    assert network.compute_output_shape((1, 40, 40, 3)) == (1, 5, 5, 16)


def test_shortcuts_project_where_width_or_resolution_changes_and_nowhere_else():
    network = build_basic_resnet((2, 2, 2, 2), widths=(4, 8, 12, 12), stem="imagenet")
    projections = {
        layer.name: layer.strides
        for layer in network.layers
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (1, 1)
    }
    # The last stage keeps its width and halves the resolution.
    assert projections == {f"conv{stage}_block1_0_conv": (2, 2) for stage in (3, 4, 5)}


@pytest.mark.parametrize(
    ("block", "before"), [("conv2_block2", "conv2_block1_out"), ("conv3_block1", "conv2_block2_out")]
)
@pytest.mark.parametrize("side", [8, 9])
def test_block_is_what_the_paper_writes(block, before, side):
    """Hold y = relu(F(x) + x) and y = relu(F(x) + W x) against numpy, at even and odd sizes."""
    network = build_basic_resnet((2, 1), widths=(4, 6), stem="small")
    rng = np.random.default_rng(0)
    for weight in network.weights:
        if weight.path.endswith(("gamma", "moving_variance")):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif weight.path.endswith(("beta", "moving_mean")):
            weight.assign(rng.normal(0, 0.3, weight.shape))
    ends = keras.Model(network.input, [network.get_layer(before).output, network.get_layer(f"{block}_out").output])
    x, found = (np.asarray(value, np.float64) for value in ends(rng.normal(size=(2, side, side, 3)).astype("float32")))
    strides = 2 if block.endswith("block1") else 1
    inner = np.maximum(convolve(network, f"{block}_1", x, strides), 0)
    inner = convolve(network, f"{block}_2", inner, 1)
    shortcut = convolve(network, f"{block}_0", x, strides) if strides == 2 else x
    expected = np.maximum(inner + shortcut, 0)
    assert expected.shape == found.shape
    assert np.allclose(found, expected, atol=1e-5)


def test_convolutions_start_he_normal_by_fan_out():
    network = build_basic_resnet((1, 1), widths=(64, 128), stem="imagenet")
    for name, fan_out in (("conv1_conv", 49 * 64), ("conv3_block1_1_conv", 9 * 128), ("conv3_block1_0_conv", 128)):
        kernel = np.asarray(network.get_layer(name).kernel)
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan_out), rel=0.05)


def convolve(network: keras.Model, name: str, x: np.ndarray, strides: int) -> np.ndarray:
    """Convolve [B, H, W, C] with zeros round it, then BatchNorm at inference, by loops over the kernel."""
    kernel = np.asarray(network.get_layer(f"{name}_conv").kernel, np.float64)
    half = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    rows, columns = ((side + 2 * half - kernel.shape[0]) // strides + 1 for side in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[-1]))
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            y += padded[:, i : i + strides * rows : strides, j : j + strides * columns : strides] @ kernel[i, j]
    gamma, beta, mean, variance = (np.asarray(w, np.float64) for w in network.get_layer(f"{name}_bn").weights)
    return (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta
