"""Streams of tensorflow_datasets and class folders, on a tiny data set that is made here."""

from __future__ import annotations

import dataclasses
import io
import os

import numpy as np
import pytest
from PIL import Image

from dlfer.config.schema import StageConfig
from dlfer.config.sections import DataConfig
from dlfer.data import tfds_read, tfds_stream
from dlfer.data.bundle import Split
from dlfer.data.folder import load_folder
from dlfer.data.pipeline import count_steps, find_class_weights, iterate_epoch
from dlfer.data.sources import load_data
from dlfer.data.tfds_stream import load_tfds, read_split
from dlfer.errors import ConfigError, DataError, MissingDataError, ProtocolError

NAMES = ("cat", "dog", "owl")
SIZES = ((40, 60), (64, 64), (90, 50), (12, 9))
TRAIN, VALIDATION = 50, 11
SIDE = 24


def draw(index):
    """Return a smooth image, uint8 [H, W, 3], with red for the column, green for the row, blue for the class."""
    height, width = SIZES[index % len(SIZES)]
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([255 * columns / width, 255 * rows / height, np.full(rows.shape, 40 + 80 * (index % 3))], axis=-1)
    return np.round(pixels).astype(np.uint8)


def encode(index):
    """Return the image as the bytes of a JPEG, sometimes of a PNG; every fifth is grey."""
    image = Image.fromarray(draw(index))
    buffer = io.BytesIO()
    if index % 5 == 0:
        image = image.convert("L")
    image.save(buffer, "PNG" if index % 7 == 3 else "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The folder of a prepared data set "tiny_pets" with four record files a split."""
    import tensorflow_datasets as tfds

    class TinyPets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        MODULE_NAME = "tests"

        def _info(self):
            features = {
                "picture": tfds.features.Image(),
                "note": tfds.features.Text(),
                "kind": tfds.features.ClassLabel(names=NAMES),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, TRAIN),
                "validation": self._generate_examples(100, VALIDATION),
                "unlabelled": self._generate_examples(200, 4),
            }

        def _generate_examples(self, start, count):
            for index in range(start, start + count):
                label = -1 if start == 200 else index % 3
                yield index, {"picture": io.BytesIO(encode(index)), "note": str(index), "kind": label}

    folder = tmp_path_factory.mktemp("tfds")
    config = tfds.download.DownloadConfig(try_download_gcs=False, num_shards=4)
    TinyPets(data_dir=str(folder)).download_and_prepare(download_config=config)
    return folder


@pytest.fixture
def images(tmp_path):
    """Class folders with nested names, PNG and JPEG: train 18, val 6."""
    for split, count in (("train", 18), ("val", 6)):
        for index in range(count):
            data = encode(index)
            suffix = "png" if data.startswith(b"\x89PNG") else "JPEG"
            path = tmp_path / split / NAMES[index % 3] / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return tmp_path


def load(path, name="tiny_pets", **keys):
    return load_tfds(DataConfig(source="tfds", name=name, path=str(path), **keys), SIDE)


@pytest.fixture(params=["records", "images"])
def train(request):
    """The train split of either kind of source."""
    path = request.getfixturevalue(request.param)
    return load(path, "tiny_pets" if request.param == "records" else "image_folder").train


def read(split, batch_size=8, *, seed=3, epoch=0, training=True, **keys):
    return list(split.batches(batch_size, seed=seed, epoch=epoch, training=training, **keys))


def assert_equal(left, right):
    assert len(left) == len(right)
    for first, second in zip(left, right, strict=True):
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def ids_of(batches):
    return np.concatenate([ids for _, _, ids in batches]).tolist()


def test_batches_are_as_the_protocol_says(train):
    images, targets, ids = read(train)[0]
    assert (images.dtype, images.shape) == (np.uint8, (8, SIDE, SIDE, 3))
    assert (targets.dtype, targets.shape) == (np.int64, (8,))
    assert ids.dtype.kind == "U"
    assert len(train) == train.num_images
    assert train.image_size == SIDE


