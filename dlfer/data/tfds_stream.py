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
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split, StreamedSplit
from dlfer.data.layout import PART_NAMES, scan_folder
from dlfer.data.labels import index_labels, match_labels, order_labels
from dlfer.data.split import draw_indices
from dlfer.data.tfds_read import Slice, TfdsSplit, cut_slices, make_file_reader, make_record_reader
from dlfer.errors import DataError, MissingDataError, ProtocolError

ARCHIVES = {
    "ILSVRC2012_img_train.tar": 147_897_477_120,
    "ILSVRC2012_img_val.tar": 6_744_924_160,
}
"""The files that are fetched by hand, with their sizes in bytes."""

MD5 = {
    "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
    "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
}
"""Told to the user, not computed: hashing 150 GB takes as long as reading them."""

FREE_BYTES = 300_000_000_000
"""What preparing takes besides the archives: the records, and as much again while they are shuffled."""


def check_imagenet2012(data_dir: str | Path | None) -> None:
    """Raise unless ImageNet is prepared under `data_dir`, or can be prepared from its archives there.

    tensorflow_datasets finds a missing or truncated archive only after hours; this takes no time
    and loads no TensorFlow.

    Args:
        data_dir: the folder of data sets; None is the default of tensorflow_datasets
            ($TFDS_DATA_DIR, or ~/tensorflow_datasets).

    Raises:
        MissingDataError: all that is wrong, and how ImageNet is obtained.
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
    """Return the folder of data sets, as tensorflow_datasets finds it."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _describe_archive(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path}: not there, expected {size:,} bytes"
    found = path.stat().st_size
    if found != size:
        return f"{path}: found {found:,} bytes, expected {size:,}; fetch it again"
    return None


def _explain(manual: Path) -> str:
    sizes = " and ".join(f"{name} ({size:,} bytes, MD5 {MD5[name]})" for name, size in ARCHIVES.items())
    return (
        "Obtain ImageNet (ILSVRC 2012) from https://image-net.org: register, accept the terms (non-commercial research "
        f"and education), and put {sizes} into {manual}. "
        "The shortcut is the published weights: --set pretrain.weights=imagenet."
    )


IMAGE_FOLDER = "image_folder"
MAX_SPLIT_BYTES = 2_000_000_000

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
_CANDIDATES = {"train": ("train",), "validation": ("validation", "val", "valid", "test"), "test": ()}


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
        importlib.import_module("dlfer.data.fer2013")
    builder = _prepare(config)
    features = builder.info.features
    image_key, label_key = _find_features(config.name, features)
    names = list(features[label_key].names)
    labels, lookup = index_labels(names, config.labels)
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
        read = make_record_reader(builder, cut_slices(slices[part], 0, num), image_key, label_key)
        splits[part] = TfdsSplit(wanted, num, image_size, read, lookup, config.aspect)
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
        read = make_file_reader(root, ids[rows], targets[rows])
        splits[part] = TfdsSplit(wanted, len(rows), image_size, read, np.arange(len(labels)), config.aspect)
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


def _resolve_slices(builder: Any, wanted: str, name: str) -> list[Slice]:
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


def _check_disjoint(parts: dict[str, list[Slice]]) -> None:
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
