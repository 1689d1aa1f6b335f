"""What a network is made of, block by block: the record that a run keeps of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import keras
import numpy as np

from dlfer.config.sections import ModelConfig
from dlfer.model.backbones import list_levels
from dlfer.model.stage_network import TransferNetwork
from dlfer.runs.network_record import Block, NetworkRecord


def describe_network(network: TransferNetwork, config: ModelConfig, *, has_head: bool = True) -> NetworkRecord:
    """Return the blocks of a network with their sizes, and how much of each is trainable as its layers stand now.

    Args:
        network: the whole.
        config: how it was built.
        has_head: whether its head answers; that of a boosted model is not used.
    """
    backbone, size = network.backbone, network.face_input.image_size
    if config.branches:
        blocks = []
        for branch, name in config.name_branches().items():
            blocks += _describe_backbone(backbone.get_layer(branch), list_levels(name), size, branch=branch)
        blocks.append(_describe_fusion(backbone, set(config.name_branches()), size))
    else:
        blocks = _describe_backbone(backbone, list_levels(config.backbone, config.feature_level), size)
    if has_head:
        layers = (network.pooling, network.dropout, network.head)
        blocks.append(_make_block("head", network.head.name, (network.model.output_shape[-1],), layers))
    return NetworkRecord(image_size=size, channels=network.model.input_shape[-1], blocks=blocks)


def _describe_backbone(network: keras.Model, levels: Sequence[str], size: int, *, branch: str = "") -> list[Block]:
    """Return a block for each feature level; layers belong to the next level that ends after them."""
    prefix = f"{branch}_" if branch else ""
    ends = [prefix + end for end in levels]
    shapes = keras.Model(network.inputs[0], [network.get_layer(end).output for end in ends]).compute_output_shape(
        (1, size, size, 3)
    )
    layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
    places = [[layer.name for layer in layers].index(end) + 1 for end in ends]
    # Whatever follows the last level in the order of the layers lies beside it.
    starts, stops = [0, *places[:-1]], [*places[:-1], len(layers)]
    return [
        _make_block(f"feature level {number}", end, shape[1:], layers[start:stop], branch=branch)
        for number, (end, shape, start, stop) in enumerate(zip(ends, shapes, starts, stops, strict=True), 1)
    ]


def _describe_fusion(backbone: keras.Model, branches: set[str], size: int) -> Block:
    """Return the block of what lies around the branches of a hybrid: their inputs, their pooling and the fusion."""
    layers = [
        layer
        for layer in backbone.layers
        if layer.name not in branches and not isinstance(layer, keras.layers.InputLayer)
    ]
    shape = backbone.compute_output_shape((1, size, size, 3))
    return _make_block("fusion", layers[-1].name, shape[1:], layers)


def _make_block(
    name: str, layer: str, shape: Sequence[int | None], layers: Sequence[keras.layers.Layer], *, branch: str = ""
) -> Block:
    # A layer that occurs twice has its weights once.
    weights = {id(weight): weight for one in layers for weight in one.weights}
    trainable = {id(weight): weight for one in layers for weight in one.trainable_weights}
    return Block(
        name=name,
        branch=branch,
        layer=layer,
        shape=[int(length) for length in shape if length is not None],
        layers=len(layers),
        parameters=_count(weights.values()),
        statistics=_count(
            weight
            for one in layers
            if isinstance(one, keras.layers.BatchNormalization)
            for weight in (one.moving_mean, one.moving_variance)
        ),
        trained=_count(trainable.values()),
    )


def _count(weights: Iterable[keras.Variable]) -> int:
    return sum(int(np.prod(weight.shape)) for weight in weights)
