"""VGG19 with BatchNorm after each convolution, the form in which public code trains it from scratch.

Source: Simonyan and Zisserman, ICLR 2015, configuration E; BatchNorm and initialisation as in torchvision's
vgg19_bn, whose convolutions keep their biases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

BLOCKS = ((2, 64), (2, 128), (4, 256), (4, 512), (4, 512))


def build_vgg_bn(blocks: tuple[tuple[int, int], ...] = BLOCKS) -> keras.Model:
    """Build VGG19 with BatchNorm, without its dense layers, with random weights.

    Layers are named as in keras.applications' VGG19.

    Args:
        blocks: number of 3x3 convolutions and their filters, block by block; each ends by max pooling.

    Returns:
        A model named "backbone" from float [B, S, S, 3] to the feature map [B, s, s, 512], s = S / 32 rounded
        down at each halving.
    """
    import keras
    from keras import layers

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
