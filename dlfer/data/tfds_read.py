"""One split of a streamed data set: shuffled reading, cropping and decoding, batch by batch."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlfer.data.bundle import WHOLE, Share
from dlfer.data.images import normalise_for_tensorflow
from dlfer.data.pipeline import disable_autotuning
from dlfer.errors import ConfigError, DataError, shorten

if TYPE_CHECKING:
    import tensorflow as tf

SHUFFLE_BUFFER = 4096
CENTRAL_CROP = 0.875
CROP_SCALE = (0.25, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

# Separate random streams of an epoch, so that a change in the use of one does not affect the other.
_ORDER, _CROP = 1, 2

# (split name, index of the first record, index after the last record).
Slice = tuple[str, int, int]


Read = Callable[[np.random.Generator | None, int, Share], "tf.data.Dataset"]


@dataclass(frozen=True)
class TfdsSplit:
    """A split of a streamed data set; the `StreamedSplit` of the source tfds.

    Attributes:
        name: the data set's name of the split, e.g. "train" or "train[:90%]".
        num_images: number of images in the split.
        image_size: side S in pixels of the square images that it yields.
        read: (rng or None, start, share) -> dataset of (encoded image, target, id) in an order drawn by `rng`, or in
            the data set's order, without the first `start` images of the share. Images are not decoded yet.
        lookup: int64 [classes of the data], the index of each class in the bundle's labels.
        count: returns int64 [C], the number of images of each label; called only when needed.
        aspect: "crop" crops the images directly; "pad" first pads them to squares by repeating their edges.
        train_crop, crop: crop in training and otherwise, see `CropConfig`.
        wanted: number of images of each label in a training epoch; None: each image once.
        share: the share of the images that this host reads.
    """

    name: str
    num_images: int
    image_size: int
    read: Read
    lookup: np.ndarray
    count: Callable[[], np.ndarray]
    aspect: str = "crop"
    train_crop: str = "random_resized"
    crop: str = "center"
    wanted: tuple[int, ...] | None = None
    share: Share = WHOLE

    def __len__(self) -> int:
        return self.num_images

    def shard(self, index: int, count: int) -> TfdsSplit:
        """Return share `index` of `count` of the whole split; the shares differ in size by at most one image.

        Image files are assigned to shares anew in each epoch, in its shuffled order, so that the batches of all shares
        together are those of the whole split. A share of records is a fixed range, so that a host reads only these.

        Raises:
            ConfigError: the split is balanced by repetition, and `count` is more than one.
        """
        if self.wanted is not None and count > 1:
            raise ConfigError(
                f"balance: the streamed data {self.name!r} is balanced by repetition, which {count} hosts cannot share; "
                "set balance: none or class_weight."
            )
        share = Share(index, count)
        return replace(self, share=share, num_images=share.count_images(self.num_images))

    def count_classes(self) -> np.ndarray:
        """Return int64 [C], the images of each label in the whole split; the first call may read all records."""
        return self.count()

    def balance(self, how: str) -> TfdsSplit:
        """Return a split whose training epochs are balanced, see `StreamedSplit.balance`.

        The images of a label are repeated or left out evenly. sampler: N / C images of each label (those left out of a
        large label vary by epoch). augment: as many of each label as the largest has, every image at least once.
        """
        if how in ("none", "class_weight"):
            return self
        if how == "undersample":
            raise ConfigError(
                f"balance: found undersample for the streamed data {self.name!r}, which would have to leave out the same "
                "images in each epoch; set balance: sampler or class_weight, or crop: {train: none} for data that fits into memory."
            )
        counts = self.count_classes()
        present = np.flatnonzero(counts)
        wanted = np.zeros_like(counts)
        if how == "augment":
            wanted[present] = counts.max()
        else:
            wanted[present] = counts.sum() // len(present)
            wanted[present[: counts.sum() % len(present)]] += 1
        return replace(self, wanted=tuple(wanted.tolist()), num_images=int(wanted.sum()))

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, start_step: int = 0, training: bool
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (images uint8 [B, S, S, 3], targets int64 [B], ids str [B]), see `StreamedSplit.batches`.

        The crop "center" keeps a central square with 87.5 % of the shorter side, "none" one with all of it; if `aspect`
        is "pad", the image is first padded to a square of the longer side. Only random crops change the aspect ratio,
        which is intended and also applies to square images. Images smaller than S are enlarged, and grey images become
        three equal channels. Images of batches that `start_step` skips are not decoded.

        Raises:
            DataError: an image cannot be decoded or has no label.
        """
        import tensorflow as tf

        start = start_step * batch_size
        dataset = self._read(seed, epoch, start, training)
        # First half of the seed of an epoch's crops; the second half is the image's position in the order.
        key = int(np.random.default_rng([seed, _CROP, epoch]).integers(2**62)) if training else None
        crop = _make_crop(self.train_crop if training else self.crop, key)
        decode = _make_decode(self.image_size, crop, self.aspect)
        share = self.share
        dataset = dataset.enumerate(start=start).map(
            lambda place, example: (decode(example[0], place * share.count + share.index), example[1], example[2]),
            num_parallel_calls=os.cpu_count() or 1,
            deterministic=True,
        )
        drop_remainder = training and self.num_images >= batch_size
        batches = dataset.batch(batch_size, drop_remainder=drop_remainder).prefetch(2)
        iterator = disable_autotuning(batches).as_numpy_iterator()
        while True:
            try:
                images, targets, ids = next(iterator)
            except StopIteration:
                return
            except tf.errors.OpError as error:
                batch = self._read(seed, epoch, start, training).take(batch_size)
                raise DataError(_describe_unreadable(self.name, batch, decode, error)) from error
            yield images, self._map_targets(targets, ids), np.array([os.fsdecode(each) for each in ids])
            start += len(images)

    def _read(self, seed: int, epoch: int, start: int, training: bool) -> tf.data.Dataset:
        if not training:
            return self.read(None, start, self.share)
        rng = np.random.default_rng([seed, _ORDER, epoch])
        if self.wanted is None:
            return self.read(rng, start, self.share)
        counts = self.count_classes()
        repeated = _repeat(self.read(rng, 0, self.share), self.lookup, counts, np.array(self.wanted), rng)
        # Copies of an image are adjacent, hence the second shuffle.
        return _shuffle(repeated, rng).skip(start)

    def _map_targets(self, targets: np.ndarray, ids: np.ndarray) -> np.ndarray:
        if targets.min() < 0:
            raise DataError(
                f"split {self.name!r}: the image {os.fsdecode(ids[np.argmin(targets)])} has no label (found "
                f"{targets.min()}). The split is not labelled; name another one by data.splits."
            )
        return self.lookup[targets]


