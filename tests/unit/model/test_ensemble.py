"""An ensemble: its members' answers combined, labels matched by name, each member's own parts of an image, its files."""

import json
import os

import numpy as np
import pytest

from dlfer.config.sections import HeadConfig, ModelConfig
from dlfer.errors import ModelError
from dlfer.metrics.predictions import combine_vote, fit_combination
from dlfer.model.classifier import TransferClassifier
from dlfer.model.families import EnsembleClassifier, load_artifact
from dlfer.model.predict import predict_views
from dlfer.model.stage_network import build_transfer_network
from dlfer.runs.find import ARTIFACT_FILE

LABELS = ("angry", "happy", "sad")


def make_member(labels=LABELS, *, channels: int = 1, crop: float | None = None, pooling: str = "max"):
    # Random weights with max pooling answer more differently than with the average.
    config = ModelConfig(backbone="efficientnet_nano", head=HeadConfig(pooling=pooling))
    network = build_transfer_network(config, num_labels=len(labels), image_size=32, channels=channels, crop=crop)
    return TransferClassifier(network, labels, config=config, channels=channels)


@pytest.fixture(scope="module")
def members():
    """Of other orders of labels, colours and parts of the image."""
    return {
        "a": make_member(),
        "b": make_member(("sad", "angry", "happy"), channels=3),
        "c": make_member(("happy", "sad", "angry"), crop=0.8),
    }


def make(members, combine="average", trained=None) -> EnsembleClassifier:
    return EnsembleClassifier(members, LABELS, config=ModelConfig(family="ensemble"), combine=combine, trained=trained)


def draw_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def ask(members, images, view: str | None = None) -> np.ndarray:
    """The answers of the members, columns put in the order of LABELS by hand."""
    answers = []
    for name, order in (("a", [0, 1, 2]), ("b", [1, 2, 0]), ("c", [2, 0, 1])):
        found = members[name].predict(images) if view is None else predict_views(members[name], images, view)
        answers.append(found[:, order])
    return np.stack(answers).astype(float)


@pytest.mark.slow
def test_members_are_combined_by_the_names_of_the_labels(members):
    images = draw_images(6, 40, 40)
    answers = ask(members, images)
    assert np.allclose(make(members).predict(images), answers.mean(axis=0), atol=1e-6)
    assert np.allclose(make(members, "vote").predict(images), combine_vote(answers), atol=1e-6)
    trained = fit_combination(answers, np.array([0, 1, 2, 0, 1, 2]))
    found = make(members, "trained", {"single": trained}).predict(images)
    assert np.allclose(found, trained.predict(answers), atol=1e-6)


@pytest.mark.parametrize("view", ["mirror", "ten_crop"])
def test_views_are_each_members_own(members, view):
    images = draw_images(4, 40, 40, 1)
    expected = ask(members, images, view).mean(axis=0)
    assert np.allclose(predict_views(make(members), images, view), expected, atol=1e-6)


def test_a_combination_is_fitted_for_each_view(members):
    images = draw_images(6, 40, 40, 1)
    targets = np.array([0, 1, 2, 0, 1, 2])
    trained = {
        "single": fit_combination(ask(members, images), targets),
        "mirror": fit_combination(ask(members, images, "mirror"), targets[::-1]),
    }
    found = predict_views(make(members, "trained", trained), images, "mirror")
    assert np.allclose(found, trained["mirror"].predict(ask(members, images, "mirror")), atol=1e-6)


@pytest.mark.slow
def test_it_is_saved_with_its_members_and_what_was_fitted(members, tmp_path):
    images = draw_images(5, 40, 40)
    trained = {"single": fit_combination(ask(members, images), np.array([0, 1, 2, 0, 1]))}
    ensemble = make(members, "trained", trained)
    ensemble.save(tmp_path / "model")
    again = load_artifact(tmp_path / "model")
    assert np.array_equal(again.predict(images), ensemble.predict(images))
    assert {path.name for path in (tmp_path / "model" / "members").iterdir()} == {"a", "b", "c"}
    again.save(tmp_path / "copy")
    assert np.array_equal(load_artifact(tmp_path / "copy").predict(images), ensemble.predict(images))
    weights = "members/a/network.weights.h5"
    assert os.path.samefile(tmp_path / "model" / weights, tmp_path / "copy" / weights)


@pytest.mark.slow
def test_a_changed_combination_is_not_taken_for_another(members, tmp_path):
    make(members).save(tmp_path)
    path = tmp_path / ARTIFACT_FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"ensemble": record["ensemble"] | {"combine": "trained"}}))
    with pytest.raises(ModelError, match="none was fitted"):
        load_artifact(tmp_path)


def test_members_with_other_labels_are_refused():
    with pytest.raises(ModelError, match="member b has the labels angry, glad, sad; expected angry, happy, sad"):
        make({"a": make_member(), "b": make_member(("angry", "glad", "sad"))})
