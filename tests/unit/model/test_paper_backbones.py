"""GoogLeNet against table 1 and section 5 of the paper."""

import keras
import numpy as np
import pytest

from dlfer.model.paper_backbones import BLOCKS, AuxiliaryPooling, build_auxiliary_head, build_googlenet

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
