"""The temperature in artifact.json; the classifier as a whole is in tests/contract."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dlfer.config.sections import ModelConfig
from dlfer.errors import ModelError
from dlfer.metrics.confidence import apply_temperature
from dlfer.model.classifier import TransferClassifier
from dlfer.model.families import load_artifact
from dlfer.model.stage_network import build_transfer_network
from dlfer.runs.find import ARTIFACT_FILE
from dlfer.runs.records import About, Temperature


@pytest.fixture(scope="module")
def classifier() -> TransferClassifier:
    config = ModelConfig(backbone="efficientnet_nano")
    network = build_transfer_network(config, num_labels=3, image_size=32, channels=1)
    return TransferClassifier(network, ("a", "b", "c"), config=config, channels=1)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 40, 40)).astype(np.uint8)


@pytest.mark.slow
def test_the_stored_temperature_is_read_back_and_applied_on_request_only(classifier, images, tmp_path, monkeypatch):
    raw = classifier.predict(images)
    monkeypatch.setattr(
        classifier, "temperature_fit", Temperature(value=2.5, fitted_on="PublicTest", n=3589, note=None)
    )
    classifier.save(tmp_path, about=About(protocol="official"))
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text())
    assert record["temperature"] == {"value": 2.5, "fitted_on": "PublicTest", "n": 3589, "note": None}
    assert record["about"] == {"protocol": "official"}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    loaded = load_artifact(tmp_path)
    assert loaded.temperature == 2.5
    np.testing.assert_array_equal(loaded.predict(images), raw)
    calibrated = loaded.predict(images, calibrated=True)
    assert calibrated.dtype == np.float32
    np.testing.assert_allclose(calibrated, apply_temperature(raw, 2.5), rtol=1e-6)
    assert (calibrated.max(axis=1) < raw.max(axis=1)).all()


def test_without_a_temperature_calibrated_predictions_are_the_raw_ones(classifier, images, tmp_path):
    classifier.save(tmp_path)
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text())
    del record["temperature"]  # as written before there was one
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps(record))
    loaded = load_artifact(tmp_path)
    assert loaded.temperature == 1.0
    np.testing.assert_array_equal(loaded.predict(images, calibrated=True), loaded.predict(images))
    assert loaded.predict(images[:0], calibrated=True).shape == (0, 3)


def test_a_copy_of_a_loaded_artifact_keeps_the_temperature(classifier, tmp_path, monkeypatch):
    fit = Temperature(value=0.7, fitted_on="validation", n=40, note="fitted on 40 images only")
    monkeypatch.setattr(classifier, "temperature_fit", fit)
    classifier.save(tmp_path / "a")
    load_artifact(tmp_path / "a").save(tmp_path / "b")
    assert load_artifact(tmp_path / "b").temperature_fit == fit


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "2", None, True])
def test_what_is_no_temperature_is_refused(classifier, value, tmp_path):
    classifier.save(tmp_path)
    record = json.loads((tmp_path / ARTIFACT_FILE).read_text()) | {"temperature": {"value": value}}
    (tmp_path / ARTIFACT_FILE).write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"artifact\.json: .*temperature.*expected a number"):
        load_artifact(tmp_path)
