"""GoogLeNet (Inception v1): nine inception blocks, and the two auxiliary heads that it is trained with.

As published, without BatchNorm; local response normalisation is left out: it has no weights, Keras has no
layer for it, and it brings nothing (Simonyan and Zisserman 2015, table 3, A against A-LRN).

Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015 (arXiv 2014), table 1 and section 5.
"""

from __future__ import annotations

import keras
from keras import layers, ops

# Filters of 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | projection behind the pooling: table 1, row by row.
BLOCKS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
AUXILIARY_LOSS_WEIGHT = 0.3
AUXILIARY_WINDOWS = 4


def build_googlenet() -> keras.Model:
    """Build GoogLeNet without its top and its auxiliary heads, with random weights (He normal).

    Returns:
        A model named "backbone" from float [B, S, S, 3] to the feature map [B, s, s, 1024], s = S / 32 rounded
        up at each halving. The output of block 3a, for example, is that of layer "inception_3a".
    """
    inputs = keras.Input((None, None, 3), name="image")
    x = _convolve(inputs, 64, kernel=7, strides=2, name="conv1")
    x = _halve(x, name="pool1")
    x = _convolve(x, 64, kernel=1, name="conv2_reduce")
    x = _convolve(x, 192, kernel=3, name="conv2")
    x = _halve(x, name="pool2")
    for block, filters in BLOCKS.items():
        if block in ("4a", "5a"):
            x = _halve(x, name=f"pool{int(block[0]) - 1}")
        x = _add_inception(x, filters, name=f"inception_{block}")
    return keras.Model(inputs, x, name="backbone")


def build_auxiliary_head(num_labels: int, *, name: str = "auxiliary") -> keras.Sequential:
    """Build one of the two classifiers that branch off behind blocks 4a and 4d in training.

    Their losses are added to that of the network with weight 0.3 each; at inference they are dropped.

    Args:
        num_labels: C.
        name: of the model; two heads in one network need two names.

    Returns:
        A model from a feature map float [B, s, s, F] of any s to float32 logits [B, C]; it has the published
        number of weights at every s, see `AuxiliaryPooling`. Its weights exist when it has been called once.
    """
    return keras.Sequential(
        [
            AuxiliaryPooling(name="pooling"),
            layers.Conv2D(128, 1, activation="relu", kernel_initializer="he_normal", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(1024, activation="relu", kernel_initializer="he_normal", name="dense"),
            layers.Dropout(0.7, name="dropout"),
            layers.Dense(num_labels, dtype="float32", name="logits"),
        ],
        name=name,
    )


@keras.saving.register_keras_serializable(package="dlfer")
class AuxiliaryPooling(layers.Layer):
    """Average a feature map [B, s, s, F] of any s over 4x4 windows: [B, 4, 4, F].

    The paper averages 14x14 maps (224 pixels) over 5x5 windows with stride 3, which gives 4x4, and the dense layer
    behind it is made for that. Here the windows are 5/14 of the side, rounded up, and evenly spread: at s = 14
    exactly the paper's, at s = 3 (48 pixels) windows of 2x2.
    """

    def call(self, inputs):
        """Return the averages."""
        size = ops.shape(inputs)
        rows, columns = (ops.cast(_average_windows(side), inputs.dtype) for side in size[1:3])
        return ops.einsum("pr,qc,brcf->bpqf", rows, columns, inputs)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], AUXILIARY_WINDOWS, AUXILIARY_WINDOWS, input_shape[-1])


def _average_windows(side: int):
    """Return float32 [4, side]: row k averages the k-th of four windows; `side` may be a scalar tensor."""
    width = (5 * side + 13) // 14
    windows = ops.arange(AUXILIARY_WINDOWS, dtype="int32")[:, None]
    starts = (windows * (side - width) + 1) // (AUXILIARY_WINDOWS - 1)
    places = ops.arange(side, dtype="int32")[None, :]
    inside = ops.logical_and(places >= starts, places < starts + width)
    return ops.cast(inside, "float32") / ops.cast(width, "float32")


def _add_inception(x: keras.KerasTensor, filters: tuple[int, ...], *, name: str) -> keras.KerasTensor:
    """Add four branches side by side: 1x1, 3x3, 5x5, and pooling; their maps are concatenated."""
    one, reduce_three, three, reduce_five, five, projection = filters
    branches = [
        _convolve(x, one, kernel=1, name=f"{name}_1x1"),
        _convolve(_convolve(x, reduce_three, kernel=1, name=f"{name}_3x3_reduce"), three, kernel=3, name=f"{name}_3x3"),
        _convolve(_convolve(x, reduce_five, kernel=1, name=f"{name}_5x5_reduce"), five, kernel=5, name=f"{name}_5x5"),
    ]
    pooled = layers.MaxPooling2D(3, strides=1, padding="same", name=f"{name}_pool")(x)
    branches.append(_convolve(pooled, projection, kernel=1, name=f"{name}_pool_projection"))
    return layers.Concatenate(name=name)(branches)


def _convolve(x: keras.KerasTensor, filters: int, *, kernel: int, name: str, strides: int = 1) -> keras.KerasTensor:
    return layers.Conv2D(
        filters,
        kernel,
        strides=strides,
        padding="same",
        activation="relu",
        kernel_initializer="he_normal",
        name=name,
    )(x)


def _halve(x: keras.KerasTensor, *, name: str) -> keras.KerasTensor:
    return layers.MaxPooling2D(3, strides=2, padding="same", name=name)(x)
