"""Streaming of data that does not fit into memory: any tensorflow_datasets data set, or large class folders.

The order, the crops and thus the batches of an epoch depend only on (seed, epoch). Nothing is cached:
memory holds the shuffle buffer (encoded images) and a few batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.names import expand_home
from dlfer.config.sections import DataConfig
from dlfer.data.audit import are_expressions
from dlfer.data.bundle import WHOLE, DataBundle, Reading, Split, StreamedSplit
from dlfer.data.files import Tally
from dlfer.data.folder import NOT_DRAWN, SPLIT_NAMES, ImageFile, scan_folder
from dlfer.data.labels import DROPPED, index_labels, match_labels, order_labels
from dlfer.data.split import draw_indices
from dlfer.data.tfds_read import (
    Read,
    Slice,
    TfdsSplit,
    cut_slices,
    make_file_reader,
    make_label_counter,
    make_record_reader,
)
from dlfer.errors import DataError, MissingDataError, ProtocolError, shorten

ARCHIVES = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
"""ImageNet's archives, which have to be downloaded manually, -> their sizes in bytes."""

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
}
"""MD5 of the archives, which is shown to the user but not verified, because hashing 150 GB takes too long."""

FREE_BYTES = 300_000_000_000
"""Free disk space needed to prepare ImageNet: the records, and as much again while they are shuffled."""


def check_imagenet2012(data_dir: str | Path | None) -> None:
    """Raise unless ImageNet is prepared under `data_dir`, or can be prepared from its archives there.

    tensorflow_datasets reports a missing or truncated archive only after hours; this check is immediate
    and does not import TensorFlow.

    Args:
        data_dir: the folder of data sets; None: the default of tensorflow_datasets
            ($TFDS_DATA_DIR, or ~/tensorflow_datasets).

    Raises:
        MissingDataError: ImageNet is not prepared and cannot be; the message lists all problems and how to obtain it.
    """
    root = find_data_dir(data_dir)
    if any(root.glob("imagenet2012/5.*/dataset_info.json")):
        return
    manual = root / "downloads" / "manual"
    problems = [problem for name, size in ARCHIVES.items() if (problem := _describe_archive(manual / name, size))]
    existing = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        problems.append(
            f"{root}: found {free / 1e9:,.0f} GB free on its disk, expected {FREE_BYTES / 1e9:,.0f} GB "
            "to prepare the data set"
        )
    if problems:
        raise MissingDataError("ImageNet cannot be prepared.\n  - " + "\n  - ".join(problems) + "\n" + _explain(manual))


