"""Which layers of a backbone are trained in a phase."""

from __future__ import annotations

import keras

from dlfer.config.schema import FreezeConfig


def set_trainable(backbone: keras.Model, config: FreezeConfig, *, head_only: bool) -> None:
    """Set `trainable` of every layer of `backbone`; takes effect at the next compile.

    Args:
        backbone: its layers in the order from the input.
        config: fraction of layers that never move, and whether BatchNorm is frozen.
        head_only: nothing of the backbone moves.
    """
    backbone.trainable = not head_only
    if head_only:
        return
    layers = [layer for layer in backbone.layers if layer.weights]
    num_frozen = round(config.layers * len(layers))
    for index, layer in enumerate(layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= num_frozen and not (is_norm and config.batch_norm == "frozen")