def cut_slices(slices: list[Slice], start: int, stop: int) -> list[Slice]:
    """Return the ranges of the records `start` to `stop`, counted over all records in `slices`."""
    kept = []
    for name, first, last in slices:
        begin, end = max(first, first + start), min(last, first + stop)
        if begin < end:
            kept.append((name, begin, end))
        start, stop = start - (last - first), stop - (last - first)
    return kept


def make_record_reader(builder: Any, slices: list[Slice], image_key: str, label_key: str) -> Read:
    """Return a reader of record files, which in training shuffles the files and uses a shuffle buffer."""
    import tensorflow_datasets as tfds

    total = sum(last - first for _, first, last in slices)

    def read(rng: np.random.Generator | None, start: int, share: Share) -> tf.data.Dataset:
        first = share.find_start(total)
        own = cut_slices(slices, first, first + share.count_images(total))
        spec = "+".join(f"{name}[{begin}:{end}]" for name, begin, end in own)
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


def make_file_reader(root: Path, ids: np.ndarray, targets: np.ndarray) -> Read:
    """Return a reader of image files, which in training shuffles all paths; files are read only when needed."""

    def read(rng: np.random.Generator | None, start: int, share: Share) -> tf.data.Dataset:
        import tensorflow as tf

        rows = np.arange(len(ids)) if rng is None else rng.permutation(len(ids))
        rows = rows[share.index :: share.count][start:]
        names = np.array([os.fsencode(name) for name in ids[rows]], object)
        dataset = tf.data.Dataset.from_tensor_slices((names, targets[rows]))

        def open_file(name, target):
            contents = tf.io.read_file(tf.strings.join([os.fsencode(f"{root}/"), name]))
            plain = tf.numpy_function(_make_plain, [contents, name], tf.string, stateful=False)
            return tf.ensure_shape(plain, []), target, name

        return dataset.map(open_file, num_parallel_calls=os.cpu_count() or 1, deterministic=True)

    return read


def _make_plain(contents: bytes, name: bytes) -> bytes:
    return normalise_for_tensorflow(contents, os.fsdecode(name))


def make_label_counter(builder: Any, slices: list[Slice], label_key: str, lookup: np.ndarray) -> Callable:
    """Return a cached function that counts the images of each label in ranges of records, int64 [C]."""
    import tensorflow_datasets as tfds

    @functools.cache
    def count() -> np.ndarray:
        spec = "+".join(f"{name}[{begin}:{end}]" for name, begin, end in slices)
        decoders = tfds.decode.PartialDecoding({label_key: True})
        config = tfds.ReadConfig(try_autocache=False)
        counts = np.zeros(lookup.max() + 1, np.int64)
        batches = builder.as_dataset(split=spec, decoders=decoders, read_config=config).batch(4096)
        for batch in disable_autotuning(batches).as_numpy_iterator():
            if batch[label_key].min() < 0:
                raise DataError(f"{spec}: found images without a label; name a split with labels by data.splits.")
            counts += np.bincount(lookup[batch[label_key]], minlength=len(counts))
        return counts

    return count


