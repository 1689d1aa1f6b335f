"""What is said before a stage trains, and the blocks of a network, which hold every layer and every parameter once."""

from pathlib import Path

import keras
import numpy as np
import pytest

from dlfer.config.schema import ExperimentSection, FreezeConfig, StageConfig
from dlfer.config.sections import ModelConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.model.backbones import build_backbone, find_backbone
from dlfer.model.stage_network import build_hybrid_backbone, build_transfer_network
from dlfer.runs.run_records import NetworkRecord
from dlfer.train.cluster import choose_device
from dlfer.train.plan import describe_network, describe_plan, set_trainable, unfreeze_random_start
from dlfer.train.progress import StopControl, TrainingListener
from dlfer.train.state import StageJob


def describe(
    *,
    momentum: float | None,
    epochs: int,
    max_steps: int | None = None,
    stage: dict | None = None,
    random: bool = True,
    **freeze,
) -> str:
    """The plan of ten steps an epoch."""
    config = StageConfig.model_validate(
        {
            "data": {"source": "synthetic_faces"},
            "epochs": epochs,
            "batch_size": 4,
            "image_size": 32,
            "freeze": freeze,
            **(stage or {}),
        }
    )
    images, targets = np.zeros((40, 32, 32, 1), np.uint8), np.arange(40) % 2
    split = Split("train", images, targets, np.array([f"Training/{row}" for row in range(40)]))
    network = build_transfer_network(
        ModelConfig(backbone="resnet_nano", norm_momentum=momentum), num_labels=2, image_size=32, channels=1
    )
    section = ExperimentSection(name="x")
    job = StageJob(
        "finetune", config, Path(), 0, choose_device(section), 1.0, StopControl(), TrainingListener(), max_steps
    )
    bundle = DataBundle("arrays", ("a", "b"), split, split, None)
    return "\n".join(describe_plan("EF-FER2", job, network, bundle, precision="float32", starts_at_random=random))


def test_the_numbers_that_follow_from_the_file():
    text = describe(momentum=None, epochs=5)
    assert "40 images of 32x32, batch 4, 10 steps an epoch, 5 epochs, 50 steps" in text
    assert "GiB" in text


@pytest.mark.parametrize(
    ("given", "warns"),
    [
        ({"momentum": 0.99, "epochs": 49}, True),
        ({"momentum": 0.99, "epochs": 50}, False),
        ({"momentum": None, "epochs": 5}, False),  # ResNet's own is 0.9: 50 steps
        ({"momentum": 0.99, "epochs": 1, "batch_norm": "frozen"}, False),
        ({"momentum": 0.99, "epochs": 1, "max_steps": 2}, False),
        ({"momentum": 0.99, "epochs": 49, "random": False}, False),
    ],
)
def test_statistics_that_cannot_settle_are_told(given, warns):
    text = describe(**given)
    assert ("settle after about 500 steps, and 490 are planned" in text) == warns
    assert ("model.norm_momentum" in text) == warns


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "freeze", "text"),
    [
        # The first step of the warm-up has a tenth of the rate.
        (
            {"schedule": {"name": "cosine", "warmup_epochs": 1, "final": 0.1}, "optimizer": {"learning_rate": 2e-3}},
            {},
            "rate 0.002 at its peak, 0.000201 in the last step (cosine)",
        ),
        (
            {"schedule": {"name": "step", "factor": 0.1, "every_epochs": 5}, "optimizer": {"learning_rate": 4e-3}},
            {},
            "rate 0.004 at its peak, 0.0004 in the last step (step)",
        ),
        # A warm-up that is longer than the training never comes to the rate.
        (
            {"schedule": {"name": "constant", "warmup_epochs": 16}, "optimizer": {"learning_rate": 4e-3}},
            {},
            "rate rising to 0.002 of 0.004 (constant; the warm-up does not end)",
        ),
        (
            {"schedule": {"name": "cosine", "warmup_epochs": 8}, "optimizer": {"learning_rate": 4e-3}},
            {},
            "rate rising to 0.004 (cosine)",
        ),
        (
            {"schedule": {"name": "step", "factor": 0.1, "every_epochs": 7, "warmup_epochs": 16}},
            {},
            "in the last step (step; the warm-up does not end)",
        ),
        ({"optimizer": {"learning_rate": 4e-3}}, {}, "rate 0.004 (constant)"),
        ({"schedule": {"name": "plateau"}}, {}, "rate 0.001, lowered on plateaus"),
        (
            {"schedule": {"name": "cosine"}, "optimizer": {"learning_rate": 2e-4}},
            {"head_epochs": 3, "head_learning_rate": 1e-3},
            "head alone for 3 epochs at rate 0.001, then rate 0.0002 at its peak",
        ),
        ({"clip": None}, {}, "no clipping"),
        ({}, {}, "; gradients clipped to norm 1"),
        ({"clip_scope": "variable"}, {}, "; each variable's gradient clipped to norm 1"),
        (
            {"optimizer": {"name": "sgd", "weight_decay": 5e-4, "weight_decay_kind": "l2"}},
            {},
            "sgd (weight decay 0.0005, L2 in the gradient, kernels only)",
        ),
    ],
)
def test_rates_clipping_and_weight_decay_are_told(stage, freeze, text):
    assert text in describe(momentum=None, epochs=8, stage=stage, **freeze)


