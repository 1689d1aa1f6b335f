"""The drawn scenes: a function of the seed alone, balanced, in colour, told apart by shape."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from dlfer.config.sections import DataConfig, NumImages
from dlfer.data.synthetic.scenes import SCENE_LABELS, draw_scene, load_synthetic_scenes
from dlfer.errors import DataError


def load(train=40, validation=20, test=None, seed=0):
    numbers = NumImages(train=train, validation=validation, test=test)
    return load_synthetic_scenes(DataConfig(source="synthetic_scenes", num_images=numbers, seed=seed))


def digest(image):
    return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def test_bundle_has_colour_images_and_no_test_part_unless_asked():
    bundle = load()
    assert len(bundle.labels) >= 12
    assert list(bundle.labels) == sorted(bundle.labels)
    assert bundle.train.images.shape == (40, 64, 64, 3)
    assert bundle.train.images.dtype == np.uint8
    assert bundle.validation.targets.dtype == np.int64
    assert bundle.train.ids[17] == "synthetic_scenes/train/17"
    assert load(seed=1).train.ids[17] == "synthetic_scenes/train/seed 1/17"  # another image than that of seed 0
    assert bundle.test is None
    assert len(load(test=7).test) == 7


def test_classes_are_balanced_in_every_prefix():
    for number in (33, 64, 100):
        counts = np.bincount(load(train=number, validation=1).train.targets, minlength=len(SCENE_LABELS))
        assert counts.max() - counts.min() <= 1


def test_two_loads_are_equal_and_a_smaller_one_is_the_beginning():
    large, small = load(test=9), load(train=12, validation=5, test=4)
    for name in ("train", "validation", "test"):
        first, second = getattr(large, name), getattr(small, name)
        np.testing.assert_array_equal(first.images[: len(second)], second.images)
        np.testing.assert_array_equal(first.targets[: len(second)], second.targets)
        np.testing.assert_array_equal(first.ids[: len(second)], second.ids)


def test_another_process_draws_the_same_images():
    code = (
        "import hashlib, numpy as np; from dlfer.data.synthetic.scenes import draw_scene;"
        "print(hashlib.sha256(draw_scene('house', rng=np.random.default_rng(5))).hexdigest())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == digest(draw_scene("house", rng=np.random.default_rng(5)))


def test_the_generator_is_the_only_randomness():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = draw_scene("tree", rng=np.random.default_rng(3))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(2)
    np.testing.assert_array_equal(first, draw_scene("tree", rng=np.random.default_rng(3)))
    assert (first != draw_scene("tree", rng=np.random.default_rng(4))).any()


@pytest.mark.slow
def test_seeds_and_splits_share_no_image():
    bundle = load(train=150, validation=100, test=100)
    splits = [bundle.train, bundle.validation, bundle.test, load(train=150, seed=1).train]
    digests = [digest(image) for split in splits for image in split.images]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("label", SCENE_LABELS)
def test_every_class_is_drawn_in_colour(label):
    images = np.stack([draw_scene(label, rng=np.random.default_rng(seed)) for seed in range(8)]).astype(int)
    assert images.shape == (8, 64, 64, 3)
    assert np.abs(images[..., 0] - images[..., 2]).mean() > 10
    assert images.std(axis=(1, 2, 3)).min() > 5


def test_unknown_label_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"'dragon'.*umbrella"):
        draw_scene("dragon", rng=np.random.default_rng(0))


@pytest.mark.slow
def test_shapes_can_be_learnt_but_not_by_colour_alone():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bundle = load(train=1600, validation=480)
    scores = {}
    for name, compute in (("edges", compute_orientations), ("colour", compute_colours)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=200))
        model.fit(compute(bundle.train.images), bundle.train.targets)
        scores[name] = model.score(compute(bundle.validation.images), bundle.validation.targets)
    chance = 1 / len(SCENE_LABELS)
    assert 2.5 * chance < scores["edges"] < 0.97
    assert scores["colour"] < 2.5 * chance


def compute_orientations(images):
    """Return histograms of 8 edge orientations in cells of 8x8 pixels, float [N, 512]."""
    grey = images.mean(axis=3, dtype=np.float32)
    down, right = np.gradient(grey, axis=(1, 2))
    strength = np.hypot(down, right)
    bins = np.minimum((np.arctan2(down, right) % np.pi) / np.pi * 8, 7).astype(int)
    cells = [(strength * (bins == k)).reshape(-1, 8, 8, 8, 8).sum(axis=(2, 4)) for k in range(8)]
    features = np.stack(cells, axis=-1)
    return (features / (features.sum(axis=-1, keepdims=True) + 20)).reshape(len(images), -1)


def compute_colours(images):
    """Return the mean and deviation of each channel, float [N, 6]."""
    return np.concatenate([images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)
