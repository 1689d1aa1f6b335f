"""ResNets of plain basic blocks: y = F(x) + x, F two 3x3 convolutions with BatchNorm.

Where width or resolution changes the shortcut is a projection, y = F(x) + W x with a 1x1 convolution and
BatchNorm. Padding is symmetric, as torchvision has it ("same" pads a strided convolution on one side only).

Source: He, Zhang, Ren, Sun, Deep Residual Learning, CVPR 2016, table 1 (ResNet18, ResNet34);
initialisation and BatchNorm's constants as in torchvision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

WIDTHS = (64, 128, 256, 512)


def build_basic_resnet(repeats: tuple[int, ...], *, widths: tuple[int, ...] = WIDTHS, stem: str) -> keras.Model:
    """Build a ResNet of basic blocks without its top, with random weights.

    Layers are named as in keras.applications' ResNet.

    Args:
        repeats: blocks of each stage; every stage but the first halves the resolution.
        widths: filters of each stage; the stem has as many as the first.
        stem: "imagenet" (7x7 convolution with stride 2, then max pooling with stride 2) or "small"
            (3x3 convolution with stride 1 and no pooling, for images of some 32 to 64 pixels).

    Returns:
        A model named "backbone" from float [B, S, S, 3] to the feature map [B, s, s, widths[-1]]; with four
        stages s = S / 32, or S / 8 by the small stem, rounded up at each halving.
    """
    import keras
    from keras import layers

    inputs = keras.Input((None, None, 3), name="image")
    if stem == "small":
        x = _convolve(inputs, widths[0], kernel=3, strides=1, name="conv1")
        x = layers.ReLU(name="conv1_relu")(x)
    else:
        x = _convolve(inputs, widths[0], kernel=7, strides=2, name="conv1")
        x = layers.ReLU(name="conv1_relu")(x)
        # After a ReLU zeros are as good as minus infinity.
        x = layers.ZeroPadding2D(1, name="pool1_pad")(x)
        x = layers.MaxPooling2D(3, strides=2, name="pool1_pool")(x)
    for stage, (width, num_blocks) in enumerate(zip(widths, repeats, strict=True)):
        for block in range(num_blocks):
            strides = 2 if stage > 0 and block == 0 else 1
            x = _add_block(x, width, strides=strides, name=f"conv{stage + 2}_block{block + 1}")
    return keras.Model(inputs, x, name="backbone")


def _add_block(inputs: keras.KerasTensor, width: int, *, strides: int, name: str) -> keras.KerasTensor:
    """Add two convolutions and the shortcut round them."""
    from keras import layers

    x = _convolve(inputs, width, kernel=3, strides=strides, name=f"{name}_1")
    x = layers.ReLU(name=f"{name}_1_relu")(x)
    x = _convolve(x, width, kernel=3, strides=1, name=f"{name}_2")
    shortcut = inputs
    if strides != 1 or inputs.shape[-1] != width:
        shortcut = _convolve(inputs, width, kernel=1, strides=strides, name=f"{name}_0")
    x = layers.Add(name=f"{name}_add")([shortcut, x])
    return layers.ReLU(name=f"{name}_out")(x)


def _convolve(x: keras.KerasTensor, filters: int, *, kernel: int, strides: int, name: str) -> keras.KerasTensor:
    """Add zeros round the image, a convolution without bias, and BatchNorm."""
    import keras
    from keras import layers

    if kernel > 1:
        x = layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
    he_normal = keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")
    x = layers.Conv2D(
        filters, kernel, strides=strides, use_bias=False, kernel_initializer=he_normal, name=f"{name}_conv"
    )(x)
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(x)
