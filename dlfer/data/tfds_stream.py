"""Images too many for memory, streamed: any data set of tensorflow_datasets, or large class folders.

The order, the crops and so the batches of an epoch are a function of (seed, epoch) alone. Nothing
is cached: memory holds the shuffle buffer (encoded images) and a few batches.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.config.schema import DataConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit
from dlfer.data.folder import PART_NAMES, scan_folder
from dlfer.data.imagenet_check import check_imagenet2012
from dlfer.data.labels import match_labels, order_labels
from dlfer.data.split import draw_indices
from dlfer.errors import DataError, MissingDataError, ProtocolError

if TYPE_CHECKING:
    import tensorflow as tf

IMAGE_FOLDER = "image_folder"
SHUFFLE_BUFFER = 4096
MAX_SPLIT_BYTES = 2_000_000_000
CENTRAL_CROP = 0.875
CROP_SCALE = (0.25, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_CANDIDATES = {"train": ("train",), "validation": ("validation", "val", "valid", "test"), "test": ()}
# Streams of randomness of one epoch; each has its own so that one cannot disturb another.
_ORDER, _CROP = 1, 2

Read = Callable[[np.random.Generator | None, int], "tf.data.Dataset"]
# (name of a split, first record, record after the last).
_Slice = tuple[str, int, int]


@dataclass(frozen=True)
class TfdsSplit:
    """A streamed part of a data set; the `StreamedSplit` of this source.

    Attributes:
        name: the data set's own name of the part, e.g. "train" or "train[:90%]".
        num_images: number of its images.
        image_size: side S in pixels of the squares that it yields.
        read: (rng or None, start) -> dataset of (encoded image, target, id) in the order that `rng`
            draws, or in the data set's own, without the first `start`. Nothing is decoded yet.
        lookup: int64 [classes of the data], the index of each in the bundle's labels.
    """

    name: str
    num_images: int
    image_size: int
    read: Read
    lookup: np.ndarray

    def __len__(self) -> int:
        return self.num_images

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start_step: int = 0, training: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (images uint8 [B, S, S, 3], targets int64 [B], ids str [B]).

        In training the order is shuffled, each image is cropped at random (scale 0.25..1, aspect
        3/4..4/3), and an incomplete last batch is dropped, unless it is the only one; else order
        and number are the data set's own and the crop is the central square (87.5 % of the shorter
        side). Images smaller than S are enlarged, grey ones become three equal channels.

        Args:
            batch_size: B.
            seed, epoch: fix the order and the crops.
            start_step: batches to leave out at the beginning; their images are not decoded.
            training: as above.

        Raises:
            DataError: an image that cannot be decoded, or one without a label.
        """
        import tensorflow as tf

        start = start_step * batch_size
        dataset = self._read(seed, epoch, start, training)
        decode = _make_decode(self.image_size, _make_crop(_draw_key(seed, epoch) if training else None))
        dataset = dataset.enumerate(start=start).map(
            lambda index, example: (decode(example[0], index), example[1], example[2]),
            num_parallel_calls=os.cpu_count() or 1,
            deterministic=True,
        )
        drop_remainder = training and self.num_images >= batch_size
        iterator = dataset.batch(batch_size, drop_remainder=drop_remainder).prefetch(2).as_numpy_iterator()
        while True:
            try:
                images, targets, ids = next(iterator)
            except StopIteration:
                return
            except tf.errors.OpError as error:
                batch = self._read(seed, epoch, start, training).take(batch_size)
                raise DataError(_describe_unreadable(self.name, batch, decode, error)) from error
            yield images, self._map_targets(targets, ids), ids.astype(str)
            start += len(images)

    def _read(self, seed: int, epoch: int, start: int, training: bool) -> tf.data.Dataset:
        return self.read(np.random.default_rng([seed, _ORDER, epoch]) if training else None, start)

    def _map_targets(self, targets: np.ndarray, ids: np.ndarray) -> np.ndarray:
        if targets.min() < 0:
            raise DataError(
                f"split {self.name!r}: the image {ids[np.argmin(targets)].decode()} has no label (found "
                f"{targets.min()}). The part is not labelled; name another one by data.splits."
            )
        return self.lookup[targets]


