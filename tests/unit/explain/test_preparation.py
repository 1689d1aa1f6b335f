"""The stations of an image on its way into a network."""

import numpy as np
import pytest

from dlfer.config.sections import ModelConfig
from dlfer.explain.run_figure import compute_otsu_threshold, compute_preparation
from dlfer.model.artifact import FAMILIES
from dlfer.model.stage_network import build_transfer_network


@pytest.mark.parametrize("seed", range(8))
def test_otsu_is_opencvs(seed):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.integers(20, 235, 2))
    grey = np.where(rng.random((40, 40)) < rng.uniform(0.2, 0.8), low, high) + rng.normal(0, 12, (40, 40))
    grey = grey.round().clip(0, 255).astype(np.uint8)
    expected, _ = cv2.threshold(grey, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    assert compute_otsu_threshold(grey) == expected


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("branches", [(), ("efficientnet_nano", "resnet_nano")])
def test_stations_have_their_form_and_the_last_features_are_those_that_are_pooled(branches, channels):
    family = "hybrid" if branches else "transfer"
    config = ModelConfig(family=family, backbone="efficientnet_nano", branches=branches)
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=channels)
    classifier = FAMILIES[family](network, ("a", "b", "c"), config=config, channels=channels)
    images = np.random.default_rng(0).integers(0, 256, (2, 48, 48, channels)).astype(np.uint8)
    found = compute_preparation(classifier, images)
    assert found.resized.shape == (2, 32, 32, channels)
    assert found.grey.shape == found.binary.shape == (2, 32, 32)
    assert found.binary.dtype == bool
    assert len(found.features) == 2 * max(1, len(branches))
    assert all(values.ndim == 3 and len(values) == 2 for _, values in found.features)
    if not branches:
        last = np.abs(np.asarray(network.backbone(network.face_input(images)))).mean(axis=-1)
        assert np.allclose(found.features[1][1], last, atol=1e-5)
