"""Class folders: one folder per class, in folders train, validation and test, or without parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Reading, Split
from dlfer.data.images import SUFFIXES, compute_side, read_header, read_image, resize_square, to_channels
from dlfer.data.labels import match_labels, order_labels
from dlfer.data.split import draw_indices
from dlfer.errors import DataError, MissingDataError

PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders that are parts and not classes, in lower case."""

_LARGEST_SIDE = 256


@dataclass(frozen=True)
class ImageFile:
    """An image file of a class: `id` is its path relative to the root, with /."""

    id: str
    class_name: str


Parts = dict[str, list[ImageFile]]


def load_folder(config: DataConfig, *, image_size: int) -> DataBundle:
    """Return the images of class folders.

    The parts are the folders train, val/valid/validation and test where there is a train; else
    all classes are one part, `train`, for the protocol to split. The labels are the names of the
    folders after `config.labels`, sorted. Ids are paths relative to `config.path`. Images keep
    their size if it is the same for all; otherwise they become squares, as `config.aspect` says, of
    `config.size`, or of the median shorter side (pad: longer side), at most 256 or `image_size`,
    whichever is larger. They are grey (one channel) only if all of them are. Files beyond
    `config.num_images` are not opened.

    Raises:
        MissingDataError: the folder is not there.
        DataError: no classes, a class without images or in one part only, or (unless
            config.skip_unreadable) a file that cannot be read.
    """
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise MissingDataError(
            f"{root}: there is no such folder. Put the images there as <class>/<image>, or as train/<class>/<image> "
            "with validation/ and test/ beside it, or set data.path."
        )
    return load_parts(root, scan_folder(root), config, image_size=image_size)


def scan_folder(root: Path) -> Parts:
    """Return the image files of each part below `root`, sorted by path; without parts, all are `train`.

    Raises:
        DataError: no class folders, or a class folder without images.
    """
    children = _list_folders(root)
    found = {PART_NAMES[child.casefold()]: child for child in children if child.casefold() in PART_NAMES}
    if "train" in found:
        twice = [child for child in children if child.casefold() in PART_NAMES and child not in found.values()]
        if twice:
            raise DataError(
                f"{root}: found the folders {', '.join(children)}; {twice[0]} is a part that is there twice."
            )
        return {part: _scan_classes(root, found[part]) for part in ("train", "validation", "test") if part in found}
    if found and len(found) == len(children):
        raise DataError(f"{root}: found the folders {', '.join(children)}, expected train beside them.")
    return {"train": _scan_classes(root, "")}


def load_parts(
    root: Path,
    parts: Parts,
    config: DataConfig,
    *,
    image_size: int,
    names: Mapping[str, str] | None = None,
) -> DataBundle:
    """Return a bundle of the files of each part; labels, draw and size as `load_folder` says.

    Args:
        root: the folder that the ids are relative to.
        parts: files of train, validation and test; a part may be absent or empty.
        config: the data section.
        image_size: side in pixels that the network sees.
        names: the name to give to each part, where it differs.

    Raises:
        DataError: as `load_folder`.
    """
    parts = {part: files for part, files in parts.items() if files}
    mapping = match_labels((file.class_name for files in parts.values() for file in files), config.labels)
    labels = order_labels(label for label in mapping.values() if label is not None)
    _check_classes(root, parts, mapping, labels)
    drawn, notes = {}, []
    for part, files in parts.items():
        kept = [file for file in files if mapping[file.class_name] is not None]
        targets = np.array([labels.index(mapping[file.class_name]) for file in kept], np.int64)
        ids = np.array([file.id for file in kept])
        rows = draw_indices(targets, ids, getattr(config.num_images, part), seed=config.seed)
        drawn[part] = (ids[rows], targets[rows])
    images, kept_rows, more, reading = _read_all(root, [ids for ids, _ in drawn.values()], config, image_size)
    notes += more
    splits: dict[str, Split | None] = {"train": None, "validation": None, "test": None}
    for (part, (ids, targets)), pixels, rows in zip(drawn.items(), images, kept_rows, strict=True):
        splits[part] = Split((names or {}).get(part, part), pixels, targets[rows], ids[rows])
    return DataBundle("folder", labels, **splits, notes=tuple(notes), reading=reading)


def _list_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _scan_classes(root: Path, part: str) -> list[ImageFile]:
    """List the images of each class folder in root/part, those in folders below it included."""
    base = root / part
    classes = _list_folders(base)
    if not classes:
        raise DataError(f"{base}: found no class folders, expected <class>/<image>.")
    files = []
    for class_name in classes:
        found = []
        for folder, folders, entries in os.walk(base / class_name):
            folders[:] = sorted(child for child in folders if not child.startswith("."))
            below = Path(folder).relative_to(root).as_posix()
            images = (name for name in entries if not name.startswith(".") and name.casefold().endswith(SUFFIXES))
            found += [f"{below}/{name}" for name in images]
        if not found:
            raise DataError(
                f"{base / class_name}: the class folder holds no images ({', '.join(SUFFIXES)}). Fill it or delete it."
            )
        files += [ImageFile(path, class_name) for path in sorted(found)]
    return files


def _check_classes(root: Path, parts: Parts, mapping: dict[str, str | None], labels: tuple[str, ...]) -> None:
    """Raise DataError where a part lacks a class that another has."""
    for part, files in parts.items():
        present = {mapping[name] for name in {file.class_name for file in files}}
        missing = [label for label in labels if label not in present]
        if missing:
            raise DataError(
                f"{root}: {part} has no folder for the class {missing[0]!r}"
                + (f" (nor for {len(missing) - 1} others)" if len(missing) > 1 else "")
                + "; the same classes are expected in every part. Add its images, or set "
                f"data.labels.drop: [{', '.join(missing[:5])}]."
            )


def _read_all(
    root: Path, parts: list[np.ndarray], config: DataConfig, image_size: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[str], Reading]:
    """Return the images of each part, the rows (int) of its ids that could be read, notes, and what was met with."""
    paths = [root / name for ids in parts for name in ids]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers, problems = _try_each(pool, read_header, paths, config.skip_unreadable)
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
            pixels = read_image(paths[row])
            if pixels.shape[:2] != size:
                pixels = resize_square(pixels, height, config.aspect)
            if pixels.shape[:2] != size:
                raise DataError(f"{paths[row]}: found another size than its header says, expected {width} x {height}.")
            store[row] = to_channels(pixels, channels)
            return True

        read, more = _try_each(pool, read_into, range(len(paths)), config.skip_unreadable)
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
    for ids in parts:
        kept = np.flatnonzero([bool(done) for done in read[start : start + len(ids)]])
        block = store[start : start + len(ids)]
        images.append(np.ascontiguousarray(block if len(kept) == len(ids) else block[kept]))
        rows.append(kept)
        start += len(ids)
    sizes = {}
    if len({header[:2] for header in good}) > 1:
        names = [str(name) for ids in parts for name in ids]
        sizes = {name: header[:2] for name, header in zip(names, headers, strict=True) if header is not None}
    return images, rows, notes, Reading(unreadable=tuple(problems), sizes=sizes)


def _try_each(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any], skip: bool
) -> tuple[list[Any], list[str]]:
    """Return function(item) of each item in order, None where it raised DataError and `skip` is set; and the errors."""

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