def load_tfds(config: DataConfig, image_size: int) -> DataBundle:
    """Return the streamed parts of a data set of tensorflow_datasets, prepared first if need be.

    `config.name` is the data set ("cifar10", "imagenet2012:5.1.0"), `config.path` the folder of
    data sets (null: the default of tensorflow_datasets). It needs one uint8 image and one class
    label. The name "image_folder" takes class folders train/<class>/<image> at `config.path`
    instead. `config.splits` names the parts; train is "train" and validation is "validation" (or
    "val", "valid", "test") where it says nothing. A test part is held in memory.

    Args:
        config: the data section, with source tfds.
        image_size: side in pixels of the squares that are cropped from the images.

    Raises:
        MissingDataError: the data set is not there and cannot be prepared.
        DataError: no such data set or part, no image or label in it, or a key that streaming cannot honour.
        ProtocolError: two parts share images.
    """
    if config.skip_unreadable:
        raise DataError(
            "data.skip_unreadable: found true with source tfds, which reads images only when they are needed and "
            "cannot count them before. Set it to false, or use source folder."
        )
    if config.name == IMAGE_FOLDER:
        return _load_image_folder(config, image_size)
    return _load_data_set(config, image_size)


def read_split(split: StreamedSplit, num: int | None = None) -> Split | StreamedSplit:
    """Return the first `num` images (None: all) in memory if they take less than 2 GB, else `split` itself.

    The crop is the central one; the order is the data set's own.

    Raises:
        DataError: an image that cannot be decoded, or one without a label.
    """
    total = len(split) if num is None else min(num, len(split))
    side = split.image_size
    if total * side * side * 3 >= MAX_SPLIT_BYTES:
        return split
    images = np.empty((total, side, side, 3), np.uint8)
    targets = np.empty(total, np.int64)
    ids: list[str] = []
    for pixels, labels, names in split.batches(max(1, min(64, total)), seed=0, epoch=0, training=False):
        start = len(ids)
        count = min(len(labels), total - start)
        images[start : start + count] = pixels[:count]
        targets[start : start + count] = labels[:count]
        ids += names[:count].tolist()
        if len(ids) == total:
            break
    return Split(split.name, images, targets, np.array(ids, dtype=str))


def _load_data_set(config: DataConfig, image_size: int) -> DataBundle:
    """Return the bundle of a data set in tensorflow_datasets' own record files."""
    base_name = re.split("[:/]", config.name)[0]
    if base_name == "imagenet2012":
        check_imagenet2012(config.path)
    if base_name == "fer2013":
        importlib.import_module("dlfer.data.tfds_fer2013")
    builder = _prepare(config)
    features = builder.info.features
    image_key, label_key = _find_features(config.name, features)
    names = list(features[label_key].names)
    labels, lookup = _match(names, config)
    if (lookup < 0).any():
        raise DataError(
            f"data.labels.drop: the records of {config.name} can be counted only by reading all of them, so source "
            "tfds cannot leave classes out. Use name: image_folder or source folder, or keep the classes."
        )
    chosen = _choose_parts(config, tuple(builder.info.splits))
    slices = {part: _resolve_slices(builder, wanted, config.name) for part, wanted in chosen.items()}
    _check_disjoint(slices)
    splits, notes = {}, []
    for part, wanted in chosen.items():
        total = sum(stop - start for _, start, stop in slices[part])
        num = min(total, getattr(config.num_images, part) or total)
        if num < total:
            notes.append(f"{part}: the first {num} of {total} images of {wanted}, in the order of its records.")
        spec = "+".join(f"{name}[{start}:{stop}]" for name, start, stop in _take_first(slices[part], num))
        read = _make_record_reader(builder, spec, image_key, label_key)
        splits[part] = TfdsSplit(wanted, num, image_size, read, lookup)
    return _bundle(labels, splits, notes)


