"""Drop-connect: in training the branch of a residual block is left out for some images, more often in later blocks.

EfficientNet is published with a rate of 0.2, for hundreds of epochs. In short trainings from random weights it slows the
start: EfficientNet-Lite2 on FER2013 at 48 pixels had a loss of 1.87 after one epoch with it, and 1.78 without
(one seed; results/random_start.md).
"""

from __future__ import annotations

import keras

PUBLISHED_RATE = 0.2
"""Of EfficientNet, Lite and V2: what the rate of the last block is just below."""


def list_drop_connects(network: keras.Model) -> list[keras.layers.Dropout]:
    """Return the layers of `network`, and of networks in it, that drop whole feature maps of an image."""
    found = []
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            found += list_drop_connects(layer)
        elif isinstance(layer, keras.layers.Dropout) and layer.noise_shape is not None:
            found.append(layer)
    return found


def set_drop_connect(network: keras.Model, rate: float) -> None:
    """Set the rate that the last block's is just below; those of the blocks before fall linearly to 0.

    Args:
        network: with layers made for the published rate, before it is compiled.
        rate: probability in 0..1 (exclusive) that the branch of a block is left out; 0 switches it off.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016); Tan & Le, "EfficientNet" (ICML 2019).
    """
    for layer in list_drop_connects(network):
        layer.rate = layer.rate * rate / PUBLISHED_RATE
