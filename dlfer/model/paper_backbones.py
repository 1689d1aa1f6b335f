"""Backbones that related papers train from random weights: GoogLeNet, ResNets of basic blocks, VGG19 with BatchNorm.

GoogLeNet (Inception v1) has nine inception blocks and two auxiliary heads, used in training only. It is published
without BatchNorm. Local response normalisation is left out: it has no weights, Keras has no layer for it, and it does
not improve accuracy (Simonyan and Zisserman 2015, table 3, A against A-LRN). Source: Szegedy et al., Going Deeper with
Convolutions, CVPR 2015 (arXiv 2014), table 1 and section 5.

A basic block of a ResNet is y = F(x) + x, where F is two 3x3 convolutions with BatchNorm. Where width or resolution
changes, the shortcut is a projection: y = F(x) + W x, a 1x1 convolution with BatchNorm. Padding is symmetric, as in
torchvision ("same" pads a strided convolution on one side only). Source: He, Zhang, Ren, Sun, Deep Residual Learning,
CVPR 2016, table 1 (ResNet18, ResNet34); initialisation and the constants of BatchNorm as in torchvision.

VGG19 has BatchNorm after each convolution, as in public code that trains it from scratch. Source: Simonyan and
Zisserman, ICLR 2015, configuration E; BatchNorm and initialisation as in torchvision's vgg19_bn, whose convolutions
keep their biases.
"""

from __future__ import annotations

import keras
from keras import layers, ops

VGG_BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))


def build_vgg_bn(blocks: tuple[tuple[int, int], ...] = VGG_BLOCKS) -> keras.Model:
    """Build VGG19 with BatchNorm, without its dense layers, with random weights.

    Layers are named as in keras.applications' VGG19.

    Args:
        blocks: number of 3x3 convolutions and of their filters for each block; each block ends with max pooling.

    Returns:
        A model named "backbone" from float [B, S, S, 3] to a feature map [B, s, s, filters of the last block]; with
        five blocks s = S / 32, rounded down at each halving.
    """
    inputs = x = keras.Input((None, None, 3), name="image")
    for block, (num_convolutions, filters) in enumerate(blocks, start=1):
        for index in range(1, num_convolutions + 1):
            name = f"block{block}_conv{index}"
            he_normal = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")
            x = layers.Conv2D(filters, 3, padding="same", kernel_initializer=he_normal, name=name)(x)
            x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    return keras.Model(inputs, x, name="backbone")


WIDTHS = (64, 128, 256, 512)


def build_basic_resnet(repeats: tuple[int, ...], *, widths: tuple[int, ...] = WIDTHS, stem: str) -> keras.Model:
    """Build a ResNet of basic blocks without its top, with random weights.

    Layers are named as in keras.applications' ResNet.

    Args:
        repeats: number of blocks of each stage; every stage but the first halves the resolution.
        widths: number of filters of each stage; the stem has as many as the first stage.
        stem: "imagenet" (7x7 convolution with stride 2, then max pooling with stride 2) or "small"
            (3x3 convolution with stride 1 and no pooling, for images of some 32 to 64 pixels).

    Returns:
        A model named "backbone" from float [B, S, S, 3] to the feature map [B, s, s, widths[-1]]; with four
        stages s = S / 32, or S / 8 with the small stem, rounded up at each halving.
    """
    inputs = keras.Input((None, None, 3), name="image")
    if stem == "small":
        x = _convolve_block(inputs, widths[0], kernel=3, strides=1, name="conv1")
        x = layers.ReLU(name="conv1_relu")(x)
    else:
        x = _convolve_block(inputs, widths[0], kernel=7, strides=2, name="conv1")
        x = layers.ReLU(name="conv1_relu")(x)
        # Padding with zeros does not change the maximum of non-negative values.
        x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
        x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for stage, (width, num_blocks) in enumerate(zip(widths, repeats, strict=True)):
        for block in range(num_blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            x = _add_block(x, width, strides=strides, name=f"conv{stage + 2}_block{block + 1}")
    return keras.Model(inputs, x, name="backbone")


def _add_block(inputs: keras.KerasTensor, width: int, *, strides: int, name: str) -> keras.KerasTensor:
    """Add a basic block: two 3x3 convolutions and a shortcut."""
    x = _convolve_block(inputs, width, kernel=3, strides=strides, name=f"{name}_1")
    x = layers.ReLU(name=f"{name}_1_relu")(x)
    x = _convolve_block(x, width, kernel=3, strides=1, name=f"{name}_2")
    shortcut = inputs
    if strides != 1 or inputs.shape[-1] != width:
        shortcut = _convolve_block(inputs, width, kernel=1, strides=strides, name=f"{name}_0")
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_out")(x)


def _convolve_block(x: keras.KerasTensor, filters: int, *, kernel: int, strides: int, name: str) -> keras.KerasTensor:
    """Add symmetric zero padding, a convolution without bias, and BatchNorm."""
    if kernel > 1:
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
    he_normal = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")
    x = layers.Conv2D(
        filters, kernel, strides=strides, use_bias=False, kernel_initializer=he_normal, name=f"{name}_conv"
    )(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)


# Numbers of filters of 1x1 | 3x3 reduce, 3x3 | 5x5 reduce, 5x5 | projection after pooling: the rows of table 1.
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
        A model named "backbone" from float [B, S, S, 3] to the feature map [B, s, s, 1024], where s = S / 32 rounded
        up at each halving. The last layer of block 3a, for example, is named "inception_3a".
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
    """Build one of the two auxiliary heads, which classify the outputs of blocks 4a and 4d in training.

    Their losses are added to that of the main head, with weight 0.3 each; they are not used at inference.

    Args:
        name: name of the model; it must be unique within a network.

    Returns:
        A model from a feature map float [B, s, s, F] of any s to float32 logits [B, C]. It has the published
        number of weights for every s, see `AuxiliaryPooling`; they are created at the first call.
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
    """A layer that averages a feature map [B, s, s, F] of any s over a 4x4 grid of windows, giving [B, 4, 4, F].

    The paper averages 14x14 maps (224 pixels) over 5x5 windows with stride 3, which gives the 4x4 output that the next
    dense layer expects. Here the side of a window is 5/14 of the map's side, rounded up, and the windows are evenly
    spaced: at s = 14 they are exactly those of the paper, at s = 3 (48 pixels) they are 2x2.
    """

    def call(self, inputs):
        """Return the averages, [B, 4, 4, F]."""
        size = ops.shape(inputs)
        rows, columns = (ops.cast(_average_windows(side), inputs.dtype) for side in size[1:3])
        return ops.einsum("pr,qc,brcf->bpqf", rows, columns, inputs)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], AUXILIARY_WINDOWS, AUXILIARY_WINDOWS, input_shape[-1])


def _average_windows(side: int):
    """Return a matrix, float32 [4, side], whose row k averages the k-th of four windows; `side` may be a tensor."""
    width = (5 * side + 13) // 14
    windows = ops.arange(AUXILIARY_WINDOWS, dtype="int32")[:, None]
    starts = (windows * (side - width) + 1) // (AUXILIARY_WINDOWS - 1)
    places = ops.arange(side, dtype="int32")[None, :]
    inside = ops.logical_and(places >= starts, places < starts + width)
    return ops.cast(inside, "float32") / ops.cast(width, "float32")


def _add_inception(x: keras.KerasTensor, filters: tuple[int, ...], *, name: str) -> keras.KerasTensor:
    """Add an inception block: 1x1, 3x3, 5x5 and pooling branches in parallel, whose outputs are concatenated."""
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