def _load_image_folder(config: DataConfig, image_size: int) -> DataBundle:
    """Return the bundle of class folders; only the paths of their images are in memory."""
    if config.path is None:
        raise DataError("data.path: name image_folder needs the folder that holds train/<class>/<image>.")
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise MissingDataError(
            f"{root}: there is no such folder. Put the images there as train/<class>/<image> and "
            "validation/<class>/<image>, or set data.path."
        )
    parts = scan_folder(root)
    files = [file for part in parts.values() for file in part]
    odd = next((file.id for file in files if not file.id.casefold().endswith(_SUFFIXES)), None)
    if odd is not None:
        raise DataError(
            f"{root / odd}: source tfds decodes {', '.join(_SUFFIXES)} only. Convert the file, or use source folder."
        )
    names = sorted({file.class_name for file in files})
    mapping = match_labels(names, config.labels)
    labels = order_labels(label for label in mapping.values() if label is not None)
    chosen = _choose_parts(config, tuple(parts))
    folders = {part: PART_NAMES.get(wanted.casefold(), wanted) for part, wanted in chosen.items()}
    _check_disjoint({part: [(folder, 0, len(parts.get(folder, ())))] for part, folder in folders.items()})
    splits = {}
    for part, wanted in chosen.items():
        found = parts.get(folders[part])
        if found is None:
            raise DataError(_describe_part(config.name, wanted, tuple(parts)))
        kept = [file for file in found if mapping[file.class_name] is not None]
        ids = np.array([file.id for file in kept])
        targets = np.array([labels.index(mapping[file.class_name]) for file in kept], np.int64)
        absent = [label for index, label in enumerate(labels) if part == "train" and not (targets == index).any()]
        if absent:
            raise DataError(f"{root}: train has no image of {', '.join(absent)}; a class needs images to be learned.")
        # Paths come sorted by class; a fixed mixed order lets the first n of them stand for all.
        rows = np.random.default_rng(config.seed).permutation(
            draw_indices(targets, ids, getattr(config.num_images, part), seed=config.seed)
        )
        read = _make_file_reader(root, ids[rows], targets[rows])
        splits[part] = TfdsSplit(wanted, len(rows), image_size, read, np.arange(len(labels)))
    return _bundle(labels, splits, [])


def _bundle(labels: tuple[str, ...], splits: dict[str, TfdsSplit], notes: list[str]) -> DataBundle:
    if len(labels) < 2:
        raise DataError(f"data: found one class only ({', '.join(labels)}), expected at least two.")
    for part, split in splits.items():
        if not len(split):
            raise DataError(f"data: {part} ({split.name}) has no images, expected at least one; see data.splits.")
    test = read_split(splits["test"]) if "test" in splits else None
    if test is not None and not isinstance(test, Split):
        raise DataError(
            f"data.splits.test: its {len(test)} images at {test.image_size} px do not fit into "
            f"{MAX_SPLIT_BYTES / 1e9:.0f} GB of memory; set data.num_images.test."
        )
    selected_on = splits["validation"].name
    return DataBundle(
        "tfds", labels, splits["train"], splits["validation"], test, selected_on=selected_on, notes=tuple(notes)
    )


def _choose_parts(config: DataConfig, available: tuple[str, ...]) -> dict[str, str]:
    """Return the data set's own name of each part: as data.splits says, else the first usual name it has."""
    chosen: dict[str, str] = dict(config.splits or {})
    for part, candidates in _CANDIDATES.items():
        name = next((name for name in candidates if name in available), None)
        if part in chosen:
            continue
        if name is not None and (part != "validation" or name not in chosen.values()):
            chosen[part] = name
        elif part != "test":
            raise DataError(
                f"data.splits: {config.name} has the parts {', '.join(available)}, and none that is plainly {part}. "
                "Name one, e.g. splits: {train: 'train[:90%]', validation: 'train[90%:]'}."
            )
    return chosen


