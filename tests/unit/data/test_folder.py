"""Class folders: splits under any of their names, sizes, channels and draws; and as people have them, with levels, links and other files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dlfer.config.sections import DataConfig, LabelsConfig, NumImages
from dlfer.data import folder
from dlfer.data.files import Tally, find_kind
from dlfer.data.folder import load_folder, name_split, scan_folder
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


_FACES = ("angry", "happy", "sad")


def _tree(root, splits, classes=_FACES, count: int = 2):
    for split in splits:
        for name in classes:
            for row in range(count):
                _write(root / split / name / f"im{row}.png", seed=row)


def _left_out(tally):
    return {reason.reason: reason.n for reason in tally.list_left_out()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("Training", "train"), ("train_set", "train"), ("TrainSet", "train"), ("trainset", "train"), ("TRAIN-images", "train"),
        ("01_train", "train"), ("PublicTest", "validation"), ("public_test", "validation"), ("Valid", "validation"),
        ("dev-data", "validation"), ("PrivateTest", "test"), ("private test", "test"), ("Testing", "test"), ("test_images", "test"),
        ("eval", "evaluation"), ("EvaluationSet", "evaluation"),
        ("holdout", None), ("angry", None), ("images", None), ("trainers", None), ("contest", None),
    ],
)  # fmt: skip
def test_names_of_parts(name, split):
    assert name_split(name) == split


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Training", "PublicTest", "PrivateTest"), {"train": 6, "validation": 6, "test": 6}),
        (("train_set", "test-data"), {"train": 6, "test": 6}),
        (("train", "eval"), {"train": 6, "validation": 6}),
        (("train", "dev", "eval"), {"train": 6, "validation": 6, "test": 6}),
        (("images/Train", "images/Test"), {"train": 6, "test": 6}),
        (("train/images", "test/images"), {"train": 6, "test": 6}),
        (("data/images",), {"train": 6}),
        (("archive (1)/Train", "archive (1)/Test"), {"train": 6, "test": 6}),
        (("My Faces v2",), {"train": 6}),
    ],
)
def test_layouts_that_are_understood(tmp_path, folders, splits):
    _tree(tmp_path, folders)
    found = scan_folder(tmp_path)
    assert {split: len(files) for split, files in found.items()} == splits
    assert {file.class_name for file in found["train"]} == set(_FACES)


def test_fer2013s_own_names_are_kept(tmp_path):
    _tree(tmp_path, ("Training", "PublicTest", "PrivateTest"))
    bundle = load_folder(DataConfig(source="folder", path=str(tmp_path)), image_size=48)
    assert [split.name for split in bundle.splits.values()] == ["Training", "PublicTest", "PrivateTest"]


@pytest.mark.parametrize(
    ("folders", "named"),
    [
        (("train", "test", "holdout"), "holdout"),
        (("kaggle", "own"), "kaggle"),
        (("", "more"), "more"),
        (("", "test"), "angry"),
    ],
)
def test_what_a_folder_is_is_asked_with_its_counts(tmp_path, folders, named):
    _tree(tmp_path, folders)
    with pytest.raises(DataError, match=rf"{named} \(\d files\).*data\.folders"):
        scan_folder(tmp_path)


def test_folders_with_the_same_folders_in_each_are_asked_for(tmp_path):
    _tree(tmp_path, ("left", "right"), ("cat", "dog"))
    with pytest.raises(DataError, match=r"left \(4 files\), right \(4 files\)"):
        scan_folder(tmp_path)
    found = scan_folder(tmp_path, {"left": "train", "right": "test"})
    assert {split: len(files) for split, files in found.items()} == {"train": 4, "test": 4}
    found = scan_folder(tmp_path, {"left": "class", "right": "class"})
    assert {file.class_name for file in found["train"]} == {"left", "right"}


def test_folders_of_subjects_below_expressions_are_the_class_above(tmp_path):
    _tree(tmp_path, _FACES, ("s1", "s2"))
    assert len(scan_folder(tmp_path)["train"]) == 12


def test_own_names_are_mapped_and_ignored_ones_are_counted(tmp_path):
    _tree(tmp_path, ("train", "more", "holdout", "old"))
    tally = Tally(tmp_path)
    found = scan_folder(tmp_path, {"more": "train", "holdout": "test", "old": "ignore"}, tally)
    assert {split: len(files) for split, files in found.items()} == {"train": 12, "test": 6}
    assert _left_out(tally) == {"files in folders that data.folders ignores": 6}
    assert tally.seen == 24
    with pytest.raises(DataError, match=r"data\.folders: found 'absent'"):
        scan_folder(tmp_path, {"absent": "test"})


def test_parts_below_the_classes_are_refused(tmp_path):
    _tree(tmp_path, _FACES, ("train", "test"))
    with pytest.raises(DataError, match=r"found the splits .* in the folder of a class"):
        scan_folder(tmp_path)


def test_what_is_no_picture_is_counted_by_reason_with_names(tmp_path):
    _tree(tmp_path, ("",))
    (tmp_path / "angry" / "notes.txt").write_text("x")
    (tmp_path / "angry" / "empty").write_bytes(b"")
    (tmp_path / "angry" / "video.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    (tmp_path / "angry" / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (tmp_path / "happy" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("Thumbs.db", ".DS_Store", "._im0.png", "desktop.ini"):
        (tmp_path / "happy" / name).write_bytes(b"x")
    (tmp_path / "__MACOSX" / "angry").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "angry" / "._a.png").write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "a.py").write_text("x")
    (tmp_path / "sad" / "im0.png").rename(tmp_path / "sad" / "no_suffix")
    bundle = load_folder(DataConfig(source="folder", path=str(tmp_path)), image_size=48)
    assert "sad/no_suffix" in bundle.train.ids
    found = {reason.reason: reason for reason in bundle.reading.left_out}
    counts = {reason: found[reason].n for reason in found}
    heic = next(name for name in counts if name.startswith("HEIC"))
    assert counts == {
        "hidden files and files of the system": 5, "files that are not in a supported picture format (.txt)": 1, "empty files": 1, "videos": 1, heic: 1,
        "broken links": 1, "files beside the folders": 1, "files that are not in a supported picture format (.py)": 1,
    }  # fmt: skip
    assert found["videos"].first == ["angry/video.mp4"]
    record = bundle.reading.as_record()
    assert (record.seen, record.used) == (18, 6)
    assert any("scripts holds 1 file and no picture" in note for note in bundle.notes)
    assert record.describe()[0] == "18 files seen, 6 used, 12 left out."


def test_links_to_folders_are_followed_once(tmp_path):
    _tree(tmp_path / "data", ("",))
    _write(tmp_path / "more" / "a.png")
    (tmp_path / "data" / "angry" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "angry" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "happy" / "loop").symlink_to("loop")
    (tmp_path / "data" / "happy" / "again").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "root").symlink_to(tmp_path / "data")
    tally = Tally(tmp_path / "data")
    found = scan_folder(tmp_path / "data", None, tally)
    assert len(found["train"]) == 7
    assert _left_out(tally) == {
        "links to a folder that is already read or that contains the link": 3, "broken links": 1
    }  # fmt: skip


def test_one_folder_under_two_names_is_refused(tmp_path):
    _tree(tmp_path, ("train",))
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(DataError, match="is the same folder as"):
        scan_folder(tmp_path)


def test_a_class_without_pictures_says_what_it_holds(tmp_path):
    _tree(tmp_path, ("",))
    (tmp_path / "fear").mkdir()
    (tmp_path / "fear" / "a.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(100))
    with pytest.raises(
        DataError, match=r"fear: the class folder holds no images that can be read: 1 videos \(fear/a.mp4\)"
    ):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\xff\xd8\xff\xe0", "picture"), (b"II*\0", "picture"), (b"MM\0*", "picture"), (b"\0\0\0\x1cftypavif", "picture"),
        (b"\0\0\0\x0cjP  \r\n", "picture"), (b"P5\n40 30", "picture"), (b"RIFF\1\2\3\4WEBP", "picture"),
        (b"\0\0\0\x18ftypheic", "heif"), (b"\0\0\0\x18ftypqt  ", "video"), (b"\0\0\0\x18ftyp3gp5", "video"),
        (b"\x1aE\xdf\xa3", "video"), (b"FLV\1\5", "video"), (b"RIFF\1\2\3\4AVI ", "video"), (b"\0\0\1\xba!", "video"),
        ((b"\x47" + bytes(187)) * 3, "video"), ((bytes(4) + b"\x47" + bytes(187)) * 3, "video"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "heif"), (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "picture"),
        (b".RMF\0", "video"), (b"YUV4MPEG2 W8", "video"), (b"\0\0\0\1\x67\x42", "video"), (b"1234\x12\xaf", "video"),
        (b"8BPS\0\1", "picture"), (b"\x01\xda\1\1\0\3", "picture"), (b"\x76\x2f\x31\x01", "linear"), (b"#?RGBE\n", "linear"),
        (b"\0\0\0\x18ftypM4A ", None), (b"BMW sales", None), (b"export const a", None), (b"%PDF-1.7", None), (b"", "empty"),
    ],
)  # fmt: skip
def test_kinds_are_told_by_the_first_bytes(tmp_path, start, kind):
    (tmp_path / "file").write_bytes(start + (bytes(700) if start else b""))
    assert find_kind(tmp_path / "file") == kind


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.nef", b"II*\0", "raw"), ("a.ARW", b"II*\0", "raw"), ("a.mka", b"\x1aE\xdf\xa3", None), ("a.wma", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", None),
        ("a.mjpeg", b"\xff\xd8\xff\xe0", "video"), ("a.tif", b"II*\0", "picture"),
    ],
)  # fmt: skip
def test_kinds_that_share_their_first_bytes_are_told_by_suffixes(tmp_path, name, start, kind):
    (tmp_path / name).write_bytes(start + bytes(700))
    assert find_kind(tmp_path / name) == kind


@pytest.mark.parametrize(
    ("names", "example"),
    [
        (["train", "test", "train_aug"], "{train_aug: train}"),
        (["train1", "train2", "test"], "{train1: train, train2: train}"),
        (["train", "holdout"], "{holdout: test}"),
        (["fold0", "fold1"], "{fold0: ..., fold1: ...}"),
        (["train", "test", "x: y"], '{"x: y": ...}'),
    ],
)
def test_the_example_suggests_no_split_that_a_name_does_not(tmp_path, names, example):
    _tree(tmp_path, names)
    with pytest.raises(DataError) as caught:
        scan_folder(tmp_path)
    assert f"data.folders: {example}; dlfer init" in str(caught.value)


def test_a_class_may_be_called_like_a_split(tmp_path):
    for name in ("train", "car", "bus"):
        _write(tmp_path / name / "0.png")
    with pytest.raises(DataError, match=r"If it is a class itself, set data\.folders: \{train: class\}"):
        scan_folder(tmp_path)
    found = scan_folder(tmp_path, {"train": "class"})
    assert sorted({file.class_name for file in found["train"]}) == ["bus", "car", "train"]


def test_a_folder_without_classes_is_not_said_to_be_ignored(tmp_path):
    _write(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("file,label\n0.png,happy\n")
    with pytest.raises(DataError, match="A list of labels beside images is not read") as caught:
        scan_folder(tmp_path)
    assert "ignore" not in str(caught.value)


def test_a_turned_picture_whose_header_does_not_say_so_is_fitted(tmp_path):
    """In a PNG the EXIF data may stand behind the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for label in ("happy", "sad"):
        (tmp_path / label).mkdir()
        Image.fromarray(pixels).save(tmp_path / label / "1.png")
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    data = (tmp_path / "turned.png").read_bytes()
    begin = data.find(b"eXIf") - 4
    end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
    tail = data.find(b"IEND") - 4
    (tmp_path / "happy" / "2.png").write_bytes(data[:begin] + data[end:tail] + data[begin:end] + data[tail:])
    (tmp_path / "turned.png").unlink()
    found = load_folder(DataConfig(source="folder", path=str(tmp_path)), image_size=20)
    assert found.train.images.shape == (3, 20, 30, 1)
