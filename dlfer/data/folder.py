"""Class folders: one folder per class, in folders train, validation and test, or without splits."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Reading, Split
from dlfer.data.fer2013_csv import USAGES
from dlfer.data.files import Tally
from dlfer.data.images import compute_side, read_header, read_image, resize_square, to_channels
from dlfer.data.labels import DROPPED, describe_merged, describe_unknown, match_labels, order_labels
from dlfer.data.layout import SPLIT_NAMES, ImageFile, Splits, scan_folder
from dlfer.data.split import draw_indices
from dlfer.errors import DataError, MissingDataError

__all__ = ["SPLIT_NAMES", "ImageFile", "Splits", "load_folder", "load_splits", "scan_folder", "try_each"]

NOT_DRAWN = "not drawn (data.num_images)"
UNREADABLE = "unreadable (data.skip_unreadable)"
_LARGEST_SIDE = 256


def load_folder(config: DataConfig, *, image_size: int) -> DataBundle:
    """Return the images of class folders.

    The splits are the folders train, val/valid/validation and test under any of their usual names, FER2013's own
    among them, or as `config.folders` says; without them all classes are one split, `train`, for the protocol to split.
    What is no picture is counted in the bundle's reading, and so is every image that is not used. The labels are the names of the
    folders after `config.labels`, sorted. Ids are paths relative to `config.path`. Images keep
    their size if it is the same for all; otherwise they become squares, as `config.aspect` says, of
    `config.size`, or of the median shorter side (pad: longer side), at most 256 or `image_size`,
    whichever is larger. They are grey (one channel) only if all of them are. Files beyond
    `config.num_images` are not opened.

    Raises:
        MissingDataError: the folder is not there.
        DataError: no classes, a class without images, a folder of which it is not known whether it is a split or a
            class, or (unless config.skip_unreadable) a file that cannot be read.
    """
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise MissingDataError(
            f"{root}: there is no such folder. Put the images there as <class>/<image>, or as train/<class>/<image> "
            "with validation/ and test/ beside it, or set data.path."
        )
    tally = Tally(root)
    splits = scan_folder(root, config.folders, tally)
    names = {split: own for split, files in splits.items() if (own := _find_usage(files))}
    return load_splits(root, splits, config, image_size=image_size, names=names, tally=tally)


def _find_usage(files: Sequence[ImageFile]) -> str | None:
    """Return FER2013's own name of a split if the folder of all its files has it."""
    found = {next((name for name in file.id.split("/") if name in USAGES), None) for file in files}
    return found.pop() if len(found) == 1 else None


def load_splits(
    root: Path,
    splits: Splits,
    config: DataConfig,
    *,
    image_size: int,
    names: Mapping[str, str] | None = None,
    tally: Tally | None = None,
) -> DataBundle:
    """Return a bundle of the files of each split; labels, draw and size as `load_folder` says.

    Args:
        root: the folder that the ids are relative to.
        splits: files of train, validation and test; a split may be absent or empty.
        image_size: side in pixels that the network sees.
        names: the name to give to each split, where it differs.
        tally: what was counted when the folders were scanned; it counts on.

    Raises:
        DataError: as `load_folder`.
    """
    splits = {split: files for split, files in splits.items() if files}
    mapping = match_labels((file.class_name for files in splits.values() for file in files), config.labels)
    labels = order_labels(label for label in mapping.values() if label is not None)
    tally = Tally(root) if tally is None else tally
    drawn = {}
    for split, files in splits.items():
        kept = [file for file in files if mapping[file.class_name] is not None]
        for file in files:
            if mapping[file.class_name] is None:
                tally.leave_out(DROPPED, file.id, was_seen=True)
        targets = np.array([labels.index(mapping[file.class_name]) for file in kept], np.int64)
        ids = np.array([file.id for file in kept])
        rows = draw_indices(targets, ids, getattr(config.num_images, split), seed=config.seed)
        for name in np.delete(ids, rows):
            tally.leave_out(NOT_DRAWN, str(name), was_seen=True)
        drawn[split] = (ids[rows], targets[rows])
    images, kept_rows, more, reading = _read_all(root, [ids for ids, _ in drawn.values()], config, image_size)
    loaded: dict[str, Split | None] = {"train": None, "validation": None, "test": None}
    for (split, (ids, targets)), pixels, rows in zip(drawn.items(), images, kept_rows, strict=True):
        for name in np.delete(ids, rows):
            tally.leave_out(UNREADABLE, str(name), was_seen=True)
        loaded[split] = Split((names or {}).get(split, split), pixels, targets[rows], ids[rows])
    reading = dataclasses.replace(reading, seen=tally.seen, left_out=tally.list_left_out())
    counts = Counter(file.class_name for files in splits.values() for file in files)
    notes = (*tally.notes, *describe_merged(mapping, config.labels), *describe_unknown(mapping, counts), *more)
    return DataBundle("folder", labels, **loaded, notes=notes, reading=reading)


