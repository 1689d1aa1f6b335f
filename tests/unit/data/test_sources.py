"""From a data section to splits: the table of sources, limits, checks, and stand-ins for absent files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from dlfer.config import names
from dlfer.config.schema import StageConfig
from dlfer.config.sections import DataConfig, LabelsConfig, NumImages
from dlfer.data import sources
from dlfer.data.bundle import DataBundle
from dlfer.data.sources import SOURCES, is_present, load_arrays, load_data, replace_by_synthetic
from dlfer.data.starter import write_starter
from dlfer.errors import DataError, MissingDataError, ProtocolError
from dlfer.experiment.audit import inspect_data


def _write_npz(path, *, counts=(40, 20, 20), shape=(10, 10), **arrays) -> DataConfig:
    """Write three parts whose targets take turns among four classes; return their data section."""
    rng = np.random.default_rng(0)
    for part, count in zip(("train", "validation", "test"), counts, strict=True):
        if count:
            arrays.setdefault(f"{part}_images", rng.integers(0, 256, (count, *shape), dtype=np.uint8))
            arrays.setdefault(f"{part}_targets", np.arange(count) % 4)
    np.savez(path, **arrays)
    return DataConfig(source="arrays", path=str(path))


def _with(config: DataConfig, **keys) -> DataConfig:
    return DataConfig(**{**dict(config), **keys})


def test_the_table_is_the_names_of_the_schema():
    assert tuple(SOURCES) == names.SOURCES
    assert all(spec.summary and spec.needs for spec in SOURCES.values())


def test_importing_the_table_loads_neither_tensorflow_nor_keras():
    code = "import sys, dlfer.data.sources; print({'tensorflow', 'keras', 'scipy', 'sklearn'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_limits_apply_to_the_parts_before_they_are_split(tmp_path):
    config = _write_npz(tmp_path / "a.npz")
    limits = NumImages(train=12, validation=8)
    found = load_data(_with(config, num_images=limits), image_size=32)
    assert [len(found.train), len(found.validation), len(found.test)] == [12, 8, 20]
    assert np.bincount(found.train.targets).tolist() == [3, 3, 3, 3]
    found = load_data(_with(config, num_images=limits, protocol="resplit"), image_size=32)
    assert len(found.train) + len(found.validation) + len(found.test) == 40


def test_labels_size_and_protocol_are_applied(tmp_path):
    config = _write_npz(tmp_path / "a.npz", labels=np.array(["happiness", "sad", "calm", "anger"]))
    labels = LabelsConfig(drop=("calm",))
    found = load_data(_with(config, labels=labels, size=16, select_on=0.5), image_size=32)
    assert found.labels == ("Happy", "Sad", "Angry")
    assert found.train.images.shape[1:] == (16, 16, 1)
    assert len(found.train) + len(found.validation) == 30
    assert found.selected_on.startswith("0.5 of train")


def test_folders_drop_classes_once(tmp_path):
    for name in ("happy", "sad", "contempt"):
        for row in range(10):
            (tmp_path / name).mkdir(exist_ok=True)
            pixels = np.random.default_rng(row).integers(0, 256, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{row}.png")
    config = DataConfig(source="folder", path=str(tmp_path), labels=LabelsConfig(drop=("contempt",)))
    found = load_data(config, image_size=32)
    assert found.labels == ("Happy", "Sad")
    assert found.protocol == "resplit"
    assert any("no splits of its own" in note for note in found.notes)


def test_one_class_only_is_refused(tmp_path):
    for row in range(4):
        (tmp_path / "happy").mkdir(exist_ok=True)
        Image.new("L", (12, 12), row).save(tmp_path / "happy" / f"{row}.png")
    with pytest.raises(DataError, match=r"one class only \(happy\)"):
        load_data(DataConfig(source="folder", path=str(tmp_path)), image_size=32)


def test_a_class_that_train_lacks_is_refused_unless_train_was_cut_down(tmp_path):
    config = _write_npz(tmp_path / "a.npz", labels=np.array(["a", "b", "c", "d", "e"]))
    with pytest.raises(DataError, match=r"train has no image of e; .*drop: \[e\]"):
        load_data(config, image_size=32)
    found = load_data(_with(config, num_images=NumImages(train=3)), image_size=32)
    assert any("so these classes cannot be learned from it" in note for note in found.notes)


def test_a_class_that_validation_lacks_is_noted(tmp_path):
    config = _write_npz(tmp_path / "a.npz", validation_targets=np.arange(20) % 3)
    assert load_data(config, image_size=32).notes == (
        "validation has no image of 3, so this class cannot be evaluated on it.",
    )


def test_parts_of_different_sizes_are_refused_unless_resized(tmp_path):
    config = _write_npz(tmp_path / "a.npz", test_images=np.zeros((20, 12, 9), np.uint8))
    message = r"a\.npz: test has images of shape \(12, 9, 1\), train of \(10, 10, 1\); expected the same.*data\.size"
    for protocol in ("official", "resplit"):
        with pytest.raises(DataError, match=message):
            load_data(_with(config, protocol=protocol), image_size=32)
    for look in (write_starter, inspect_data):
        with pytest.raises(DataError, match=message):
            look(tmp_path / "a.npz")
    assert load_data(_with(config, size=10), image_size=32).test.images.shape[1:] == (10, 10, 1)


def test_a_streamed_source_takes_its_own_parts_only(monkeypatch):
    bundle = DataBundle("tfds", ("a", "b"), [], None, None)
    spec = sources.SourceSpec("", "", lambda config, image_size: bundle, own_labels=True)
    monkeypatch.setitem(SOURCES, "tfds", spec)
    config = DataConfig(source="tfds", name="cifar10")
    assert load_data(config, image_size=64) is bundle
    for keys in (
        {"protocol": "resplit"},
        {"select_on": 0.1},
        {"fraction": 0.5},
        {"size": 32},
        {"drop_duplicates": True},
        {"protocol": "paper", "split": "official_80_20"},
    ):
        with pytest.raises(ProtocolError, match=f"found {next(iter(keys))}.*streams these 0 images"):
            load_data(_with(config, **keys), image_size=64)
    with pytest.raises(ProtocolError, match="found balance: undersample"):
        load_data(config, image_size=64, balance="undersample")
    for balance in ("sampler", "class_weight", "augment"):
        load_data(config, image_size=64, balance=balance)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"name": "imagenet2012", "protocol": "resplit"}, "protocol: found protocol: resplit with source tfds"),
        ({"name": "imagenet2012:5.1.0", "fraction": 0.5}, "fraction: found fraction: 0.5 with source tfds"),
        ({"name": "cifar10", "crop": {"train": "random_resized"}, "select_on": 0.1}, "select_on: found select_on: 0.1"),
        ({"name": "cifar10", "crop": {"train": "random_resized"}, "size": 32}, "size: found size: 32"),
        ({"name": "cifar10", "skip_unreadable": True}, "skip_unreadable: found true"),
        ({"name": "cifar10", "votes": "a.csv", "soft_targets": "ferplus"}, "soft_targets: found ferplus"),
    ],
)
def test_what_a_stream_cannot_follow_is_refused_before_data_is_read(keys, text):
    with pytest.raises(ValidationError, match=text):
        DataConfig(source="tfds", **keys)
    if "imagenet" in keys["name"]:
        DataConfig(source="tfds", **keys, crop={"train": "none"})


@pytest.mark.parametrize("keys", [{"name": "imagenet2012"}, {"name": "cifar10", "crop": {"train": "random_resized"}}])
def test_what_is_streamed_is_not_undersampled(keys):
    data = {"source": "tfds", **keys}
    with pytest.raises(ValidationError, match="balance: found undersample with source tfds"):
        StageConfig(data=data, balance="undersample")
    for balance in ("sampler", "class_weight"):
        StageConfig(data=data, balance=balance)
    StageConfig(data={**data, "crop": {"train": "none"}}, balance="undersample")


def test_a_padding_crop_is_what_the_network_remembers():
    data = DataConfig(source="tfds", name="cifar10", crop={"train": "pad"})
    assert data.aspect == "pad"
    assert DataConfig(**data.model_dump()) == data
    assert DataConfig(source="tfds", name="cifar10", crop=data.crop).aspect == "pad"
    assert DataConfig(source="tfds", name="cifar10", crop={"train": "none"}).aspect == "crop"
    with pytest.raises(ValidationError, match=r"aspect: found crop with crop.train: pad"):
        DataConfig(source="tfds", name="cifar10", crop={"train": "pad"}, aspect="crop")


def test_the_crop_belongs_to_source_tfds():
    with pytest.raises(ValidationError, match="crop: only source tfds"):
        DataConfig(source="folder", path="x", crop={"train": "none"})


def test_variables_in_a_path_are_filled_in(tmp_path, monkeypatch):
    _write_npz(tmp_path / "a.npz")
    monkeypatch.setenv("DLFER_DATA", str(tmp_path))
    config = DataConfig(source="arrays", path="${DLFER_DATA}/a.npz")
    assert is_present(config)
    assert len(load_data(config, image_size=32).train) == 40


@pytest.mark.parametrize("source", ["fer2013", "folder", "arrays"])
def test_missing_data_says_where_and_what_to_do(tmp_path, source):
    config = DataConfig(source=source, path=str(tmp_path / "absent"))
    assert not is_present(config)
    with pytest.raises(MissingDataError, match=r"absent: .*data\.path"):
        load_data(config, image_size=32)


def test_presence_is_that_of_the_path(tmp_path):
    assert is_present(DataConfig(source="folder", path=str(tmp_path)))
    assert is_present(DataConfig(source="synthetic_faces"))
    assert not is_present(DataConfig(source="tfds", name="imagenet2012"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"source": "fer2013", "path": "data/fer2013.csv"}, "synthetic_faces"),
        ({"source": "folder", "path": "data/RAF-DB"}, "synthetic_faces"),
        ({"source": "folder", "path": "x", "labels": LabelsConfig(drop=("sadness",))}, "synthetic_faces"),
        ({"source": "folder", "path": "data/tiny_imagenet"}, "synthetic_scenes"),
        ({"source": "tfds", "name": "imagenet2012", "splits": {"train": "train"}}, "synthetic_scenes"),
    ],
)
def test_absent_files_are_replaced_by_faces_or_scenes(keys, expected):
    config, warning = replace_by_synthetic(DataConfig(**keys, num_images=NumImages(train=32), seed=3))
    assert (config.source, config.path, config.name, config.splits) == (expected, None, None, None)
    assert (config.num_images.train, config.seed) == (32, 3)
    assert keys.get("path", "imagenet2012") in warning


def test_a_stand_in_keeps_protocol_and_the_labels_that_faces_have():
    labels = LabelsConfig(aliases={"happiness": "Smile", "contempt": "Disgust"}, drop=("fear", "calm", "Smile"))
    config = DataConfig(source="fer2013", path="x", protocol="paper", split="after_balance", labels=labels)
    found, _ = replace_by_synthetic(config)
    assert (found.protocol, found.split) == ("paper", "after_balance")
    assert found.labels == LabelsConfig(aliases={"Happy": "Smile"}, drop=("Fear", "Smile"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"select_on": 0.2},
        {"protocol": "resplit"},
        {"protocol": "paper", "split": "official_80_20"},
        {"protocol": "paper", "split": "after_balance"},
    ],
)
def test_a_stand_in_loads_under_every_protocol_however_small(keys):
    counts = NumImages(train=32, validation=32, test=32)
    config, _ = replace_by_synthetic(DataConfig(source="fer2013", path="x", num_images=counts, **keys))
    found = load_data(config, image_size=48, balance="augment")
    assert found.labels == names.FER2013_LABELS
    assert min(len(found.train), len(found.validation), len(found.test)) > 0


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
    "lengths": (
        {"images": IMAGES[:5], "targets": TARGETS},
        "images has 5 entries, targets has 6; expected the same number",
    ),
    "lengths of ids": (
        {"images": IMAGES, "targets": TARGETS, "ids": np.array(list("abc"))},
        "images has 6 entries, ids has 3; expected the same number",
    ),
    "no side": (
        {"images": IMAGES[:, :0], "targets": TARGETS},
        r"images is uint8 \(6, 0, 10\), expected at least 8 pixels",
    ),
    "small": ({"images": IMAGES[:, :7], "targets": TARGETS}, r"\(6, 7, 10\), expected at least 8 pixels on each side"),
    "channels first": ({"images": np.zeros((6, 3, 10, 10), np.uint8), "targets": TARGETS}, "1 or 3"),
    "negative": ({"images": IMAGES, "targets": TARGETS - 1}, "targets has the negative target -1, expected"),
    "beyond int64": (
        {"images": IMAGES, "targets": TARGETS.astype(np.uint64) + np.uint64(2**63)},
        "targets has the target 9,223,372,036,854,775,810, expected",
    ),
    "empty label": (
        {"images": IMAGES, "targets": TARGETS, "labels": np.array(["a", " ", "b"])},
        "target 1 .* is empty",
    ),
    "few labels": ({"images": IMAGES, "targets": TARGETS, "labels": np.array(["a", "b"])}, "at least 3"),
    "same labels": ({"images": IMAGES, "targets": TARGETS, "labels": np.array(["a", "b", "a"])}, "distinct"),
    "same ids": (
        {"images": IMAGES, "targets": TARGETS, "ids": np.array(["a"] * 6)},
        "the id 'a' occurs more than once",
    ),
    "number ids": ({"images": IMAGES, "targets": TARGETS, "ids": TARGETS}, "expected text"),
    "empty": ({"images": IMAGES[:0], "targets": TARGETS[:0]}, "is empty"),
    "both": ({"images": IMAGES, "targets": TARGETS, "train_images": IMAGES}, "both images and"),
    "no classes": (
        {"images": IMAGES, "targets": TARGETS + 2**40},
        "largest target is 1,099,511,627,778, and there is no",
    ),
    "other split": (
        {"train_images": IMAGES, "train_targets": TARGETS, "val_images": IMAGES, "val_targets": TARGETS},
        "found val_images, expected .* validation_images, .*Rename the array, and val_targets with it",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind):
    arrays, message = WRONG[kind]
    with pytest.raises(DataError, match=message) as caught:
        _load(tmp_path / "a.npz", **arrays)
    assert str(caught.value).startswith(str(tmp_path / "a.npz"))


def test_arrays_that_are_not_read_are_named(tmp_path):
    bundle = _load(tmp_path / "a.npz", images=IMAGES, targets=TARGETS, filenames=TARGETS)
    assert bundle.notes == ("a.npz: not read: 1 array (filenames).",)


def test_too_few_images_to_be_split_are_refused_with_what_to_do(tmp_path):
    config = _write_npz(tmp_path / "a.npz", counts=(4, 0, 0), train_targets=np.array([0, 0, 1, 1]))
    with pytest.raises(DataError, match=r"validation has no images.*have five different images or more of each"):
        load_data(config, image_size=32)


def test_files_that_are_no_npz_are_refused(tmp_path):
    with pytest.raises(MissingDataError, match="no such file"):
        _load(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(DataError, match="cannot be read"):
        _load(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", IMAGES)
    with pytest.raises(DataError, match=r"\.npy"):
        _load(tmp_path / "a.npy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "folders", "expected"),
    [
        ({"source": "tfds", "name": "imagenet2012"}, (), ("synthetic_scenes", 1000)),
        ({"source": "tfds", "name": "imagenet2012:5.1.0"}, (), ("synthetic_scenes", 1000)),
        ({"source": "tfds", "name": "cifar100"}, (), ("synthetic_scenes", 100)),
        ({"source": "tfds", "name": "imagenette/160px"}, (), ("synthetic_scenes", 10)),
        ({"source": "tfds", "name": "fer2013"}, (), ("synthetic_scenes", 7)),
        ({"source": "tfds", "name": "no_such_set"}, (), ("synthetic_scenes", None)),
        ({"source": "folder"}, ("Train/a", "Train/b", "Train/c", "Test/a"), ("synthetic_scenes", 3)),
        ({"source": "folder"}, ("test_set/a", "test_set/b", "test_set/c"), ("synthetic_scenes", 3)),
        ({"source": "folder"}, ("images/train/a", "images/train/b", "images/val/c"), ("synthetic_scenes", 3)),
        ({"source": "folder"}, ("a", "b", "c", "__MACOSX"), ("synthetic_scenes", 3)),
        (
            {"source": "folder", "folders": {"one": "train", "two": "test", "old": "ignore"}},
            ("one/a", "one/b", "one/c", "two/a", "old/d"),
            ("synthetic_scenes", 3),
        ),
        ({"source": "tfds", "name": "image_folder"}, ("TRAIN/a", "TRAIN/b", "TRAIN/c"), ("synthetic_scenes", 3)),
        ({"source": "folder"}, ("a", "b", "c"), ("synthetic_scenes", 3)),
        ({"source": "folder"}, ("train/a", "train/b", "validation/a"), ("synthetic_scenes", 2)),
        ({"source": "folder", "labels": LabelsConfig(drop=("c",))}, ("a", "b", "c"), ("synthetic_scenes", 2)),
        ({"source": "folder"}, (), ("synthetic_scenes", None)),
        ({"source": "folder", "labels": LabelsConfig(aliases={"joy": "Happy"})}, (), ("synthetic_faces", None)),
        ({"source": "tfds", "name": "image_folder"}, ("train/a", "train/b"), ("synthetic_scenes", 2)),
        ({"source": "arrays"}, (), ("synthetic_scenes", None)),
    ],
)
def test_a_stand_in_has_as_many_labels_as_the_data(tmp_path, keys, folders, expected):
    for folder in folders:
        (tmp_path / "x" / folder).mkdir(parents=True)
    path = {} if keys.get("name", "image_folder") != "image_folder" else {"path": str(tmp_path / "x")}
    found, _ = replace_by_synthetic(DataConfig(**keys, **path, num_images=NumImages(train=32, validation=32)))
    assert (found.source, found.num_labels) == expected
    assert len(load_data(found, image_size=48).labels) == (expected[1] or len(load_data(found, image_size=48).labels))


def test_numbers_are_never_mended_by_dropping_a_class(tmp_path):
    names = np.array(["Angry", "Disgust", "Fear", "Happy", "Sad"])
    counted_from_one = {f"{part}_targets": np.arange(n) % 4 + 1 for part, n in (("train", 40), ("validation", 20))}
    config = _write_npz(tmp_path / "a.npz", labels=names, counts=(40, 20, 0), **counted_from_one)
    with pytest.raises(
        DataError, match=r"no image of Angry.*0 Angry, 1 Disgust.*counted from 1.*write the numbers again"
    ):
        load_data(config, image_size=32)


def test_what_is_drawn_and_dropped_is_counted(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 10, 10), np.uint8)
    shared = {"train_images": images, "validation_images": images[:20], "train_targets": np.arange(40) % 4}
    config = _write_npz(tmp_path / "a.npz", counts=(40, 20, 20), **shared)
    keys = {"num_images": NumImages(test=8), "drop_duplicates": True, "labels": LabelsConfig(drop=("3",))}
    reading = load_data(_with(config, **keys), image_size=32).reading.as_record()
    assert {reason.reason: reason.n for reason in reading.left_out} == {
        "of classes in data.labels.drop": 20, "not drawn (data.num_images)": 7, "duplicates in train (data.drop_duplicates)": 15
    }  # fmt: skip
    assert (reading.what, reading.seen, reading.used) == ("images", 80, 38)


@pytest.mark.parametrize(("keys", "left_out"), [({"protocol": "resplit"}, 0), ({"select_on": 0.25}, 20)])
def test_images_whose_ids_recur_among_the_splits_are_counted_once_each(tmp_path, keys, left_out):
    ids = {f"{part}_ids": np.array([f"im{i}" for i in range(n)]) for part, n in [("train", 40), ("validation", 20)]}
    config = _with(_write_npz(tmp_path / "a.npz", test_ids=ids["validation_ids"], **ids), **keys)
    reading = load_data(config, image_size=32).reading.as_record()
    assert sum(reason.n for reason in reading.left_out) == left_out
    assert (reading.seen, reading.used) == (80, 80 - left_out)


def test_a_part_that_the_protocol_leaves_aside_is_counted(tmp_path):
    config = _with(_write_npz(tmp_path / "a.npz"), select_on=0.25)
    bundle = load_data(config, image_size=32)
    reading = bundle.reading.as_record()
    assert {reason.reason: reason.n for reason in reading.left_out} == {"not used by the protocol": 20}
    assert reading.used == sum(len(split) for split in bundle.splits.values()) == 60
