from __future__ import annotations

import numpy as np
import pytest

from dlfer.config.sections import ModelConfig
from dlfer.model.backbones import build_backbone
from dlfer.model.stage_network import PUBLISHED_RATE, build_feature_extractor, list_drop_connects


def list_rates(**keys) -> list[float]:
    backbone, _ = build_feature_extractor(ModelConfig(**keys))
    return [layer.rate for layer in list_drop_connects(backbone)]


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["efficientnet_lite2", "efficientnet_b0", "efficientnet_v2_b0"])
def test_the_rate_is_that_of_the_last_block_and_falls_towards_the_first(backbone):
    published = list_rates(backbone=backbone)
    assert published == sorted(published)
    assert 0.8 * PUBLISHED_RATE < published[-1] < PUBLISHED_RATE
    assert list_rates(backbone=backbone, drop_connect=0.1) == pytest.approx([rate / 2 for rate in published])
    assert set(list_rates(backbone=backbone, drop_connect=0.0)) == {0.0}


def test_switched_off_a_training_step_is_deterministic():
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    for rate, equal in ((0.0, True), (0.9, False)):
        backbone, _ = build_feature_extractor(ModelConfig(backbone="efficientnet_nano", drop_connect=rate))
        first, second = (np.asarray(backbone(images, training=True)) for _ in range(2))
        assert np.allclose(first, second, atol=1e-5) == equal


def test_only_efficientnets_have_it():
    assert list_drop_connects(build_backbone("resnet_nano")) == []
    with pytest.raises(ValueError, match=r"drop_connect: found 0.1 with resnet18; only EfficientNets have it"):
        ModelConfig(backbone="resnet18", drop_connect=0.1)


def test_it_reaches_the_branches_of_a_hybrid():
    keys = {"family": "hybrid", "branches": ("resnet_nano", "efficientnet_nano")}
    assert set(list_rates(**keys, drop_connect=0.0)) == {0.0}
    assert max(list_rates(**keys)) > 0
