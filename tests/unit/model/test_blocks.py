"""The blocks of a network hold every layer and every parameter once, whatever the backbone."""

import numpy as np
import pytest

from dlfer.config.schema import FreezeConfig
from dlfer.config.sections import ModelConfig
from dlfer.model.backbones import find_backbone
from dlfer.model.blocks import describe_network
from dlfer.model.stage_network import build_transfer_network
from dlfer.runs.network_record import NetworkRecord
from dlfer.train.plan import set_trainable


def build(config, *, image_size=64):
    return build_transfer_network(config, num_labels=5, image_size=image_size, channels=1)


@pytest.mark.parametrize("backbone", ["resnet_nano", "efficientnet_nano", "googlenet", "mobilenet_v2"])
def test_blocks_hold_every_parameter_once(backbone, tmp_path):
    network = build(ModelConfig(backbone=backbone))
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
    network = build(config)
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
    network = build(config, image_size=48)
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
