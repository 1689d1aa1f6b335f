"""Carrying weights over: by name, complete, verified, and without a trace when it is refused."""

import json

import h5py
import keras
import numpy as np
import pytest

from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError, TransferError
from dlfer.model.stage_network import build_transfer_network
from dlfer.model.transfer import RECORD_FILE, WEIGHTS_FILE, draw_probe_images, transfer_backbone, write_backbone

NANO = ModelConfig(backbone="efficientnet_nano")


def compute_features(network, images):
    return np.asarray(network.pooling(network.backbone(network.face_input(images), training=False)))


def build(num_labels: int, *, image_size: int = 32, channels: int = 3, backbone: str = "efficientnet_nano"):
    config = ModelConfig(backbone=backbone)
    return build_transfer_network(config, num_labels=num_labels, image_size=image_size, channels=channels)


def randomise(network, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for weight in network.backbone.weights:
        is_kernel = len(weight.shape) > 1
        weight.assign(rng.normal(0, 0.2, weight.shape) if is_kernel else rng.uniform(0.5, 1.5, weight.shape))


@pytest.fixture
def stage_one(tmp_path):
    network = build(12)
    randomise(network, 1)
    write_backbone(network, tmp_path / "one", source="a test")
    return network, tmp_path / "one"


def test_features_of_both_stages_are_equal(stage_one):
    """Other head, other image size, other number of channels: the backbone is the same function."""
    first, folder = stage_one
    second = build(7, image_size=48, channels=1)
    record = transfer_backbone(folder, second)
    assert record.feature_difference <= 1e-5
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    at_same_size = build(7)
    transfer_backbone(folder, at_same_size)
    assert np.abs(compute_features(first, images) - compute_features(at_same_size, images)).max() <= 1e-5


def test_four_lists_name_every_variable(stage_one):
    first, folder = stage_one
    record = transfer_backbone(folder, build(7))
    assert len(record.loaded) == len(first.backbone.weights)
    assert record.newly_initialised == ["head/kernel", "head/bias"]
    assert record.missing == record.unexpected == []
    assert "0 missing, 0 unexpected" in record.describe()[0]


def test_another_backbone_is_refused_and_nothing_changes(stage_one):
    _, folder = stage_one
    other = build(7, backbone="efficientnet_lite0")
    before = [np.asarray(w) for w in other.model.weights]
    with pytest.raises(TransferError, match=r"Missing: .*Unexpected: |Of another shape"):
        transfer_backbone(folder, other)
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(before, other.model.weights, strict=True))


def test_a_missing_variable_is_named(stage_one):
    _, folder = stage_one
    record = json.loads((folder / RECORD_FILE).read_text())
    record["variables"]["stem_conv/kernel_of_old"] = record["variables"].pop("stem_conv/kernel")
    (folder / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(TransferError, match=r"Missing: stem_conv/kernel\. Unexpected: stem_conv/kernel_of_old"):
        transfer_backbone(folder, build(7))


def test_swapped_weights_are_found_by_their_digest(stage_one):
    """Two weights of one shape, swapped in the file: Keras loads them without a word."""
    _, folder = stage_one
    with h5py.File(folder / WEIGHTS_FILE, "r+") as file:
        arrays = []
        file.visititems(lambda name, item: arrays.append(item) if isinstance(item, h5py.Dataset) else None)
        a, b = next((x, y) for x in arrays for y in arrays if x.name < y.name and x.shape == y.shape)
        first, second = a[...], b[...]
        a[...], b[...] = second, first
    with pytest.raises(ModelError, match="not those that were written"):
        transfer_backbone(folder, build(7))


def test_another_function_with_equal_weights_is_refused(stage_one):
    _, folder = stage_one
    record = json.loads((folder / RECORD_FILE).read_text())
    record["features"] = (np.asarray(record["features"]) * 1.01 + 0.01).tolist()
    (folder / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(TransferError, match="not the same function"):
        transfer_backbone(folder, build(7))


def test_absent_files_are_a_clear_error(tmp_path):
    with pytest.raises(ModelError, match="expected a backbone written by dlfer"):
        transfer_backbone(tmp_path, build(7))


def test_probe_is_not_blind():
    """Networks of other weights give other features on the probe, else equality would mean nothing."""
    first, second = build(7), build(7)
    randomise(first, 1)
    randomise(second, 2)
    images = draw_probe_images(32, 3)
    difference = np.abs(compute_features(first, images) - compute_features(second, images)).max()
    assert difference > 1e-3
    keras.backend.clear_session()
