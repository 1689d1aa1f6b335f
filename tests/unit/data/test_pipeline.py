"""Balance of a training split: rows of an epoch, class weights, and the paper's augmented copies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage
from sklearn.utils.class_weight import compute_class_weight

from dlfer.config.schema import StageConfig
from dlfer.data.bundle import Split
from dlfer.data.pipeline import (
    ROTATION_DEGREES,
    SHIFT,
    ZOOM,
    add_copies,
    balance_indices,
    compute_class_weights,
    compute_warp,
    find_class_weights,
    iterate_epoch,
)
from dlfer.errors import ProtocolError

TARGETS = np.array([0] * 50 + [1] * 7 + [3] * 20)


def _counts(how: str, **keys) -> list[int]:
    return np.bincount(TARGETS[balance_indices(TARGETS, how, **{"seed": 0, "epoch": 0} | keys)], minlength=4).tolist()


@pytest.mark.parametrize("how", ["none", "class_weight"])
def test_none_and_class_weight_take_every_row_once(how):
    assert balance_indices(TARGETS, how, seed=3, epoch=2).tolist() == list(range(77))


def test_augment_lifts_every_class_to_the_largest_and_leaves_out_no_row():
    rows = balance_indices(TARGETS, "augment", seed=0, epoch=0)
    assert np.bincount(TARGETS[rows], minlength=4).tolist() == [50, 50, 0, 50]
    times = np.bincount(rows, minlength=77)
    assert set(times[:50]) == {1}
    assert set(times[50:57]) == {7, 8}
    assert set(times[57:]) == {2, 3}
    assert not np.array_equal(rows, balance_indices(TARGETS, "augment", seed=0, epoch=1))


def test_undersample_keeps_the_same_rows_in_every_epoch():
    rows = balance_indices(TARGETS, "undersample", seed=0, epoch=0)
    assert np.bincount(TARGETS[rows], minlength=4).tolist() == [7, 7, 0, 7]
    assert len(np.unique(rows)) == 21
    assert np.array_equal(rows, balance_indices(TARGETS, "undersample", seed=0, epoch=5))
    assert not np.array_equal(rows, balance_indices(TARGETS, "undersample", seed=1, epoch=0))


def test_sampler_draws_classes_with_equal_probability_anew_each_epoch():
    drawn = [balance_indices(TARGETS, "sampler", seed=0, epoch=epoch) for epoch in range(200)]
    assert {len(rows) for rows in drawn} == {77}
    shares = np.bincount(TARGETS[np.concatenate(drawn)], minlength=4) / (77 * 200)
    assert shares == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.02)
    assert not np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[7], balance_indices(TARGETS, "sampler", seed=0, epoch=7))


def test_an_unknown_balance_is_refused():
    with pytest.raises(ProtocolError, match="found 'smote'"):
        balance_indices(TARGETS, "smote", seed=0, epoch=0)


def test_class_weights_are_those_of_scikit_learn():
    found = compute_class_weights(np.bincount(TARGETS, minlength=4))
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=TARGETS)
    assert found[[0, 1, 3]] == pytest.approx(expected, rel=1e-6)
    assert found[2] == 0
    assert found[TARGETS].mean() == pytest.approx(1, rel=1e-6)


def _smooth_images(count: int, height: int = 24, width: int = 30) -> np.ndarray:
    noise = np.random.default_rng(0).uniform(0, 255, (count, height, width, 2))
    return ndimage.gaussian_filter(noise, (0, 3, 3, 0)).astype(np.uint8)


def test_the_warp_is_the_one_of_scipy():
    images = np.concatenate([_smooth_images(20), _smooth_images(20)[..., :1]], axis=-1)
    uniforms = np.random.default_rng(1).uniform(size=(20, 5))
    found = compute_warp(images, uniforms)
    height, width = images.shape[1:3]
    centre = np.array([height - 1, width - 1]) / 2
    for image, (turn, zoom, mirror, down, right), warped in zip(images, uniforms, found, strict=True):
        angle = np.deg2rad(ROTATION_DEGREES * (2 * turn - 1))
        scale = 1 + ZOOM * (2 * zoom - 1)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        if mirror < 0.5:
            matrix = np.diag([1, -1]) @ matrix
        shift = SHIFT * np.array([height * (2 * down - 1), width * (2 * right - 1)])
        offset = centre - matrix @ (centre + shift)
        for channel in range(3):
            expected = ndimage.affine_transform(
                image[..., channel].astype(np.float64), matrix, offset, order=1, mode="nearest"
            )
            assert np.abs(warped[..., channel] - expected).max() <= 0.51


def test_the_middle_of_every_range_changes_nothing():
    images = _smooth_images(3)
    assert np.array_equal(compute_warp(images, np.full((3, 5), 0.5)), images)


def _split(order: np.ndarray) -> Split:
    images = _smooth_images(77, 12, 12)[..., :1]
    ids = np.array([f"Training/{row}" for row in range(77)])
    return Split("all", images[order], TARGETS[order], ids[order])


def test_copies_fill_every_class_and_name_their_source():
    split = add_copies(_split(np.arange(77)), seed=0)
    assert np.bincount(split.targets, minlength=4).tolist() == [50, 50, 0, 50]
    by_id = dict(zip(split.ids.tolist(), split.targets.tolist(), strict=True))
    copies = [name for name in by_id if "#" in name]
    assert len(copies) == 150 - 77
    for name in copies:
        assert by_id[name] == by_id[name.split("#")[0]]
    of_one = [sum(name.startswith(f"Training/{row}#") for name in copies) for row in range(50, 57)]
    assert set(of_one) == {6, 7}
    originals = split.images[np.char.find(split.ids.astype(str), "#") < 0]
    warped = split.images[np.char.find(split.ids.astype(str), "#") >= 0]
    assert not (warped[:, None] == originals[None]).all(axis=(2, 3, 4)).any()


def test_copies_do_not_depend_on_the_order_of_rows_but_on_the_seed():
    straight = add_copies(_split(np.arange(77)), seed=0)
    turned = add_copies(_split(np.random.default_rng(5).permutation(77)), seed=0)
    first, second = np.argsort(straight.ids), np.argsort(turned.ids)
    assert straight.ids[first].tolist() == turned.ids[second].tolist()
    assert np.array_equal(straight.images[first], turned.images[second])
    assert not np.array_equal(straight.images, add_copies(_split(np.arange(77)), seed=1).images)


def test_a_balanced_split_gets_no_copies():
    rows = np.concatenate([np.arange(7), np.arange(50, 57), np.arange(57, 64)])
    assert len(add_copies(_split(rows), seed=0)) == 21


FER2013_TRAINING = (3995, 436, 4097, 7215, 4830, 3171, 4965)


@pytest.fixture(scope="module")
def split() -> Split:
    """As many images of each class as FER2013's Training has, of one pixel."""
    targets = np.repeat(np.arange(7), FER2013_TRAINING)
    ids = np.array([f"Training/{row}" for row in range(len(targets))])
    return Split("train", np.zeros((len(targets), 1, 1, 1), np.uint8), targets, ids)