def _repeat(
    dataset: tf.data.Dataset, lookup: np.ndarray, counts: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> tf.data.Dataset:
    """Repeat or leave out the n images of each label evenly, so that exactly w = `wanted` of them remain.

    Image k of a label occurs floor(((k + 1) w + o) / n) - floor((k w + o) / n) times. The offset o, in 0..n - 1, is
    drawn in each epoch, so that the images that occur once more (or not at all) vary.

    Args:
        dataset: yields (encoded image, target of the data set, id).
        lookup: int64 [classes of the data], the label of each class.
        counts, wanted: int64 [C], the images of each label in the data and in the result.
    """
    import tensorflow as tf

    labels, sizes, wanted = tf.constant(lookup, tf.int64), tf.constant(np.maximum(counts, 1)), tf.constant(wanted)
    offsets = tf.constant(rng.integers(np.maximum(counts, 1)))

    def find_copies(seen, example):
        label = labels[example[1]]
        before = seen[label] * wanted[label] + offsets[label]
        copies = (before + wanted[label]) // sizes[label] - before // sizes[label]
        return tf.tensor_scatter_nd_add(seen, [[label]], [1]), (example, copies)

    scanned = dataset.scan(tf.zeros(len(counts), tf.int64), find_copies)
    return scanned.flat_map(lambda example, copies: tf.data.Dataset.from_tensors(example).repeat(copies))


def _shuffle(dataset: tf.data.Dataset, rng: np.random.Generator) -> tf.data.Dataset:
    """Shuffle within a buffer, with seeds that depend only on `rng`.

    Dataset.shuffle would also use TensorFlow's global seed, which other code may set.
    """
    import tensorflow as tf

    # The seeds 0, 0 would request a random seed.
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


def _make_crop(how: str, key: int | None) -> Callable:
    """Return a function (height, width, index) -> int32 [top, left, height, width] of a random or central crop."""
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
        share = CENTRAL_CROP if how == "center" else 1.0
        side = tf.maximum(tf.cast(tf.round(share * shorter), tf.int32), 1)
        return tf.stack([(height - side) // 2, (width - side) // 2, side, side])

    return draw if how == "random_resized" else take_centre


def _make_decode(image_size: int, crop: Callable, aspect: str) -> Callable:
    """Return a function (encoded, index) -> uint8 [S, S, 3]; of a JPEG that is not padded it decodes only the crop."""
    import tensorflow as tf

    def decode_jpeg(encoded, index):
        height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(encoded))
        return tf.image.decode_and_crop_jpeg(encoded, crop(height, width, index), channels=3)

    def decode_whole(encoded, index):
        image = tf.io.decode_image(encoded, channels=3, expand_animations=False)
        if aspect == "pad":
            image = _pad_square(image)
        size = tf.shape(image)
        top, left, height, width = tf.unstack(crop(size[0], size[1], index))
        return image[top : top + height, left : left + width]

    def decode(encoded, index):
        # Padding needs pixels outside of the crop.
        decodes_part = tf.logical_and(tf.io.is_jpeg(encoded), aspect == "crop")
        image = tf.cond(decodes_part, lambda: decode_jpeg(encoded, index), lambda: decode_whole(encoded, index))
        image = tf.image.resize(tf.ensure_shape(image, [None, None, 3]), [image_size, image_size], antialias=True)
        return tf.saturate_cast(tf.round(image), tf.uint8)

    return decode


def _pad_square(image: tf.Tensor) -> tf.Tensor:
    """Pad an image, uint8 [H, W, 3], to uint8 [S, S, 3], S the longer side: centred, with its edge pixels repeated."""
    import tensorflow as tf

    size = tf.shape(image)
    side = tf.maximum(size[0], size[1])
    for axis in (0, 1):
        rows = tf.range(side) - (side - size[axis]) // 2
        image = tf.gather(image, tf.clip_by_value(rows, 0, size[axis] - 1), axis=axis)
    return image


def _describe_unreadable(name: str, batch: tf.data.Dataset, decode: Callable, error: Exception) -> str:
    """Return an error message that names the image of a failed batch that cannot be decoded."""
    import tensorflow as tf

    reason = shorten(error)
    try:
        for encoded, _, image_id in batch:
            try:
                decode(encoded, tf.constant(0, tf.int64))
            except tf.errors.OpError:
                return (
                    f"split {name!r}: the image {os.fsdecode(image_id.numpy())} cannot be decoded. "
                    "Delete or replace it; prepared data sets are best prepared again."
                )
    except tf.errors.OpError as problem:
        reason = shorten(problem)
    return f"split {name!r}: its files cannot be read: {reason}. Prepare or copy the data again."
