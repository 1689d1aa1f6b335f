"""Balance of a training split: rows of an epoch, class weights, and the paper's augmented copies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage
from sklearn.utils.class_weight import compute_class_weight

from dlfer.data.bundle import Split
from dlfer.data.pipeline import (
    ROTATION_DEGREES,
    SHIFT,
    ZOOM,
    add_copies,
    balance_indices,
    compute_class_weights,
    compute_warp,
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
