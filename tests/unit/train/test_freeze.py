"""What freezing reaches: the first layers and BatchNorm of a backbone, and of each branch of a hybrid."""

import keras
import pytest

from dlfer.config.schema import FreezeConfig, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.model.backbones import build_backbone
from dlfer.model.hybrid import build_hybrid_backbone, name_branches
from dlfer.train.plan import set_trainable, unfreeze_random_start

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


@pytest.mark.parametrize(
    ("freeze", "text"),
    [
        ({"head_epochs": 3, "head_learning_rate": 1e-3}, "head_epochs: 3"),
        ({"layers": 0.5}, "layers: 0.5"),
        ({"batch_norm": "frozen"}, "batch_norm: frozen"),
        ({"head_epochs": 1, "layers": 1.0}, "head_epochs: 1, layers: 1"),
    ],
)
def test_random_weights_are_not_frozen_and_the_note_says_what_was_asked(freeze, text):
    config = StageConfig.model_validate({"data": {"source": "synthetic_faces"}, "epochs": 8, "freeze": freeze})
    found, note = unfreeze_random_start("EF-FER2", config)
    assert found.freeze == FreezeConfig()
    assert found.epochs == 8
    assert f"EF-FER2 starts from random weights, so that freeze ({text}) is not applied: all 8 epochs" in note


def test_where_nothing_is_frozen_nothing_is_said():
    config = StageConfig.model_validate({"data": {"source": "synthetic_faces"}, "freeze": {"head_learning_rate": 1.0}})
    assert unfreeze_random_start("EF-FER2", config) == (config, None)
