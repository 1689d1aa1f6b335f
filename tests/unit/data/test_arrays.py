"""Arrays of an .npz: one part or three, and files that are refused, pickles first of all."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.config.sections import DataConfig
from dlfer.data.sources import load_arrays
from dlfer.errors import DataError, MissingDataError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 10, 10), dtype=np.uint8)
TARGETS = np.array([0, 1, 2, 0, 1, 2])


def _load(path, **arrays):
    if arrays:
        np.savez(path, **arrays)
    return load_arrays(DataConfig(source="arrays", path=str(path)))


def test_one_part_is_train_with_default_labels_and_ids(tmp_path):
    bundle = _load(tmp_path / "a.npz", images=IMAGES, targets=TARGETS.astype(np.uint8))
    assert bundle.labels == ("0", "1", "2")
    assert np.array_equal(bundle.train.images[..., 0], IMAGES)
    assert bundle.train.targets.dtype == np.int64
    assert bundle.train.ids[5] == "train/5"
    assert bundle.validation is None
    assert bundle.test is None


def test_three_parts_with_labels_and_ids(tmp_path):
    rgb = np.repeat(IMAGES[..., None], 3, axis=-1)
    arrays = {}
    for part in ("train", "validation", "test"):
        arrays |= {f"{part}_images": rgb, f"{part}_targets": TARGETS}
    ids = np.array([f"face {row}" for row in range(6)])
    bundle = _load(tmp_path / "a.npz", **arrays, test_ids=ids, labels=np.array(["a", "b", "c", "d"]))
    assert bundle.labels == ("a", "b", "c", "d")
    assert bundle.test.ids.tolist() == ids.tolist()
    assert bundle.validation.images.shape == (6, 10, 10, 3)


def test_a_pickled_array_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    images = np.array([Trap()], dtype=object)
    with pytest.raises(DataError, match=r"Pickled \(object\) arrays are refused"):
        _load(tmp_path / "a.npz", images=images, targets=TARGETS)
    assert not (tmp_path / "trap").exists()


WRONG = {
    "no targets": ({"images": IMAGES}, "images without targets"),
    "no images": ({"targets": TARGETS}, "found the arrays targets, expected images and targets"),
    "floats": ({"images": IMAGES / 255, "targets": TARGETS}, "float64.*expected uint8"),
    "float targets": ({"images": IMAGES, "targets": TARGETS / 2}, "expected whole numbers"),
    "four channels": ({"images": np.zeros((6, 8, 8, 4), np.uint8), "targets": TARGETS}, "1 or 3"),
    "lengths": ({"images": IMAGES[:5], "targets": TARGETS}, "expected the same number"),
    "negative": ({"images": IMAGES, "targets": TARGETS - 1}, "negative target"),
    "few labels": ({"images": IMAGES, "targets": TARGETS, "labels": np.array(["a", "b"])}, "at least 3"),
    "same labels": ({"images": IMAGES, "targets": TARGETS, "labels": np.array(["a", "b", "a"])}, "distinct"),
    "same ids": ({"images": IMAGES, "targets": TARGETS, "ids": np.array(["a"] * 6)}, "more than once"),
    "number ids": ({"images": IMAGES, "targets": TARGETS, "ids": TARGETS}, "expected text"),
    "empty": ({"images": IMAGES[:0], "targets": TARGETS[:0]}, "is empty"),
    "both": ({"images": IMAGES, "targets": TARGETS, "train_images": IMAGES}, "both images and"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind):
    arrays, message = WRONG[kind]
    with pytest.raises(DataError, match=message):
        _load(tmp_path / "a.npz", **arrays)


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        _load(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="cannot be read"):
        _load(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(DataError, match=r"\.npy"):
        _load(tmp_path / "a.npy")
