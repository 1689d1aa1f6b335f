"""The drawn faces: a function of the seed alone, as unequal as FER2013, distinguishable but not easy."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import DataConfig, NumImages
from dlfer.data.synthetic.faces import (
    ACTIONS,
    CONFUSABLE,
    FER2013_COUNTS,
    LABEL_NOISE,
    PROTOTYPES,
    draw_face,
    draw_intensities,
    load_synthetic_faces,
)
from dlfer.errors import DataError


def load(train=40, validation=20, test=20, seed=0):
    numbers = NumImages(train=train, validation=validation, test=test)
    return load_synthetic_faces(DataConfig(source="synthetic_faces", num_images=numbers, seed=seed))


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


@pytest.fixture(scope="module")
def faces():
    return load(train=2100, validation=30, test=700)


def test_bundle_has_the_shapes_and_names_of_fer2013():
    bundle = load()
    assert bundle.labels == FER2013_LABELS
    for split, number in ((bundle.train, 40), (bundle.validation, 20), (bundle.test, 20)):
        assert split.images.shape == (number, 48, 48, 1)
        assert split.images.dtype == np.uint8
        assert split.targets.dtype == np.int64
        assert split.targets.max() < 7
    assert bundle.train.ids[17] == "synthetic_faces/train/17"
    assert load(seed=1).train.ids[17] == "synthetic_faces/train/seed 1/17"  # another image than that of seed 0
    assert bundle.test.name == "test"
    assert "not photographed" in bundle.notes[0]


def test_two_loads_are_equal_and_a_smaller_one_is_the_beginning():
    large, small = load(), load(train=12, validation=5, test=1)
    for name in ("train", "validation", "test"):
        first, second = getattr(large, name), getattr(small, name)
        np.testing.assert_array_equal(first.images[: len(second)], second.images)
        np.testing.assert_array_equal(first.targets[: len(second)], second.targets)
        np.testing.assert_array_equal(first.ids[: len(second)], second.ids)


def test_another_process_draws_the_same_images():
    code = (
        "import hashlib, numpy as np; from dlfer.data.synthetic.faces import draw_face;"
        "print(hashlib.sha256(draw_face('Fear', rng=np.random.default_rng(5))).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(draw_face("Fear", rng=np.random.default_rng(5)))


def test_the_generator_is_the_only_randomness():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = draw_face("Happy", rng=np.random.default_rng(3))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(first, draw_face("Happy", rng=np.random.default_rng(3)))
    assert (first != draw_face("Happy", rng=np.random.default_rng(4))).any()


@pytest.mark.slow
def test_seeds_and_splits_share_no_image(faces):
    splits = [faces.train, faces.validation, faces.test, load(train=200, seed=1).train]
    digests = [digest(image) for split in splits for image in split.images]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
def test_class_shares_are_those_of_fer2013(faces):
    shares = np.bincount(faces.train.targets, minlength=7) / len(faces.train)
    expected = np.array(FER2013_COUNTS) / sum(FER2013_COUNTS)
    # Four standard deviations of a share of 2,100 draws.
    margin = 4 * np.sqrt(expected * (1 - expected) / len(faces.train))
    assert (np.abs(shares - expected) < margin).all()
    assert sum(FER2013_COUNTS) == 28709


@pytest.mark.slow
def test_pictures_have_the_brightness_and_contrast_of_photographs(faces):
    pixels = faces.train.images[:500].reshape(500, -1).astype(float)
    assert 105 < pixels.mean() < 150
    assert 35 < np.median(pixels.std(axis=1)) < 75
    assert pixels.std(axis=1).min() > 5


@pytest.mark.parametrize("expression", FER2013_LABELS)
def test_every_expression_is_drawn(expression):
    image = draw_face(expression, rng=np.random.default_rng(0))
    assert image.shape == (48, 48)
    assert image.dtype == np.uint8


def test_expression_changes_the_face_of_one_person():
    faces = {digest(draw_face(name, rng=np.random.default_rng(11))) for name in FER2013_LABELS}
    assert len(faces) == len(FER2013_LABELS)


def test_unknown_expression_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'Joy'.*Happy"):
        draw_face("Joy", rng=np.random.default_rng(0))


def test_prototypes_use_known_actions_and_labels():
    assert set(PROTOTYPES) == set(FER2013_LABELS) == set(CONFUSABLE)
    for variants in PROTOTYPES.values():
        assert all(set(variant) <= set(ACTIONS) for variant in variants)
    for label, others in CONFUSABLE.items():
        assert label not in others
        assert set(others) <= set(FER2013_LABELS)


def test_intensities_follow_the_prototype_and_stay_in_range():
    rng = np.random.default_rng(0)
    happy = [draw_intensities("Happy", rng=rng) for _ in range(300)]
    neutral = [draw_intensities("Neutral", rng=rng) for _ in range(300)]
    assert all(0 <= value <= 1.3 for actions in happy + neutral for value in actions.values())
    assert np.mean([actions[12] for actions in happy]) > 0.6
    assert np.mean([actions[12] for actions in neutral]) < 0.1
    assert np.mean([actions[4] for actions in happy]) < 0.1


def test_share_of_faces_that_show_another_expression(monkeypatch):
    shown = []

    def record(expression, *, rng):
        shown.append(expression)
        return np.zeros((48, 48), np.uint8)

    monkeypatch.setattr("dlfer.data.synthetic.faces.draw_face", record)
    targets = load(train=4000, validation=1, test=1).train.targets
    labels = np.array(FER2013_LABELS)[targets]
    other = [(label, seen) for label, seen in zip(labels, shown, strict=False) if label != seen]
    assert abs(len(other) / 4000 - LABEL_NOISE) < 4 * np.sqrt(LABEL_NOISE * (1 - LABEL_NOISE) / 4000)
    assert all(seen in CONFUSABLE[label] for label, seen in other)


@pytest.mark.slow
def test_expressions_can_be_learnt_but_not_perfectly(faces):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
    model.fit(compute_orientations(faces.train.images), faces.train.targets)
    accuracy = model.score(compute_orientations(faces.test.images), faces.test.targets)
    majority = np.bincount(faces.test.targets).max() / len(faces.test)
    assert majority + 0.06 < accuracy < 0.97


def compute_orientations(images):
    """Return histograms of 8 edge orientations in cells of 4x4 pixels, float [N, 1152]."""
    grey = images[:, :, :, 0].astype(np.float32)
    down, right = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(down, right)
    bins = np.minimum((np.arctan2(down, right) % np.pi) / np.pi * 8, 7).astype(int)
    cells = [(strength * (bins == k)).reshape(-1, 12, 4, 12, 4).sum(axis=(2, 4)) for k in range(8)]
    features = np.stack(cells, axis=-1)
    return (features / (features.sum(axis=-1, keepdims=True) + 20)).reshape(len(images), -1)
