"""What freezing reaches: the first layers and BatchNorm of a backbone, and of each branch of a hybrid."""

import keras
import pytest

from dlfer.config.schema import FreezeConfig, ModelConfig
from dlfer.model.backbones import build_backbone
from dlfer.model.hybrid import build_hybrid_backbone, name_branches
from dlfer.train.freeze import set_trainable

BRANCHES = ("efficientnet_nano", "resnet_nano")


def build(kind: str) -> tuple[keras.Model, list[keras.Model]]:
    """Return a backbone and the networks whose layers are counted."""
    if kind == "single":
        backbone = build_backbone(BRANCHES[0])
        return backbone, [backbone]
    backbone, _ = build_hybrid_backbone(ModelConfig(family="hybrid", branches=BRANCHES, fusion="attention"))
    return backbone, [backbone.get_layer(branch) for branch in name_branches(BRANCHES)]


def weighted(network):
    return [layer for layer in network.layers if layer.weights]


@pytest.mark.parametrize("kind", ["single", "hybrid"])
def test_nothing_moves_while_the_head_is_trained_alone(kind):
    backbone, _ = build(kind)
    set_trainable(backbone, FreezeConfig(), head_only=True)
    assert backbone.trainable_variables == []
    set_trainable(backbone, FreezeConfig(), head_only=False)
    assert all(layer.trainable for layer in backbone.layers)


@pytest.mark.parametrize("kind", ["single", "hybrid"])
def test_the_first_layers_of_each_network_stay(kind):
    backbone, networks = build(kind)
    set_trainable(backbone, FreezeConfig(layers=0.5), head_only=False)
    for network in networks:
        moves = [layer.trainable for layer in weighted(network)]
        assert moves == sorted(moves)
        assert sum(not move for move in moves) == round(0.5 * len(moves)) > 0


@pytest.mark.parametrize("kind", ["single", "hybrid"])
def test_batch_norm_is_frozen_wherever_it_stands(kind):
    backbone, networks = build(kind)
    set_trainable(backbone, FreezeConfig(batch_norm="frozen"), head_only=False)
    for network in networks:
        norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
        assert norms
        assert not any(layer.trainable for layer in norms)
        assert all(layer.trainable for layer in weighted(network) if layer not in norms)


def test_what_fuses_the_branches_is_always_trained():
    backbone, _ = build("hybrid")
    set_trainable(backbone, FreezeConfig(layers=1.0, batch_norm="frozen"), head_only=False)
    paths = {variable.path for variable in backbone.trainable_variables}
    assert paths == {
        "fusion/kernel",
        "fusion/bias",
        "branch2_resnet_nano_projection/kernel",
        "branch2_resnet_nano_projection/bias",
    }