def make_config(**augment) -> StageConfig:
    return StageConfig.model_validate(
        {
            "data": {"source": "synthetic_faces"},
            "batch_size": 1024,
            "image_size": 48,
            "balance": "class_weight",
            "augment": augment,
        }
    )


def sum_weights(split: Split, config: StageConfig, epochs: int) -> np.ndarray:
    """Return the total weight of each class, over its mean, in so many epochs of batches."""
    weights = find_class_weights(split, config, 7)
    totals = np.zeros(7)
    for epoch in range(epochs):
        for _, targets in iterate_epoch(split, config, num_labels=7, seed=0, epoch=epoch):
            totals += (weights * targets.astype(np.float64)).sum(axis=0)
    return totals / totals.mean()


# An epoch's draw of mixing weights moves the total of Disgust, of 436 images, by some 3 %: many epochs are the mean.
@pytest.mark.parametrize(
    ("augment", "epochs"), [({}, 2), ({"mixup": 0.2}, 120), ({"cutmix": 1.0}, 60), ({"mixup": 0.4, "cutmix": 1.0}, 120)]
)
def test_classes_of_fer2013_have_the_same_total_within_one_percent(split, augment, epochs):
    assert np.abs(sum_weights(split, make_config(**augment), epochs) - 1).max() < 0.01


def test_soft_targets_have_the_same_total_too(split):
    """Shares of votes: an image of one class has shares of others, which count by the weights of those."""
    rng = np.random.default_rng(0)
    soft = rng.dirichlet(np.full(7, 0.3), len(split)).astype(np.float32)
    soft = 0.5 * soft + 0.5 * np.eye(7, dtype=np.float32)[split.targets]
    voted = dataclasses.replace(split, soft_targets=soft)
    assert np.abs(sum_weights(voted, make_config(), 2) - 1).max() < 0.01
    weights = find_class_weights(voted, make_config(), 7)
    assert weights * soft.sum(axis=0, dtype=np.float64) == pytest.approx([len(split) / 7] * 7, rel=1e-5)


def test_one_hot_soft_targets_weigh_as_the_labels_do(split):
    hard = dataclasses.replace(split, soft_targets=np.eye(7, dtype=np.float32)[split.targets])
    config = make_config()
    assert find_class_weights(hard, config, 7) == pytest.approx(find_class_weights(split, config, 7))


def test_other_balances_have_no_weights(split):
    assert find_class_weights(split, make_config().model_copy(update={"balance": "sampler"}), 7) is None
