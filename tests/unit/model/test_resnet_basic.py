"""ResNets of basic blocks against the published counts and a plain numpy computation of their blocks."""

import keras
import numpy as np
import pytest

from dlfer.model.paper_backbones import build_basic_resnet


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