def test_seed_and_epoch_fix_the_batches_whatever_the_global_seed(train):
    import tensorflow as tf

    tf.random.set_seed(1)
    first = read(train, seed=3, epoch=2)
    tf.random.set_seed(2)
    assert_equal(first, read(train, seed=3, epoch=2))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 4}])
def test_another_epoch_or_seed_gives_another_order(train, change):
    first, second = ids_of(read(train, 1)), ids_of(read(train, 1, **change))
    assert sorted(first) == sorted(second)
    assert sum(a == b for a, b in zip(first, second, strict=True)) < len(first) // 3


@pytest.mark.parametrize("training", [True, False])
def test_an_epoch_entered_in_the_middle_goes_on_bit_for_bit(train, training):
    whole = read(train, 4, epoch=5, training=training)
    for start in (1, len(whole) - 1, len(whole)):
        assert_equal(whole[start:], read(train, 4, epoch=5, start_step=start, training=training))


def test_training_drops_the_incomplete_batch_and_evaluation_nothing(train):
    num = len(train)
    assert [len(targets) for _, targets, _ in read(train, 8)] == [8] * (num // 8)
    ids = ids_of(read(train, 8, training=False))
    assert len(ids) == len(set(ids)) == num
    assert len(read(train, num + 1)[0][1]) == num


def test_evaluation_does_not_depend_on_seed_or_epoch(train):
    assert_equal(read(train, training=False), read(train, seed=9, epoch=9, training=False))


def test_batches_are_read_without_autotuning_which_would_delay_the_end_of_an_epoch(train, monkeypatch):
    import tensorflow as tf

    seen, original = [], tf.data.Dataset.as_numpy_iterator
    monkeypatch.setattr(
        tf.data.Dataset, "as_numpy_iterator", lambda each: (seen.append(each.options()), original(each))[1]
    )
    for training in (True, False):
        next(iter(train.batches(8, seed=1, epoch=0, training=training)))
    assert [options.autotune.enabled for options in seen] == [False, False]


def test_a_small_buffer_still_mixes_the_record_files(records, monkeypatch):
    monkeypatch.setattr(tfds_read, "SHUFFLE_BUFFER", 4)
    split = load(records).train
    orders = [ids_of(read(split, 1, epoch=epoch)) for epoch in range(6)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({order[0].split("__")[0] for order in orders}) > 1


def test_targets_and_labels_belong_to_the_images(records, images):
    bundle = load(records)
    assert bundle.labels == NAMES
    for split, num_grey in ((bundle.train, 10), (bundle.validation, 3)):
        pixels, targets, _ = (np.concatenate(column) for column in zip(*read(split, training=False), strict=True))
        coloured = np.ptp(pixels.astype(int), axis=-1).max(axis=(1, 2)) > 8
        assert np.count_nonzero(~coloured) == num_grey
        blue = np.median(pixels[coloured, :, :, 2], axis=(1, 2))
        np.testing.assert_array_equal(np.round((blue - 40) / 80), targets[coloured])
    split = load(images, "image_folder").train
    for _, targets, ids in read(split):
        assert [NAMES[target] for target in targets] == [name.split("/")[1] for name in ids]


def test_the_central_crop_agrees_with_pillow(images):
    split = load(images, "image_folder").train
    found = {name: image for pixels, _, ids in read(split, training=False) for image, name in zip(pixels, ids)}  # noqa: B905
    for name, image in found.items():
        original = Image.open(images / name).convert("RGB")
        side = max(1, round(0.875 * min(original.size)))
        left, top = ((length - side) // 2 for length in original.size)
        expected = original.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        difference = np.abs(image.astype(int) - np.asarray(expected, int))
        # Of JPEGs the decoders differ by a few levels.
        assert np.median(difference) <= 2, name
        assert np.percentile(difference, 95) <= (2 if name.endswith("png") else 12), name


def test_random_crops_keep_scale_and_aspect(tmp_path):
    rows, columns = np.mgrid[:128, :128]
    pixels = np.stack([columns * 2, rows * 2, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    for key in ("train", "val"):
        for name in NAMES[:2]:
            (tmp_path / key / name).mkdir(parents=True)
            for index in range(30):
                Image.fromarray(pixels).save(tmp_path / key / name / f"{index}.png")
    split = load(tmp_path, "image_folder", crop={"train": "random_resized"}).train
    crops = np.concatenate([images for images, _, _ in read(split, 20)]).astype(float)
    # Pixel centres: from the first to the last output column there are (S - 1) / S of the crop.
    widths = (crops[:, 12, -1, 0] - crops[:, 12, 0, 0]) / 2 * SIDE / (SIDE - 1)
    heights = (crops[:, -1, 12, 1] - crops[:, 0, 12, 1]) / 2 * SIDE / (SIDE - 1)
    areas, aspects = widths * heights / 128**2, widths / heights
    assert areas.min() > 0.22
    assert areas.max() < 1.03
    assert areas.max() - areas.min() > 0.4
    assert aspects.min() > 0.70
    assert aspects.max() < 1.42
    assert aspects.std() > 0.05
    assert len(np.unique(widths.round())) > 10
    again = np.concatenate([images for images, _, _ in read(split, 20, epoch=1)])
    assert not np.array_equal(np.sort(crops[:, 12, 0, 0]), np.sort(again[:, 12, 0, 0].astype(float)))


def test_grey_images_get_three_equal_channels(images):
    split = load(images, "image_folder").train
    for pixels, _, ids in read(split, training=False):
        for image, name in zip(pixels, ids, strict=True):
            index = int(name.split("/")[-1].split(".")[0])
            assert (np.ptp(image.astype(int), axis=-1).max() == 0) == (index % 5 == 0)


def test_an_unreadable_image_is_named_and_is_not_touched_when_skipped(images):
    split = load(images, "image_folder").train
    name = ids_of(read(split, 4, training=False))[1]
    path = images / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"{name} cannot be decoded"):
        read(split, 4, training=False)
    assert len(read(split, 4, training=False, start_step=1)) == 4
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read(split, 4, training=False)


def test_num_images_and_slices_limit_the_parts(records, images):
    bundle = load(records, num_images={"train": 20}, splits={"train": "train[10%:]"})
    everything = ids_of(read(load(records).train, training=False))
    assert ids_of(read(bundle.train, training=False)) == everything[5:25]
    assert sorted(ids_of(read(bundle.train, 1))) == sorted(everything[5:25])
    assert any("first 20 of 45" in note for note in bundle.notes)
    drawn = load(images, "image_folder", num_images={"train": 6}).train
    assert np.bincount(read(drawn, 6)[0][1]).tolist() == [2, 2, 2]


def test_class_folders_have_no_slices(images):
    with pytest.raises(DataError, match=r"found 'train\[:50%\]', expected a folder of .* class folders have no slices"):
        load(images, "image_folder", splits={"train": "train[:50%]", "validation": "train[50%:]"})


def test_files_of_a_streamed_folder_are_read_as_those_in_memory(tmp_path):
    """Upright, transparency over white, by any name."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 20, 3), np.uint8)
    alpha = np.dstack([pixels, rng.integers(0, 2, (20, 20), np.uint8) * 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(pixels[..., 0])
    for split in ("train", "val"):
        for label in ("chats", "zèbres"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            Image.fromarray(pixels).save(folder / "Zoë.jpg", quality=95)
            Image.fromarray(pixels).save(folder / "turned.jpg", quality=95, exif=exif)
            Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
            Image.fromarray(alpha).save(folder / "alpha.png")
            grey.save(folder / "through.png", transparency=int(pixels[0, 0, 0]))
            grey.save(folder / "a.gif")
            grey.save(folder / "a.bmp")
            (folder / os.fsdecode(b"caf\xe9.png")).write_bytes((folder / "alpha.png").read_bytes())
    split = load_tfds(
        DataConfig(
            source="tfds", name="image_folder", path=str(tmp_path), crop={"train": "none", "validation": "none"}
        ),
        20,
    ).train
    kept = load_folder(DataConfig(source="folder", path=str(tmp_path)), image_size=20).train
    expected = dict(zip(kept.ids.tolist(), kept.images, strict=True))
    assert len(split) == 16
    for image, name in zip(split.images, split.ids.tolist(), strict=True):
        # Two decoders of JPEG differ in how they enlarge the chroma.
        assert np.abs(image.astype(int) - expected[name]).mean() < (3 if name.endswith(".jpg") else 0.01), name


def test_a_part_made_of_two_slices_has_each_image_once(records):
    split = load(records, splits={"train": "train[:7]+train[40:]"}).train
    ids = ids_of(read(split, 4, training=False))
    assert len(ids) == len(set(ids)) == 17


@pytest.mark.parametrize("name", ["tiny_pets", "image_folder"])
def test_parts_that_share_images_are_refused(request, name):
    path = request.getfixturevalue("records" if name == "tiny_pets" else "images")
    with pytest.raises(ProtocolError, match="train and validation both hold"):
        load(path, name, splits={"train": "train", "validation": "train[90%:]" if name == "tiny_pets" else "train"})


def test_aliases_rename_and_merge_classes(records, images):
    aliases = {"aliases": {"cat": "mammal", "dog": "mammal"}}
    bundle = load(records, labels=aliases)
    assert bundle.labels == ("mammal", "owl")
    targets = np.concatenate([targets for _, targets, _ in read(bundle.train, training=False)])
    assert np.bincount(targets).tolist() == [34, 16]
    assert load(images, "image_folder", labels=aliases).labels == ("mammal", "owl")


def test_drop_leaves_out_class_folders_and_is_refused_for_records(records, images):
    bundle = load(images, "image_folder", labels={"drop": ("dog",)})
    assert bundle.labels == ("cat", "owl")
    assert len(bundle.train) == 12
    assert not any("/dog/" in name for name in ids_of(read(bundle.train, 1)))
    with pytest.raises(DataError, match=r"data\.labels\.drop.*image_folder"):
        load(records, labels={"drop": ("dog",)})


def test_an_unlabelled_part_is_refused_when_read(records):
    with pytest.raises(DataError, match="has no label"):
        load(records, splits={"test": "unlabelled"})


def test_a_test_part_is_held_in_memory(records):
    test = load(records, splits={"train": "train[:40]", "test": "train[40:]"}).test
    assert isinstance(test, Split)
    assert test.images.shape == (10, SIDE, SIDE, 3)


def test_read_split_gives_what_streaming_gives_or_goes_on_streaming(records, monkeypatch):
    split = load(records).validation
    whole = read_split(split)
    streamed = read(split, 4, training=False)
    assert_equal([(whole.images, whole.targets, whole.ids)], [[np.concatenate(c) for c in zip(*streamed, strict=True)]])
    monkeypatch.setattr(tfds_stream, "MAX_SPLIT_BYTES", VALIDATION * SIDE * SIDE * 3)
    assert read_split(split) is split
    with pytest.raises(DataError, match=r"data\.num_images\.test"):
        load(records, splits={"test": "train[:20]", "train": "train[20:]"})


def test_errors_say_what_there_is(records, images, tmp_path):
    with pytest.raises(DataError, match=r"'trian', expected a split of tiny_pets \(train, validation, unlabelled\)"):
        load(records, splits={"train": "trian"})
    with pytest.raises(DataError, match="Did you mean cifar10"):
        load(tmp_path, "cifar01")
    for name in ("mnist/foo", "a/b/c", "mnist:99.0.0"):
        with pytest.raises(DataError, match=f"no such form of '{name}'|knows no data set '{name}'"):
            load(tmp_path, name)
    with pytest.raises(MissingDataError, match="there is no such folder"):
        load(tmp_path / "nowhere", "image_folder")
    (images / "val").rename(images / ".val")
    with pytest.raises(DataError, match="none that is plainly validation"):
        load(images, "image_folder")


def test_imagenet_is_checked_before_anything_starts(tmp_path):
    with pytest.raises(MissingDataError, match=r"ILSVRC2012_img_train\.tar"):
        load(tmp_path, "imagenet2012:5.1.0")


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
def test_hosts_share_the_images_without_overlap(train, count, training):
    """Also where they do not divide; the shares differ by one image at most."""
    shares = [train.shard(index, count) for index in range(count)]
    ids = [ids_of(read(share, 1, training=training)) for share in shares]
    assert [len(split) for split in ids] == [len(share) for share in shares]
    assert max(map(len, ids)) - min(map(len, ids)) <= 1
    assert sorted(np.concatenate(ids).tolist()) == sorted(ids_of(read(train, 1)))


def test_a_share_goes_on_in_the_middle(train):
    share = train.shard(1, 3)
    assert_equal(read(share, 2)[1:], read(share, 2, start_step=1))


def test_shares_of_files_are_together_the_batches_of_one_host(images):
    """The same images and the same crops: two hosts train as one does."""
    train = load(images, "image_folder").train
    whole = read(train, 8)
    for step, (first, second) in enumerate(zip(read(train.shard(0, 2), 4), read(train.shard(1, 2), 4), strict=True)):
        for values, one, two in zip(whole[step], first, second, strict=True):
            np.testing.assert_array_equal(values[0::2], one)
            np.testing.assert_array_equal(values[1::2], two)


def test_ranges_are_cut_across_parts():
    slices = [("a", 10, 20), ("b", 0, 5)]
    assert tfds_read.cut_slices(slices, 0, 15) == slices
    assert tfds_read.cut_slices(slices, 8, 12) == [("a", 18, 20), ("b", 0, 2)]
    assert tfds_read.cut_slices(slices, 0, 3) == [("a", 10, 13)]


def write_squares(root, *, splits=("train", "val"), side=48, count=10, classes=NAMES[:2]):
    """Class folders of square images that differ; the border is white, so that a crop is seen."""
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for index in range(count * (label + 1)):
                pixels = np.full((side, side, 3), 255, np.uint8)
                edge = side // 24
                # Coarse patterns, of which no two are alike.
                cells = np.random.default_rng([number, label, index]).integers(0, 150, (8, 8, 3))
                inside = np.repeat(np.repeat(cells, side // 8, axis=0), side // 8, axis=1)
                pixels[edge:-edge, edge:-edge] = inside[edge:-edge, edge:-edge]
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    "keys",
    [{"protocol": "resplit"}, {"fraction": 0.5}, {"select_on": 0.2}, {"size": 40}, {"faces": {"equalize": "clahe"}}],
)
def test_what_needs_images_in_memory_is_given_whole_ones(tmp_path, keys):
    root = write_squares(tmp_path / "pets", side=160)
    config = DataConfig(source="tfds", name="image_folder", path=str(root), **keys)
    bundle = load_data(config, image_size=SIDE)
    assert all(isinstance(split, Split) for split in bundle.splits.values())
    assert any(f"{next(iter(keys))}" in note and "needs them in memory" in note for note in bundle.notes)
    side = keys.get("size", SIDE)
    assert bundle.train.images.shape[1:] == (side, side, 3)


def test_what_needs_more_memory_than_there_is_is_refused_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_stream, "MAX_SPLIT_BYTES", 0)
    config = DataConfig(
        source="tfds", name="image_folder", path=str(write_squares(tmp_path / "pets")), protocol="resplit"
    )
    with pytest.raises(ProtocolError, match=r"found protocol: resplit.*streams these 60 images"):
        load_data(config, image_size=SIDE)


def shows_the_border(images):
    return bool((images[:, 0].min(axis=(1, 2)) > 200).all() and (images[:, :, -1].min(axis=(1, 2)) > 200).all())


@pytest.mark.parametrize(
    ("side", "classes", "folder", "reason"),
    [
        (48, NAMES[:2], "pets", "squares of 48 pixels"),
        (160, NAMES[:2], "my_faces", "show faces"),
        (160, ("happy", "sad"), "pets", "show faces"),
        (160, NAMES[:2], "pets", "large or differ"),
        (160, NAMES[:2], "giraffe-surfaces", "large or differ"),
    ],
)
def test_the_crop_is_chosen_by_what_the_set_is(tmp_path, side, classes, folder, reason):
    bundle = load(write_squares(tmp_path / folder, side=side, classes=classes), "image_folder")
    assert any(reason in note for note in bundle.notes)
    is_cropped = "large" in reason
    assert isinstance(bundle.train, Split) != is_cropped
    if not is_cropped:
        assert shows_the_border(bundle.train.images)
        assert shows_the_border(bundle.validation.images)
        assert len(bundle.train) == 30
    else:
        assert not shows_the_border(read(bundle.validation, training=False)[0][0])


@pytest.mark.parametrize(("train", "validation", "cropped"), [
    ("none", None, (False, False)), ("none", "center", (False, True)), ("pad", None, (False, False)),
    ("random_resized", None, (True, True)), ("random_resized", "none", (True, False)),
])  # fmt: skip
def test_each_crop_that_is_set(tmp_path, monkeypatch, train, validation, cropped):
    monkeypatch.setattr(tfds_stream, "MAX_SPLIT_BYTES", 0)
    bundle = load(write_squares(tmp_path), "image_folder", crop={"train": train, "validation": validation})
    seen = read(bundle.train, 30)[0][0], read(bundle.validation, 30, training=False)[0][0]
    assert tuple(not shows_the_border(images) for images in seen) == cropped


def test_pad_shows_the_whole_of_an_image_that_is_not_square(records):
    bundle = load(records, crop={"train": "pad"})
    assert isinstance(bundle.train, Split)
    # 40 x 60 pixels of a ramp from 0 to 255 in red: both ends of the longer side are seen.
    ramps = [np.ptp(image[SIDE // 2, :, 0].astype(int)) for image in bundle.train.images]
    assert max(ramps) > 225


def test_the_own_test_part_judges_and_selects_nothing(tmp_path):
    bundle = load(write_squares(tmp_path / "a", splits=("train", "val", "test")), "image_folder")
    assert bundle.test.name == "test"
    assert {name.split("/")[0] for name in bundle.test.ids} == {"test"}
    bundle = load(write_squares(tmp_path / "b", splits=("train", "test")), "image_folder")
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (27, 3, 30)
    assert not set(bundle.train.ids) & set(bundle.validation.ids)
    assert set(bundle.validation.targets) == {0, 1}
    assert {name.split("/")[0] for name in bundle.test.ids} == {"test"}
    assert "held" not in bundle.selected_on
    assert any("no validation split" in note for note in bundle.notes)
    used = load(tmp_path / "b", "image_folder", splits={"validation": "test"})
    assert used.test is None


def test_a_test_part_too_large_for_memory_is_told(tmp_path, monkeypatch):
    write_squares(tmp_path, splits=("train", "val", "test"))
    monkeypatch.setattr(tfds_stream, "MAX_SPLIT_BYTES", 0)
    bundle = load(tmp_path, "image_folder")
    assert bundle.test is None
    assert any("test (test) is not evaluated" in note for note in bundle.notes)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sampler", "augment"])
def test_a_stream_is_balanced_by_repetition(train, how):
    counts = train.count_classes()
    skewed = dataclasses.replace(
        train, lookup=np.minimum(train.lookup, 1), count=lambda: np.array([counts[0], counts[1:].sum()])
    )
    assert (skewed.count_classes() > 0).all()
    balanced = skewed.balance(how)
    batches = read(balanced, 1)
    targets = np.concatenate([targets for _, targets, _ in batches])
    largest = counts[1:].sum()
    assert np.ptp(np.bincount(targets)) <= 1
    assert len(targets) == len(balanced) == (len(train) if how == "sampler" else 2 * largest)
    if how == "augment":
        assert len(set(ids_of(batches))) == len(train)
    assert_equal(batches, read(balanced, 1))
    assert_equal(batches[5:], read(balanced, 1, start_step=5))
    assert ids_of(batches) != ids_of(read(balanced, 1, epoch=1))
    with pytest.raises(ConfigError, match="hosts cannot share"):
        balanced.shard(0, 2)
    with pytest.raises(ConfigError, match="undersample"):
        train.balance("undersample")


def test_class_weights_of_a_stream_are_those_of_its_counts(records):
    config = StageConfig(
        data=DataConfig(source="tfds", name="tiny_pets"), balance="class_weight", image_size=32, batch_size=8
    )
    split = load(records).train
    assert split.count_classes().tolist() == [17, 17, 16]
    np.testing.assert_allclose(find_class_weights(split, config, 3), 50 / 3 / np.array([17, 17, 16]), rtol=1e-6)
    sampler = config.model_copy(update={"balance": "sampler"})
    assert count_steps(split, sampler) == 6
    batches = list(iterate_epoch(split, sampler, num_labels=3, seed=0, epoch=0))
    assert len(batches) == 6


def _count(bundle):
    record = bundle.reading.as_record()
    return record.what, record.seen, record.used, {reason.reason: reason.n for reason in record.left_out}


def test_every_record_is_counted_and_those_left_out_by_reason(records):
    unused = "in splits that are not used (data.splits)"
    bundle = load(records)
    assert _count(bundle) == ("images", 65, 61, {unused: 4})
    assert bundle.reading.left_out[0].first == ["unlabelled"]
    bundle = load(records, num_images={"train": 20, "validation": 5})
    assert _count(bundle) == ("images", 65, 25, {"not drawn (data.num_images)": 36, unused: 4})
    bundle = load(records, splits={"train": "train[:40%]", "validation": "train[80%:]"})
    assert _count(bundle) == ("images", 65, 30, {unused: 35})
    assert bundle.reading.left_out[0].first == ["train", "validation", "unlabelled"]


def test_every_file_of_a_streamed_folder_is_counted(images):
    (images / "train" / "cat" / "notes.txt").write_text("x")
    (images / "train" / "cat" / ".DS_Store").write_text("x")
    (images / "test" / "cat").mkdir(parents=True)
    (images / "test" / "cat" / "0.png").write_bytes(encode(3))
    keys = {
        "labels": {"drop": ("owl",)},
        "num_images": {"train": 10},
        "splits": {"train": "train", "validation": "test"},
    }
    _, seen, used, counts = _count(load(images, "image_folder", **keys))
    assert (seen, used) == (27, 11)
    assert counts == {
        "in splits that are not used (data.splits)": 6, "hidden files and files of the system": 1, "of classes in data.labels.drop": 6,
        "files that are not in a supported picture format (.txt)": 1, "not drawn (data.num_images)": 2,
    }  # fmt: skip


def test_a_test_part_that_judges_nothing_is_counted(tmp_path, monkeypatch):
    write_squares(tmp_path, splits=("train", "val", "test"))
    monkeypatch.setattr(tfds_stream, "MAX_SPLIT_BYTES", 0)
    assert _count(load(tmp_path, "image_folder"))[1:] == (90, 60, {"too many for memory": 30})


def test_what_a_streamed_folder_is_can_be_said(tmp_path):
    write_squares(tmp_path, splits=("train", "holdout"))
    with pytest.raises(DataError, match=r"data\.folders"):
        load(tmp_path, "image_folder")
    bundle = load(tmp_path, "image_folder", folders={"holdout": "validation"})
    assert len(bundle.validation) == 30
