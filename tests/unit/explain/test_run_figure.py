"""Figures of occlusion and of the stations on the way in: what they say to those who read and to those who hear."""

import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import ModelConfig
from dlfer.explain.occlusion import compute_occlusion
from dlfer.explain.run_figure import (
    Preparation,
    choose_examples,
    compute_otsu_threshold,
    compute_preparation,
    write_occlusion_page,
    write_preparation_page,
)
from dlfer.metrics.predictions import Predictions
from dlfer.model.artifact import FAMILIES
from dlfer.model.stage_network import build_transfer_network


def make_predictions() -> Predictions:
    targets = np.array([2, 0, 0, 2, 1, 0])
    return Predictions([f"i{i}" for i in range(6)], ("angry", "happy", "sad"), targets, np.full((6, 3), 1 / 3))


def test_examples_are_the_first_of_each_label():
    assert choose_examples(make_predictions()).tolist() == [1, 4, 0]
    assert choose_examples(make_predictions(), limit=2).tolist() == [1, 4]
    only = Predictions(["a"], ("angry", "happy"), [1], [[0.5, 0.5]])
    assert choose_examples(only).tolist() == [0]


def predict(images):
    """Happy to the extent that the left half is bright."""
    bright = images[:, :, :8].mean(axis=(1, 2, 3)) / 255
    return np.stack([1 - bright, bright, 0 * bright], axis=1)


def test_occlusion_page_says_what_the_maps_show_and_what_not(tmp_path):
    images = np.full((2, 16, 16, 1), 200, np.uint8)
    predictions = make_predictions()
    rows = np.array([4, 1])
    maps = [compute_occlusion(predict, images[0], target, size=8, stride=8, fill=0) for target in (1, 0)]
    path = write_occlusion_page(tmp_path, images, maps, predictions=predictions, rows=rows)
    assert path.name == "occlusion.png"
    with Image.open(path) as image:
        assert "a square of 8x8 pixels" in image.text["Title"]
        assert "not why" in image.text["Title"]
        assert "happy predicted as happy, 78 % for happy" in image.text["Description"]
        assert (
            "lowers that by up to 39 percentage points on average and changes the predicted label on 50 % of the image"
            in image.text["Description"]
        )
        assert "angry predicted as happy" in image.text["Description"]
    assert write_occlusion_page(tmp_path, images[:0], [], predictions=predictions, rows=rows[:0]) is None


def test_preparation_page_names_each_station(tmp_path):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    preparation = Preparation(
        resized=np.zeros((2, 24, 24, 3), np.uint8),
        grey=np.zeros((2, 24, 24), np.uint8),
        binary=np.zeros((2, 24, 24), bool),
        features=(("first features", np.ones((2, 12, 12))), ("last features", np.ones((2, 3, 3)))),
    )
    path = write_preparation_page(tmp_path, images, preparation, ["happy", "sad"])
    with Image.open(path) as image:
        assert "stored 16x16, resized 24x24" in image.text["Description"]
        assert "first features, 12x12; last features, 3x3" in image.text["Description"]
        assert "the network gets the resized image" in image.text["Title"]


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