def _match(names: list[str], config: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the labels in the data set's order after aliases, and the index of each class in them (-1: dropped)."""
    mapping = match_labels(names, config.labels)
    labels = tuple(dict.fromkeys(label for name in names if (label := mapping[name]) is not None))
    lookup = [-1 if mapping[name] is None else labels.index(mapping[name]) for name in names]
    return labels, np.array(lookup, np.int64)


def _prepare(config: DataConfig) -> Any:
    """Return the builder of a data set whose records are on the disk."""
    import tensorflow_datasets as tfds

    path = None if config.path is None else str(Path(config.path).expanduser())
    try:
        builder = tfds.builder(config.name, data_dir=path)
    except tfds.core.DatasetNotFoundError as error:
        known = [IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(config.name, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " https://www.tensorflow.org/datasets lists them."
        raise DataError(f"data.name: tensorflow_datasets knows no data set {config.name!r}.{hint}") from error
    if builder.is_prepared():
        return builder
    download = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        builder.download_and_prepare(download_config=download)
    except (AssertionError, OSError) as error:
        raise MissingDataError(
            f"{builder.data_dir}: the data set {config.name} is not there and cannot be prepared: {error}"
        ) from error
    return builder


def _find_features(name: str, features: Any) -> tuple[str, str]:
    """Return the keys of the image and of the class label, those called image and label before others."""
    import tensorflow_datasets as tfds

    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    images = [key for key in images if np.dtype(features[key].np_dtype) == np.uint8]
    if not images or not labels:
        missing = "image of dtype uint8" if not images else "class label"
        raise DataError(
            f"data.name: {name} has no {missing}; found {', '.join(features)}. Choose a data set of labelled images."
        )
    return (
        "image" if "image" in images else images[0],
        "label" if "label" in labels else labels[0],
    )


def _resolve_slices(builder: Any, wanted: str, name: str) -> list[_Slice]:
    """Return the ranges of records that `wanted` stands for, e.g. "train[:90%]" or "train+validation"."""
    import tensorflow_datasets as tfds

    infos = builder.info.splits
    try:
        found = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(infos)
    except (KeyError, ValueError, AssertionError, NotImplementedError) as error:
        raise DataError(_describe_part(name, wanted, tuple(infos))) from error
    return [
        (part.splitname, part.from_ or 0, infos[part.splitname].num_examples if part.to is None else part.to)
        for part in found
    ]


def _take_first(slices: list[_Slice], num: int) -> list[_Slice]:
    """Return the ranges of the first `num` records."""
    kept = []
    for name, start, stop in slices:
        count = min(num, stop - start)
        if count:
            kept.append((name, start, start + count))
        num -= count
    return kept


def _check_disjoint(parts: dict[str, list[_Slice]]) -> None:
    """Raise ProtocolError where an image stands in two parts."""
    for first, second in itertools.combinations(parts, 2):
        for (name, start, stop), (other, begin, end) in itertools.product(parts[first], parts[second]):
            if name == other and max(start, begin) < min(stop, end):
                raise ProtocolError(
                    f"data.splits: {first} and {second} both hold the images {max(start, begin)} to "
                    f"{min(stop, end) - 1} of {name!r}. Give each part images of its own, "
                    f"e.g. '{name}[:90%]' and '{name}[90%:]'."
                )


def _describe_part(name: str, wanted: str, available: tuple[str, ...]) -> str:
    return f"data.splits: found {wanted!r}, expected a part of {name} ({', '.join(available)}) or a slice of one."


def _make_record_reader(builder: Any, spec: str, image_key: str, label_key: str) -> Read:
    """Return a reader of record files: in training, files in drawn order and a shuffle buffer."""
    import tensorflow_datasets as tfds

    def read(rng: np.random.Generator | None, start: int) -> tf.data.Dataset:
        decoders = tfds.decode.PartialDecoding(
            {image_key: True, label_key: True}, decoders={image_key: tfds.decode.SkipDecoding()}
        )
        config = tfds.ReadConfig(
            try_autocache=False,
            add_tfds_id=True,
            interleave_cycle_length=1 if rng is None else 16,
            num_parallel_calls_for_decode=2,
            skip_prefetch=True,
            enable_ordering_guard=False,
        )
        if rng is not None:
            config.experimental_interleave_sort_fn = lambda files: [files[i] for i in rng.permutation(len(files))]
        dataset = builder.as_dataset(split=spec, decoders=decoders, read_config=config)
        dataset = dataset.map(lambda example: (example[image_key], example[label_key], example["tfds_id"]))
        return (dataset if rng is None else _shuffle(dataset, rng)).skip(start)

    return read


def _make_file_reader(root: Path, ids: np.ndarray, targets: np.ndarray) -> Read:
    """Return a reader of image files: in training, all paths in drawn order; files are read only when needed."""

    def read(rng: np.random.Generator | None, start: int) -> tf.data.Dataset:
        import tensorflow as tf

        rows = np.arange(len(ids)) if rng is None else rng.permutation(len(ids))
        rows = rows[start:]
        dataset = tf.data.Dataset.from_tensor_slices((ids[rows].astype(object), targets[rows]))
        return dataset.map(
            lambda name, target: (tf.io.read_file(tf.strings.join([f"{root}/", name])), target, name),
            num_parallel_calls=os.cpu_count() or 1,
            deterministic=True,
        )

    return read


def _shuffle(dataset: tf.data.Dataset, rng: np.random.Generator) -> tf.data.Dataset:
    """Shuffle within a buffer, by seeds that `rng` draws alone.

    Dataset.shuffle would mix in the global seed of TensorFlow, and so tie the order to code elsewhere.
    """
    import tensorflow as tf

    # 0, 0 would ask for a seed from the clock.
    seed, seed2 = rng.integers(1, 2**31, size=2).tolist()
    specs = tf.nest.flatten(dataset.element_spec)
    variant = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(dataset),
        buffer_size=tf.constant(SHUFFLE_BUFFER, tf.int64),
        seed=tf.constant(seed, tf.int64),
        seed2=tf.constant(seed2, tf.int64),
        output_types=[spec.dtype for spec in specs],
        output_shapes=[spec.shape for spec in specs],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(variant, dataset.element_spec)


def _draw_key(seed: int, epoch: int) -> int:
    """Return the first half of the seed of an epoch's crops; the other half is the image's place in the order."""
    return int(np.random.default_rng([seed, _CROP, epoch]).integers(2**62))


def _make_crop(key: int | None) -> Callable:
    """Return (height, width, index) -> int32 [top, left, height, width]: random if there is a key, else central."""
    import tensorflow as tf

    def draw(height, width, index):
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            tf.stack([height, width, 3]),
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=tf.stack([tf.constant(key, tf.int64), index]),
            min_object_covered=0.0,
            aspect_ratio_range=CROP_ASPECT,
            area_range=CROP_SCALE,
        )
        return tf.concat([begin[:2], size[:2]], axis=0)

    def take_centre(height, width, index):
        shorter = tf.cast(tf.minimum(height, width), tf.float32)
        side = tf.maximum(tf.cast(tf.round(CENTRAL_CROP * shorter), tf.int32), 1)
        return tf.stack([(height - side) // 2, (width - side) // 2, side, side])

    return take_centre if key is None else draw


def _make_decode(image_size: int, crop: Callable) -> Callable:
    """Return (encoded, index) -> uint8 [S, S, 3], where of a JPEG only the crop is decoded."""
    import tensorflow as tf

    def decode_jpeg(encoded, index):
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        return tf.image.decode_and_crop_jpeg(encoded, crop(height, width, index), channels=3)

    def decode_other(encoded, index):
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        size = tf.shape(image)
        top, left, height, width = tf.unstack(crop(size[0], size[1], index))
        return image[top : top + height, left : left + width]

    def decode(encoded, index):
        image = tf.cond(
            tf.io.is_jpeg(encoded), lambda: decode_jpeg(encoded, index), lambda: decode_other(encoded, index)
        )
        image = tf.image.resize(tf.ensure_shape(image, [None, None, 3]), [image_size, image_size], antialias=True)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    return decode


def _describe_unreadable(name: str, batch: tf.data.Dataset, decode: Callable, error: Exception) -> str:
    """Say which image of a batch that failed cannot be decoded."""
    import tensorflow as tf

    reason = str(error).splitlines()[0][:200]
    try:
        for encoded, _, image_id in batch:
            try:
                decode(encoded, tf.constant(0, tf.int64))
            except tf.errors.OpError:
                return (
                    f"split {name!r}: the image {image_id.numpy().decode()} cannot be decoded. "
                    "Delete or replace it; prepared data sets are best prepared again."
                )
    except tf.errors.OpError as problem:
        reason = str(problem).splitlines()[0][:200]
    return f"split {name!r}: its files cannot be read: {reason}. Prepare or copy the data again."