def _read_all(
    root: Path, splits: list[np.ndarray], config: DataConfig, image_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[str], Reading]:
    """Return the images of each split, the rows (int) of its ids that could be read, notes, and what was met with."""
    paths = [root / name for ids in splits for name in ids]
    max_pixels = int(config.max_megapixels * 1_000_000)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers, problems = try_each(pool, partial(read_header, max_pixels=max_pixels), paths, config.skip_unreadable)
        good = [header for header in headers if header is not None]
        if not good:
            raise DataError(f"{root}: none of the {len(paths)} images can be read; the first: {problems[0]}")
        size, note = _choose_size([header[:2] for header in good], config, image_size)
        channels = 1 if all(grey for _, _, grey in good) else 3
        height, width = size
        store = np.zeros((len(paths), height, width, channels), np.uint8)

        def read_into(row: int) -> bool:
            if headers[row] is None:
                return False
            pixels = read_image(paths[row], max_pixels=max_pixels)
            if pixels.shape[:2] != size:
                pixels = resize_square(pixels, height, config.aspect)
            if pixels.shape[:2] != size:
                raise DataError(f"{paths[row]}: found another size than its header says, expected {width} x {height}.")
            store[row] = to_channels(pixels, channels)
            return True

        read, more = try_each(pool, read_into, range(len(paths)), config.skip_unreadable)
    problems += more
    if channels == 3 and _is_grey(store):
        store = store[..., :1]
    notes = [note] if note else []
    if problems:
        notes.append(
            f"{root}: {len(problems)} of {len(paths)} images could not be read and were left out; "
            f"the first: {problems[0]}"
        )
    images, rows, start = [], [], 0
    for ids in splits:
        kept = np.flatnonzero([bool(done) for done in read[start : start + len(ids)]])
        block = store[start : start + len(ids)]
        images.append(np.ascontiguousarray(block if len(kept) == len(ids) else block[kept]))
        rows.append(kept)
        start += len(ids)
    sizes = {}
    if len({header[:2] for header in good}) > 1:
        names = [str(name) for ids in splits for name in ids]
        sizes = {name: header[:2] for name, header in zip(names, headers, strict=True) if header is not None}
    return images, rows, notes, Reading(unreadable=tuple(problems), sizes=sizes)


def try_each(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any], skip: bool
) -> tuple[list[Any], list[str]]:
    """Return function(item) of each item in order, None where it raised DataError and `skip` is set; and the messages of these errors."""

    def attempt(item: Any) -> tuple[Any, str | None]:
        try:
            return function(item), None
        except DataError as error:
            if not skip:
                raise
            return None, str(error)

    results = list(pool.map(attempt, items))
    return [value for value, _ in results], [problem for _, problem in results if problem]


def _choose_size(
    sizes: list[tuple[int, int]], config: DataConfig, image_size: int
) -> tuple[tuple[int, int], str | None]:
    """Return the (height, width) to store, and a note where images of (width, height) are cropped, padded or resized."""
    side = config.size
    if side is None and len(set(sizes)) == 1:
        width, height = sizes[0]
        return (height, width), None
    if side is None:
        squares = [compute_side(*size, config.aspect) for size in sizes]
        side = int(min(np.median(squares), max(_LARGEST_SIDE, image_size)))
        why = "their sizes differ; set data.size to choose another"
    else:
        why = "data.size"
    changed = sum(size != (side, side) for size in sizes)
    done = "padded to a square" if config.aspect == "pad" else "cropped to their central square"
    note = f"{changed} of {len(sizes)} images were {done} and resized to {side} px ({why})."
    return (side, side), note if changed else None


def _is_grey(images: np.ndarray) -> bool:
    """Tell whether all RGB images have three equal channels; in blocks, and it stops at the first that has not."""
    for start in range(0, len(images), 256):
        block = images[start : start + 256]
        if not (np.array_equal(block[..., 0], block[..., 1]) and np.array_equal(block[..., 0], block[..., 2])):
            return False
    return True