BRANCHES = ("efficientnet_nano", "resnet_nano")


def build(kind: str) -> tuple[keras.Model, list[keras.Model]]:
    """Return a backbone and the networks whose layers are counted."""
    if kind == "single":
        backbone = build_backbone(BRANCHES[0])
        return backbone, [backbone]
    config = ModelConfig(family="hybrid", branches=BRANCHES, fusion="attention")
    backbone, _ = build_hybrid_backbone(config)
    return backbone, [backbone.get_layer(branch) for branch in config.name_branches()]


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


def build_blocks(config, *, image_size=64):
    return build_transfer_network(config, num_labels=5, image_size=image_size, channels=1)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet_nano", "efficientnet_nano", "googlenet", "mobilenet_v2"])
def test_blocks_hold_every_parameter_once(backbone, tmp_path):
    network = build_blocks(ModelConfig(backbone=backbone))
    record = describe_network(network, ModelConfig(backbone=backbone))
    assert record.parameters == network.model.count_params()
    assert record.trained == sum(int(np.prod(weight.shape)) for weight in network.model.trainable_weights)
    assert [block.layer for block in record.blocks] == [*find_backbone(backbone).stages, "head"]
    assert record.blocks[-1].shape == [5]
    sides = [block.shape[0] for block in record.blocks[:-1]]
    assert sides == sorted(sides, reverse=True)
    assert all(block.trained == block.parameters - block.statistics for block in record.blocks)
    record.write(tmp_path)
    assert NetworkRecord.read(tmp_path) == record


def test_what_is_frozen_is_said():
    config = ModelConfig(backbone="resnet_nano")
    network = build_blocks(config)
    set_trainable(network.backbone, FreezeConfig(layers=0.5, batch_norm="frozen"), head_only=False)
    blocks = describe_network(network, config).blocks
    assert blocks[0].trained == 0
    assert 0 < blocks[-2].trained < blocks[-2].parameters - blocks[-2].statistics
    assert blocks[-1].trained == blocks[-1].parameters > 0
    network.backbone.trainable = False
    frozen = describe_network(network, config, has_head=False)
    assert (frozen.trained, frozen.blocks[-1].name) == (0, "feature level 5")


def test_each_branch_of_a_hybrid_has_its_blocks():
    config = ModelConfig(family="hybrid", branches=("resnet_nano", "efficientnet_nano"), fusion="attention")
    network = build_blocks(config, image_size=48)
    record = describe_network(network, config)
    assert record.parameters == network.model.count_params()
    assert [block.branch for block in record.blocks] == [
        *["branch1_resnet_nano"] * 5,
        *["branch2_efficientnet_nano"] * 5,
        "",
        "",
    ]
    assert [block.name for block in record.blocks[-2:]] == ["fusion", "head"]
    assert record.blocks[-2].parameters > 0


def test_a_warm_up_as_long_as_the_training_is_told():
    stage, freeze = {"schedule": {"name": "cosine", "warmup_epochs": 3}}, {"head_epochs": 1}
    told = "EF-FER2: schedule.warmup_epochs: found 3, and the rate rises until the end of the training, 3 epochs"
    assert told in describe(momentum=None, epochs=4, stage=stage, **freeze)
    assert "warmup_epochs" not in describe(momentum=None, epochs=5, stage=stage, **freeze)


def test_keys_that_change_nothing_are_named():
    stage = {"schedule": {"name": "constant", "restarts": 2}, "optimizer": {"name": "sgd", "nesterov": True}}
    text = describe(momentum=None, epochs=2, stage=stage)
    assert (
        "EF-FER2: without effect: schedule.restarts 2 (the schedule is constant), optimizer.nesterov True (momentum is 0)"
        in text
    )
    assert "without effect" not in describe(momentum=None, epochs=2)
