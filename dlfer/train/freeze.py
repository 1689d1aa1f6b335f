"""Which layers of a backbone are trained in a phase."""

from __future__ import annotations

import keras

from dlfer.config.schema import FreezeConfig, StageConfig


def unfreeze_random_start(name: str, config: StageConfig) -> tuple[StageConfig, str | None]:
    """Return the stage with nothing frozen, and a note about what is not applied; None where nothing was frozen.

    For a stage that starts from random weights: frozen, they would stay random. A head that is trained on them alone
    learns nothing that lasts, and BatchNorm would keep the statistics 0 and 1 of no data.

    Args:
        name: of the stage, for the note.
        config: whose epochs of the head, if any, become epochs of the whole network.
    """
    freeze = config.freeze
    asked = [
        *([f"head_epochs: {freeze.head_epochs}"] if freeze.head_epochs else []),
        *([f"layers: {freeze.layers:g}"] if freeze.layers else []),
        *([f"batch_norm: {freeze.batch_norm}"] if freeze.batch_norm == "frozen" else []),
    ]
    if not asked:
        return config, None
    note = (
        f"{name} starts from random weights, so that freeze ({', '.join(asked)}) is not applied: all "
        f"{config.epochs} epochs train the whole network."
    )
    return config.model_copy(update={"freeze": FreezeConfig()}), note


def set_trainable(backbone: keras.Model, config: FreezeConfig, *, head_only: bool) -> None:
    """Set `trainable` of every layer of `backbone`; takes effect at the next compile.

    In a hybrid the fraction is taken of each branch, so that all branches keep their last layers free;
    what fuses the branches is always trained.

    Args:
        backbone: its layers in the order from the input.
        config: fraction of layers that never move, and whether BatchNorm is frozen.
        head_only: nothing of the backbone moves.
    """
    backbone.trainable = not head_only
    if head_only:
        return
    branches = [layer for layer in backbone.layers if isinstance(layer, keras.Model)]
    for branch in branches or [backbone]:
        _freeze_first_layers(branch, config)


def _freeze_first_layers(network: keras.Model, config: FreezeConfig) -> None:
    layers = [layer for layer in network.layers if layer.weights]
    num_frozen = round(config.layers * len(layers))
    for index, layer in enumerate(layers):
        is_norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = index >= num_frozen and not (is_norm and config.batch_norm == "frozen")