def find_data_dir(data_dir: str | Path | None) -> Path:
    """Return the folder of data sets, found by the rules of tensorflow_datasets."""
    return expand_home(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _describe_archive(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path}: the file is missing, expected {size:,} bytes"
    found = path.stat().st_size
    if found != size:
        return f"{path}: found {found:,} bytes, expected {size:,}; fetch it again"
    return None


def _explain(manual: Path) -> str:
    sizes = " and ".join(f"{name} ({size:,} bytes, MD5 {MD5[name]})" for name, size in ARCHIVES.items())
    return (
        "Obtain ImageNet (ILSVRC 2012) from https://image-net.org: register, accept the terms (non-commercial research "
        f"and education), and put {sizes} into {manual}. "
        "Then prepare it once: dlfer prepare FILE. The shortcut is the published weights: --set pretrain.weights=imagenet."
    )


_PREPARE = (
    "It is prepared once, where its folder can be written: dlfer prepare FILE (in a container with the data mounted without "
    ":ro, e.g. docker compose run --rm prepare). Training reads it only, from a read-only mount as well."
)

IMAGE_FOLDER = "image_folder"
MAX_SPLIT_BYTES = 2_000_000_000

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_CANDIDATES = {"train": ("train",), "validation": ("validation", "val", "valid"), "test": ("test",)}
HELD_OUT = 10
"""If a data set has only train and test, 1 / HELD_OUT of train becomes the validation split."""

SMALL_SIDE = 128
"""Side in pixels up to which square images of equal size are assumed to be cropped already."""
NUM_SAMPLED = 64
_UNUSED, _UNLABELLED, _TOO_LARGE = "in splits that are not used (data.splits)", "without labels", "too many for memory"
_FACES = re.compile(r"(?<!sur)face|celeb|emotion|expression|affectnet|jaffe|(?<![a-z])(fer|raf|ck)(?![a-z])", re.I)


def load_tfds(config: DataConfig, image_size: int) -> DataBundle:
    """Return the splits of a tensorflow_datasets data set, which is prepared first if necessary.

    `config.name` is the data set ("cifar10", "imagenet2012:5.1.0"), `config.path` the folder of
    data sets (null: the default of tensorflow_datasets). Its examples need a uint8 image and a class
    label. The name "image_folder" reads class folders train/<class>/<image> at `config.path`
    instead. `config.splits` names the splits; by default train is "train", validation is "validation"
    (or "val", "valid"; else a tenth of train if there is a test split), and test is "test". The test
    split is held in memory, and so are all splits if training images are not cropped at random and
    the images take less than 2 GB; otherwise train and validation are streamed.

    Args:
        config: the data section, with source tfds.
        image_size: side in pixels of the square images of the splits if `config.size` is null.

    Raises:
        MissingDataError: the data set does not exist and cannot be prepared.
        DataError: the data set or a split does not exist, has no image or label, or streaming does not support a key.
        ProtocolError: two splits share images.
    """
    load = _load_image_folder if config.name == IMAGE_FOLDER else _load_data_set
    return load(config, config.size or image_size)


def read_split(split: StreamedSplit) -> Split | StreamedSplit:
    """Read a streamed split into memory if its images take less than 2 GB; otherwise return `split` itself.

    Images are cropped as in validation and keep the data set's order.

    Raises:
        DataError: an image cannot be decoded or has no label.
    """
    total, side = len(split), split.image_size
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
    """Return the bundle of a data set in the record files of tensorflow_datasets."""
    builder = prepare_data_set(config)
    features = builder.info.features
    image_key, label_key = _find_features(config.name, features)
    names = name_labels(builder)
    labels, lookup = index_labels(names, config.labels)
    if (lookup < 0).any():
        raise DataError(
            f"data.labels.drop: the records of {config.name} can be counted only by reading all of them, so source "
            "tfds cannot leave classes out. Use name: image_folder or source folder, or keep the classes."
        )
    chosen, notes = _choose_splits(config, tuple(builder.info.splits))
    slices = {split: _resolve_slices(builder, wanted, config.name) for split, wanted in chosen.items()}
    _check_disjoint(slices)
    tally = _count_unused(builder, slices)
    reads, counts = {}, {}
    for split, wanted in chosen.items():
        total = sum(stop - start for _, start, stop in slices[split])
        num = min(total, getattr(config.num_images, split) or total)
        if num < total:
            notes.append(f"{split}: the first {num} of {total} images of {wanted}, in the order of its records.")
            tally.leave_out(NOT_DRAWN, wanted, total - num, was_seen=True)
        own = cut_slices(slices[split], 0, num)
        reads[split] = make_record_reader(builder, own, image_key, label_key)
        counts[split] = (num, make_label_counter(builder, own, label_key, lookup))
    height, width = features[image_key].shape[:2]
    sizes = [(height, width)] if height and width else _sample_record_sizes(reads["train"])
    crops = _choose_crops(config, labels, sizes)
    splits = {}
    for split, wanted in chosen.items():
        num, count = counts[split]
        if split == "test" and "test" not in (config.splits or {}) and not _has_labels(reads[split]):
            notes.append(
                f"test: the {num:,} images of {wanted} have no labels, so they cannot be used for evaluation; left out."
            )
            tally.leave_out(_UNLABELLED, wanted, num, was_seen=True)
            continue
        splits[split] = TfdsSplit(wanted, num, image_size, reads[split], lookup, count, config.aspect, *crops[:2])
    return _bundle(config, labels, splits, [*notes, crops[2]], Reading(what="images", seen=tally.seen), tally)


def _count_unused(builder: Any, slices: dict[str, list[Slice]]) -> Tally:
    """Count all records of a data set, and those outside all slices as left out, by the name of their split."""
    tally = Tally()
    used = [own for split in slices.values() for own in split]
    for name, info in builder.info.splits.items():
        tally.seen += info.num_examples
        rest = info.num_examples - sum(stop - start for other, start, stop in used if other == name)
        if rest > 0:
            tally.leave_out(_UNUSED, name, rest, was_seen=True)
    return tally


def _load_image_folder(config: DataConfig, image_size: int) -> DataBundle:
    """Return the bundle of class folders, of which only the paths of the images are held in memory."""
    if config.path is None:
        raise DataError("data.path: name image_folder needs the folder that holds train/<class>/<image>.")
    root = expand_home(config.path)
    if not root.is_dir():
        raise MissingDataError(
            f"{root}: there is no such folder. Put the images there as train/<class>/<image> and "
            "validation/<class>/<image>, or set data.path."
        )
    tally = Tally(root)
    splits = scan_folder(root, config.folders, tally)
    files = [file for split in splits.values() for file in split]
    odd = next((file.id for file in files if not file.id.casefold().endswith(_SUFFIXES)), None)
    if odd is not None:
        raise DataError(
            f"{root / odd}: source tfds decodes {', '.join(_SUFFIXES)} only. Convert the file, or use source folder."
        )
    names = sorted({file.class_name for file in files})
    mapping = match_labels(names, config.labels)
    labels = order_labels(label for label in mapping.values() if label is not None)
    chosen, notes = _choose_splits(config, tuple(splits))
    held_out = "validation" not in (config.splits or {}) and chosen.get("validation", "").startswith("train[")
    folders = {split: SPLIT_NAMES.get(wanted.casefold(), wanted) for split, wanted in chosen.items()}
    if held_out:
        folders |= {"train": "train", "validation": "held_out"}
        splits |= _hold_out(splits["train"], mapping, seed=config.seed)
    _check_disjoint({split: [(folder, 0, len(splits.get(folder, ())))] for split, folder in folders.items()})
    found = {}
    for split, wanted in chosen.items():
        if folders[split] not in splits:
            raise DataError(
                f"data.splits: found {wanted!r}, expected a folder of {root} ({', '.join(splits)}); class folders have no slices."
            )
        found[split] = _list_files(splits[folders[split]], mapping, labels)
    _count_unused_files(splits, set(folders.values()), mapping, tally)
    absent = [label for index, label in enumerate(labels) if not (found["train"][1] == index).any()]
    if absent:
        raise DataError(f"{root}: train has no image of {', '.join(absent)}; a class needs images to be learned.")
    sizes = _sample_file_sizes(root, found["train"][0])
    crops = _choose_crops(config, labels, sizes)
    streams = {}
    for split, (ids, targets) in found.items():
        # Paths are sorted by class; shuffling them once makes the first n a sample of all classes.
        rows = np.random.default_rng(config.seed).permutation(
            draw_indices(targets, ids, getattr(config.num_images, split), seed=config.seed)
        )
        for file in np.delete(ids, rows):
            tally.leave_out(NOT_DRAWN, str(file), was_seen=True)
        read = make_file_reader(root, ids[rows], targets[rows])
        count = partial(np.bincount, targets[rows], minlength=len(labels))
        lookup = np.arange(len(labels))
        name = chosen[split]
        streams[split] = TfdsSplit(name, len(rows), image_size, read, lookup, count, config.aspect, *crops[:2])
    notes = [*tally.notes, *notes, crops[2]]
    return _bundle(config, labels, streams, notes, Reading(seen=tally.seen), tally)


def _count_unused_files(
    splits: Mapping[str, Sequence[ImageFile]], used: set[str], mapping: Mapping[str, str | None], tally: Tally
) -> None:
    """Count the files of dropped classes and of unused splits as left out."""
    for split, files in splits.items():
        for file in files:
            if split not in used:
                tally.leave_out(_UNUSED, file.id, was_seen=True)
            elif mapping[file.class_name] is None:
                tally.leave_out(DROPPED, file.id, was_seen=True)


def _list_files(
    files: Sequence[ImageFile], mapping: Mapping[str, str | None], labels: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids (str [N]) and targets (int64 [N]) of the files whose class is not dropped."""
    kept = [file for file in files if mapping[file.class_name] is not None]
    targets = np.array([labels.index(mapping[file.class_name]) for file in kept], np.int64)
    return np.array([file.id for file in kept], dtype=str), targets


def _hold_out(
    files: Sequence[ImageFile], mapping: Mapping[str, str | None], *, seed: int
) -> dict[str, list[ImageFile]]:
    """Divide train into a stratified tenth, "held_out", and the rest, "train"."""
    files = [file for file in files if mapping[file.class_name] is not None]
    classes = np.unique([file.class_name for file in files], return_inverse=True)[1]
    ids = np.array([file.id for file in files])
    chosen = set(draw_indices(classes, ids, max(1, len(files) // HELD_OUT), seed=seed).tolist())
    return {
        "train": [file for row, file in enumerate(files) if row not in chosen],
        "held_out": [file for row, file in enumerate(files) if row in chosen],
    }


def _sample_file_sizes(root: Path, ids: np.ndarray) -> list[tuple[int, int]]:
    """Return (height, width) of a sample of the files, spread evenly; files that cannot be decoded are skipped."""
    rows = np.unique(np.linspace(0, len(ids) - 1, NUM_SAMPLED).astype(int))
    return _measure(root / name for name in ids[rows])


def _sample_record_sizes(read: Read) -> list[tuple[int, int]]:
    """Return (height, width) of the first images that a reader of records yields."""
    examples = read(None, 0, WHOLE).take(NUM_SAMPLED).as_numpy_iterator()
    return _measure(io.BytesIO(encoded) for encoded, _, _ in examples)


def _measure(sources: Iterable[Path | io.BytesIO]) -> list[tuple[int, int]]:
    from PIL import Image, UnidentifiedImageError

    sizes = []
    for source in sources:
        try:
            # Only the header is read.
            with Image.open(source) as image:
                width, height = image.size
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
            continue
        sizes.append((height, width))
    return sizes


def _has_labels(read: Read) -> bool:
    return all(target >= 0 for _, target, _ in read(None, 0, WHOLE).take(NUM_SAMPLED).as_numpy_iterator())


def _choose_crops(
    config: DataConfig, labels: tuple[str, ...], sizes: Sequence[tuple[int, int]]
) -> tuple[str, str, str]:
    """Return the crops of training images and of all other images, and a note on both with the reason.

    Args:
        config: the data section; its `crop` takes precedence where it is not null.
        labels: the labels; expressions mean that the images show faces.
        sizes: (height, width) of some of the training images.
    """
    side = sizes[0][0] if sizes else 0
    are_small = side <= SMALL_SIDE and set(sizes) == {(side, side)}
    folder = Path(config.path or "").name if config.name == IMAGE_FOLDER else ""
    if are_expressions(labels) or _FACES.search(f"{config.name} {folder}"):
        train, reason = "none", "they show faces, which crops would cut"
    elif are_small:
        train, reason = "none", f"they are squares of {side} pixels, cropped already"
    elif config.needs_memory is not None:
        train, reason = "none", f"{config.needs_memory} needs them in memory"
    else:
        train, reason = "random_resized", "they are large or differ in size, as ImageNet's"
    if config.crop.train is not None:
        train, reason = config.crop.train, "as set"
    other = config.crop.validation or ("center" if train == "random_resized" else "none")
    kinds = {"random_resized": "random crops", "none": "whole", "pad": "whole, padded", "center": "the central 87.5 %"}
    return (
        train,
        other,
        f"Images are seen in training: {kinds[train]}; otherwise: {kinds[other]} (data.crop; {reason}).",
    )


def _bundle(
    config: DataConfig,
    labels: tuple[str, ...],
    splits: dict[str, TfdsSplit],
    notes: list[str],
    reading: Reading,
    tally: Tally,
) -> DataBundle:
    """Return a bundle of the splits, read into memory where possible; `reading` gets the counts of the tally."""
    if len(labels) < 2:
        raise DataError(f"data: found one class only ({', '.join(labels)}), expected at least two.")
    for key, split in splits.items():
        if not len(split):
            raise DataError(f"data: {key} ({split.name}) has no images, expected at least one; see data.splits.")
    num_bytes = sum(len(split) * split.image_size**2 * 3 for split in splits.values())
    is_held = splits["train"].train_crop != "random_resized" and num_bytes < MAX_SPLIT_BYTES
    found = {key: read_split(split) if is_held or key == "test" else split for key, split in splits.items()}
    test = found.get("test")
    if test is not None and not isinstance(test, Split):
        too_large = (
            f"its {len(test):,} images at {test.image_size} px do not fit into {MAX_SPLIT_BYTES / 1e9:.0f} GB of memory; "
            "set data.num_images.test."
        )
        if "test" in (config.splits or {}):
            raise DataError(f"data.splits.test: {too_large}")
        tally.leave_out(_TOO_LARGE, test.name, len(test), was_seen=True)
        notes, test = [*notes, f"test ({test.name}) is not evaluated: {too_large}"], None
    return DataBundle(
        "tfds",
        labels,
        found["train"],
        found["validation"],
        test,
        selected_on=splits["validation"].name,
        notes=tuple(notes),
        reading=dataclasses.replace(reading, left_out=tally.list_left_out()),
    )


def _choose_splits(config: DataConfig, available: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
    """Return the data set's name of each split, from data.splits or else the first usual name it has; and notes.

    A split that data.splits uses for another purpose is not taken. If there are only train and test, a tenth of train
    is the validation split, because the test split must not be used for selection.
    """
    chosen: dict[str, str] = dict(config.splits or {})
    used = re.findall(r"\w+", " ".join(chosen.values()))
    for split, candidates in _CANDIDATES.items():
        name = next((name for name in candidates if name in available and name not in used), None)
        if split not in chosen and name is not None:
            chosen[split] = name
    notes = []
    if "validation" not in chosen and chosen.get("train") == "train" and "test" in chosen:
        kept = 100 - 100 // HELD_OUT
        chosen |= {"train": f"train[:{kept}%]", "validation": f"train[{kept}%:]"}
        notes.append(
            f"{config.name} has no validation split: one in {HELD_OUT} images of train is the validation split, and test judges the model. "
            "Duplicates may stand on both sides; data.splits says otherwise."
        )
    missing = [split for split in ("train", "validation") if split not in chosen]
    if missing:
        raise DataError(
            f"data.splits: {config.name} has the splits {', '.join(available)}, and none that is plainly {missing[0]}. "
            "Name one, e.g. splits: {train: 'train[:90%]', validation: 'train[90%:]'}."
        )
    return {split: chosen[split] for split in _CANDIDATES if split in chosen}, notes


def prepare_data_set(config: DataConfig, say: Callable[[str], None] | None = None) -> Any:
    """Return the builder of a tensorflow_datasets data set, and prepare its records first if they are missing.

    Args:
        config: the data section; its path is written only if the data set is not prepared.
        say: receives a message that preparation begins; tensorflow_datasets shows its progress.

    Raises:
        DataError: tensorflow_datasets has no such data set.
        MissingDataError: its files are missing, or its folder cannot be written.
    """
    import tensorflow_datasets as tfds

    if re.split("[:/]", config.name)[0] == "imagenet2012":
        check_imagenet2012(config.path)
    builder = find_builder(config)
    if builder.is_prepared():
        return builder
    folder = find_data_dir(config.path).absolute()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not os.access(existing, os.W_OK):
        raise MissingDataError(
            f"{builder.data_dir}: the data set {config.name} is not prepared, and {existing} cannot be written. {_PREPARE}"
        )
    if say is not None:
        say(f"preparing {config.name} in {builder.data_dir}; of a large data set this takes hours")
    download = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        # tensorflow_datasets prints progress, but only results belong on standard output.
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare(download_config=download)
    except (AssertionError, OSError) as error:
        raise MissingDataError(
            f"{builder.data_dir}: the data set {config.name} is not there and cannot be prepared: {shorten(error, builder.data_dir, most=1000)} {_PREPARE}"
        ) from error
    return builder


def find_builder(config: DataConfig) -> Any:
    """Return the builder of a tensorflow_datasets data set without reading or preparing records.

    Raises:
        DataError: tensorflow_datasets has no such data set.
    """
    import tensorflow_datasets as tfds

    if re.split("[:/]", config.name)[0] == "fer2013":
        importlib.import_module("dlfer.data.tfds_fer2013")
    path = None if config.path is None else str(expand_home(config.path))
    try:
        return tfds.builder(config.name, data_dir=path)
    except tfds.core.DatasetNotFoundError as error:
        known = [IMAGE_FOLDER, *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(config.name, known, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else " https://www.tensorflow.org/datasets lists them."
        raise DataError(f"data.name: tensorflow_datasets knows no data set {config.name!r}.{hint}") from error
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"data.name: tensorflow_datasets finds no such form of {config.name!r}: {shorten(error)}. Expected NAME, "
            "NAME/CONFIG or NAME:VERSION, as https://www.tensorflow.org/datasets lists them."
        ) from error


def name_labels(builder: Any) -> tuple[str, ...]:
    """Return the labels that a data set declares, in the order of its targets.

    Raises:
        DataError: the data set has no image or no class label.
    """
    features = builder.info.features
    return tuple(features[_find_features(builder.name, features)[1]].names)


def _find_features(name: str, features: Any) -> tuple[str, str]:
    """Return the keys of the image and of the class label; the keys "image" and "label" take precedence."""
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


def _resolve_slices(builder: Any, wanted: str, name: str) -> list[Slice]:
    """Return the ranges of records that a split specification means, e.g. "train[:90%]" or "train+validation"."""
    import tensorflow_datasets as tfds

    infos = builder.info.splits
    try:
        found = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(infos)
    except (KeyError, ValueError, AssertionError, NotImplementedError) as error:
        raise DataError(_describe_split(name, wanted, tuple(infos))) from error
    return [
        (piece.splitname, piece.from_ or 0, infos[piece.splitname].num_examples if piece.to is None else piece.to)
        for piece in found
    ]


def _check_disjoint(splits: dict[str, list[Slice]]) -> None:
    """Raise ProtocolError if two splits share an image."""
    for first, second in itertools.combinations(splits, 2):
        for (name, start, stop), (other, begin, end) in itertools.product(splits[first], splits[second]):
            if name == other and max(start, begin) < min(stop, end):
                raise ProtocolError(
                    f"data.splits: {first} and {second} both hold the images {max(start, begin)} to "
                    f"{min(stop, end) - 1} of {name!r}. Give each split images of its own, "
                    f"e.g. '{name}[:90%]' and '{name}[90%:]'."
                )


def _describe_split(name: str, wanted: str, available: tuple[str, ...]) -> str:
    return f"data.splits: found {wanted!r}, expected a split of {name} ({', '.join(available)}) or a slice of one."
