"""Class folders: splits under any of their names, sizes, channels, draws, and folders that are wrong."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import DataConfig, LabelsConfig, NumImages
from dlfer.data import folder
from dlfer.data.folder import load_folder
from dlfer.data.images import read_image, resize_square
from dlfer.data.sources import load_data
from dlfer.errors import DataError, MissingDataError


def _write(path, shape: tuple[int, ...] = (20, 20), seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def _write_classes(root, splits=("train", "validation"), classes=("cat", "dog"), count: int = 3, shape=(20, 20)):
    for place, (split, name) in enumerate((split, name) for split in splits for name in classes):
        for row in range(count):
            _write(root / split / name / f"im{row}.png", shape, seed=100 * place + row)


def _load(root, image_size: int = 64, **keys):
    return load_folder(DataConfig(source="folder", path=str(root), **keys), image_size=image_size)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Validation"])
def test_parts_are_known_by_each_of_their_names(tmp_path, name):
    _write_classes(tmp_path, ("train", name, "test"))
    bundle = _load(tmp_path)
    assert [split.name for split in (bundle.train, bundle.validation, bundle.test)] == ["train", "validation", "test"]
    assert bundle.validation.ids[0] == f"{name}/cat/im0.png"
    assert bundle.labels == ("cat", "dog")
    assert bundle.train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert bundle.notes == ()


def test_without_parts_all_images_are_train(tmp_path):
    _write_classes(tmp_path, ("",))
    bundle = _load(tmp_path)
    assert (len(bundle.train), bundle.validation, bundle.test) == (6, None, None)
    assert bundle.train.ids.tolist()[:2] == ["cat/im0.png", "cat/im1.png"]


def test_folders_below_a_class_belong_to_it_and_hidden_or_other_files_do_not(tmp_path):
    _write_classes(tmp_path, ("",), count=1)
    _write(tmp_path / "cat" / "images" / "deep.PNG")
    (tmp_path / "cat" / ".hidden.png").write_text("x")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / ".git").mkdir()
    assert _load(tmp_path).train.ids.tolist() == ["cat/im0.png", "cat/images/deep.PNG", "dog/im0.png"]


def test_images_keep_a_common_size_and_stay_grey_if_all_are(tmp_path):
    _write_classes(tmp_path, shape=(20, 30))
    bundle = _load(tmp_path)
    assert bundle.train.images.shape == (6, 20, 30, 1)
    expected = np.random.default_rng(102).integers(0, 256, (20, 30), dtype=np.uint8)
    assert np.array_equal(bundle.train.images[5, ..., 0], expected)


def test_one_colour_image_makes_all_rgb(tmp_path):
    _write_classes(tmp_path)
    _write(tmp_path / "validation" / "dog" / "colour.png", (20, 20, 3))
    bundle = _load(tmp_path)
    assert bundle.train.images.shape[-1] == bundle.validation.images.shape[-1] == 3
    assert np.array_equal(bundle.train.images[0, ..., 0], bundle.train.images[0, ..., 2])


def test_rgb_files_that_show_grey_become_one_channel(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / name / "a.png")
    assert _load(tmp_path).train.images.shape == (2, 16, 16, 1)


@pytest.mark.parametrize(
    ("sides", "size", "image_size", "expected"),
    [((20, 30, 40), None, 64, 30), ((300, 400, 500), None, 64, 256), ((300, 400, 500), None, 320, 320),
     ((20, 30, 40), 12, 64, 12)],
)  # fmt: skip
def test_sizes_that_differ_become_centred_squares(tmp_path, sides, size, image_size, expected):
    for place, side in enumerate(sides):
        _write(tmp_path / "cat" / f"{place}.png", (side, side + 10))
        _write(tmp_path / "dog" / f"{place}.png", (side + 10, side))
    bundle = _load(tmp_path, image_size, size=size)
    assert bundle.train.images.shape == (6, expected, expected, 1)
    assert f"resized to {expected} px" in bundle.notes[0]
    for name, pixels in zip(bundle.train.ids, bundle.train.images, strict=True):
        assert np.array_equal(pixels, resize_square(read_image(tmp_path / name), expected))


def test_labels_are_matched_across_spellings_and_dropped(tmp_path):
    _write_classes(tmp_path, ("train",), ("happiness", "sad", "contempt"))
    _write_classes(tmp_path, ("test",), ("happy", "sadness", "contempt"))
    bundle = _load(tmp_path, labels=LabelsConfig(drop=("contempt",)))
    assert bundle.labels == ("Happy", "Sad")
    assert bundle.test.targets.tolist() == [0, 0, 0, 1, 1, 1]


def test_only_the_drawn_files_are_opened(tmp_path, monkeypatch):
    _write_classes(tmp_path, count=10)
    opened = []
    monkeypatch.setattr(folder, "read_image", lambda path, **keys: opened.append(path) or read_image(path))
    bundle = _load(tmp_path, num_images=NumImages(train=6))
    assert np.bincount(bundle.train.targets).tolist() == [3, 3]
    assert len(opened) == 6 + 20
    for name, pixels in zip(bundle.train.ids, bundle.train.images, strict=True):
        assert np.array_equal(pixels, read_image(tmp_path / name))


def test_an_unreadable_file_is_refused_or_skipped_and_counted(tmp_path):
    _write_classes(tmp_path)
    broken = tmp_path / "train" / "cat" / "im1.png"
    broken.write_bytes(broken.read_bytes()[:200])  # the header is whole, the pixels are not
    (tmp_path / "train" / "dog" / "im2.png").write_text("no image at all")
    with pytest.raises(DataError, match=r"im[12]\.png"):
        _load(tmp_path)
    bundle = _load(tmp_path, skip_unreadable=True)
    assert bundle.train.ids.tolist() == [f"train/{name}.png" for name in ("cat/im0", "cat/im2", "dog/im0", "dog/im1")]
    assert bundle.train.targets.tolist() == [0, 0, 1, 1]
    assert len(bundle.validation) == 6
    expected = np.random.default_rng(2).integers(0, 256, (20, 20), dtype=np.uint8)
    assert np.array_equal(bundle.train.images[1, ..., 0], expected)
    assert "2 of 12 images could not be read" in bundle.notes[0]


def test_a_class_that_one_part_lacks_is_reported_and_those_of_train_are_needed(tmp_path):
    _write_classes(tmp_path, ("train",), ("cat", "dog", "emu"))
    _write_classes(tmp_path, ("validation",), ("cat", "dog"))
    assert _load(tmp_path).labels == ("cat", "dog", "emu")
    config = DataConfig(source="folder", path=str(tmp_path))
    notes = load_data(config, image_size=64).notes
    assert any("validation has no image of emu, so this class cannot be evaluated" in note for note in notes)
    _write_classes(tmp_path, ("validation",), ("fox",))
    with pytest.raises(DataError, match=r"train has no image of fox"):
        load_data(config, image_size=64)


def test_folders_that_hold_no_data_set_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no such folder"):
        _load(tmp_path / "absent")
    with pytest.raises(DataError, match="no class folders"):
        _load(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat: the class folder holds no images"):
        _load(tmp_path)


def test_parts_without_train_can_be_judged_and_not_trained_on(tmp_path):
    _write_classes(tmp_path, ("val", "test"))
    assert len(_load(tmp_path).test) == 6
    with pytest.raises(DataError, match="no train split, which training needs"):
        load_data(DataConfig(source="folder", path=str(tmp_path)), image_size=64)
    _write_classes(tmp_path, ("train", "valid"))
    with pytest.raises(DataError, match="more than one of them is validation by its name"):
        _load(tmp_path)
    mapped = _load(tmp_path, folders={"val": "ignore"})
    assert len(mapped.validation) == 6
    assert mapped.reading.left_out[0].n == 6


def test_a_folder_without_any_readable_image_is_refused(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_text("nothing")
    with pytest.raises(DataError, match="none of the 2 images can be read"):
        _load(tmp_path, skip_unreadable=True)


def test_what_was_met_with_in_reading_is_kept_for_the_audit(tmp_path):
    _write_classes(tmp_path, ("train",))
    assert _load(tmp_path).reading.sizes == {}
    _write(tmp_path / "train" / "cat" / "im7.png", (30, 40))
    (tmp_path / "train" / "dog" / "im8.png").write_bytes(b"no image")
    reading = _load(tmp_path, skip_unreadable=True).reading
    assert reading.sizes["train/cat/im7.png"] == (40, 30)
    assert len(reading.sizes) == 7
    assert len(reading.unreadable) == 1
    assert "im8.png" in reading.unreadable[0]
