"""Reader of class folders: one folder per class, in folders train, validation and test, or without splits.

The folders' names decide which of them are splits, which are classes, and which are neither.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.config.names import expand_home
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Reading, Split
from dlfer.data.fer2013_csv import USAGES
from dlfer.data.files import (
    HIDDEN,
    LOOP,
    NO_PICTURES,
    PICTURE_SUFFIXES,
    Tally,
    count_files,
    find_rejection_reason,
    identify,
    list_files,
    list_folders,
    list_pictures,
    normalise_name,
)
from dlfer.data.images import compute_side, read_header, read_image, resize_to, to_channels
from dlfer.data.labels import CANONICAL, DROPPED, describe_merged, describe_unknown, match_labels, order_labels
from dlfer.data.split import draw_indices
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.text import count_noun

NOT_DRAWN = "not drawn (data.num_images)"
UNREADABLE = "unreadable (data.skip_unreadable)"
_LARGEST_SIDE = 256


def load_folder(config: DataConfig, *, image_size: int) -> DataBundle:
    """Read the images of class folders.

    The splits are the folders train, validation and test under any of their usual names (including FER2013's), or as
    `config.folders` says; without them all classes form one split, `train`, which the protocol divides. Files that are
    not images, and images that are not used, are counted in the bundle's `reading`. The labels are the folder names
    mapped by `config.labels`, sorted. Ids are paths relative to `config.path`. Images that all have the same size keep
    it unless `config.size` is set; otherwise they become squares (by `config.aspect`) of `config.size` or, by default,
    of the median shorter side (pad: longer side), at most 256 or `image_size`, whichever is larger. The images have
    one channel only if all of them are grey. Files beyond `config.num_images` are not opened.

    Raises:
        MissingDataError: the folder does not exist.
        DataError: there are no classes, a class has no images, a folder may be a split or a class, or (unless
            config.skip_unreadable) a file cannot be read.
    """
    root = expand_home(config.path)
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
    """Return the name in FER2013 of a split, if all its files are in a folder with that name; else None."""
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
    """Read the files of each split into a bundle; labels, draw and size are described at `load_folder`.

    Args:
        root: the folder that the ids are relative to.
        splits: files of train, validation and test; a split may be absent or empty.
        image_size: side in pixels of the network's input.
        names: split -> its name in the bundle, where it is another one.
        tally: the counts of the scan, which are continued.

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
    """Return the images of each split, the rows (int) of its readable ids, notes, and the record of the reading."""
    paths = [root / name for ids in splits for name in ids]
    max_pixels = int(config.max_megapixels * 1_000_000)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        headers, problems = try_each(pool, partial(read_header, max_pixels=max_pixels), paths, config.skip_unreadable)
        good = [header for header in headers if header is not None]
        if not good:
            raise DataError(f"{root}: none of the {len(paths)} images can be read; the first: {problems[0]}")
        size, note = _choose_size([header[:2] for header in good], config, image_size)
        channels = 1 if all(grey for _, _, grey in good) else 3
        store = np.zeros((len(paths), *size, channels), np.uint8)

        def read_into(row: int) -> bool:
            if headers[row] is None:
                return False
            pixels = read_image(paths[row], max_pixels=max_pixels)
            if pixels.shape[:2] != size:
                pixels = resize_to(pixels, size, config.aspect)
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
    """Return function(item) of each item, in order, and the DataErrors' messages; with `skip`, failures are None."""

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
    """Return the (height, width) to store, and a note if images of (width, height) have to be fitted to it."""
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
    """Return whether all RGB images have three equal channels, compared in blocks to stop at the first difference."""
    for start in range(0, len(images), 256):
        block = images[start : start + 256]
        if not (np.array_equal(block[..., 0], block[..., 1]) and np.array_equal(block[..., 0], block[..., 2])):
            return False
    return True


SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "dev", "devel", "development", "publictest"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "tst", "privatetest"), "test"),
}
"""Lower-case folder name -> the split that it names; publictest and privatetest are FER2013's names."""

_EVALUATION = ("eval", "evaluation")
_FILLERS = frozenset(
    [
        "set",
        "sets",
        "data",
        "dataset",
        "images",
        "image",
        "imgs",
        "img",
        "pictures",
        "photos",
        "split",
        "splits",
        "part",
        "folder",
        "samples",
    ]
)
_GLUED = re.compile(r"(\w+?)(?:set|data|images|imgs)")
_LEVELS = _FILLERS | {"faces", "fer2013", "archive", "raw", "crops", "cropped"}
_OUTSIDE = "files beside the folders"
_UNKNOWN = "files in folders beside the splits"
_IGNORED = "files in folders that data.folders ignores"


@dataclass(frozen=True)
class ImageFile:
    """An image file and the name of its class; `id` is the path relative to the root, with /."""

    id: str
    class_name: str


Splits = dict[str, list[ImageFile]]


def name_split(name: str) -> str | None:
    """Return the split that a folder's name means: "train", "validation", "test" or "evaluation"; None for others.

    Case, leading numbers and generic words for data around the name are ignored: "Train_Set", "test-images".
    """
    words = re.split(r"[\W_]+", normalise_name(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)))
    while words and words[0].isdecimal():
        words = words[1:]
    joined = "".join(word for word in words if word not in _FILLERS)
    glued = _GLUED.fullmatch(joined)
    for word in (joined, glued[1] if glued else ""):
        if word in _EVALUATION:
            return "evaluation"
        if word in SPLIT_NAMES:
            return SPLIT_NAMES[word]
    return None


def scan_folder(root: Path, folders: Mapping[str, str] | None = None, tally: Tally | None = None) -> Splits:
    """Return the image files of each split below `root`, sorted by path; without split folders, all are `train`.

    Args:
        root: the folder of the splits or classes; wrapper folders such as images/ that hold all others are skipped.
        folders: folder name -> "train", "validation", "test", "class" or "ignore", where the name is ambiguous.

    Raises:
        DataError: there are no class folders, a class folder has no images, or a folder's role is unclear.
    """
    tally = Tally(root) if tally is None else tally
    base = _skip_wrappers(root, tally)
    names = [name for name in list_folders(base) if not _is_loop(base / name, root, base, tally)]
    for name in list_files(base, tally):
        tally.leave_out(_OUTSIDE, base / name)
    roles = _assign_roles(base, names, folders or {})
    for name in [name for name in names if roles[name] == "ignore"]:
        tally.leave_out(_IGNORED, base / name, count_files(base / name))
    unknown = [name for name in names if roles[name] is None]
    classes = [name for name in names if roles[name] == "class"]
    splits = {split: [name for name in names if roles[name] == split] for split in SPLITS}
    splits = {split: found for split, found in splits.items() if found}
    _check_unknown(base, unknown, splits, classes)
    scan = _Scan(root, base, tally)
    if not splits:
        scan.add_classes("train", base, sorted([*unknown, *classes]))
    for name in unknown if splits else ():
        tally.leave_out(_UNKNOWN, base / name, count_files(base / name))
    for split, own in splits.items():
        for name in own:
            scan.add_split(split, _skip_wrappers(base / name, tally))
    return scan.run()


def list_classes(root: Path, folders: Mapping[str, str] | None = None) -> list[str]:
    """Return the sorted names of the class folders of all splits below `root`, including those without images.

    Args:
        root, folders: as for `scan_folder`.

    Raises:
        DataError: `folders` names a folder that is not there, or two folders are the same split.
    """
    tally = Tally(root)
    base = _skip_wrappers(root, tally)
    roles = _assign_roles(base, list_folders(base), folders or {})
    splits = [name for name, role in roles.items() if role in SPLITS]
    if not splits:
        return [name for name, role in roles.items() if role != "ignore"]
    return sorted({name for split in splits for name in list_folders(_skip_wrappers(base / split, tally))})


def _skip_wrappers(folder: Path, tally: Tally) -> Path:
    """Return the innermost folder after skipping wrappers that hold everything, such as images/ or a repeated name."""
    while True:
        names = list_folders(folder)
        if len(names) != 1 or name_split(names[0]) or not list_folders(folder / names[0]):
            return folder
        if not _is_wrapper(folder, names[0]):
            return folder
        if identify(folder / names[0]) == identify(folder):
            return folder
        for name in list_files(folder, tally):
            tally.leave_out(_OUTSIDE, folder / name)
        folder = folder / names[0]


def _is_wrapper(folder: Path, name: str) -> bool:
    """Return whether the only folder in a folder wraps splits or classes, by its name or by theirs."""
    below = [normalise_name(child) for child in list_folders(folder / name)]
    holds = any(map(name_split, below)) or sum(child in CANONICAL for child in below) > 1
    return normalise_name(name) in (*_LEVELS, normalise_name(folder.name)) or (
        holds and normalise_name(name) not in CANONICAL
    )


def _is_loop(path: Path, root: Path, base: Path, tally: Tally) -> bool:
    """Return whether a folder is a link to one of its parents; if so, count it as left out."""
    if identify(path) not in {identify(folder) for folder in (root, base, *root.resolve().parents)}:
        return False
    tally.leave_out(LOOP, path)
    return True


def _assign_roles(base: Path, names: Sequence[str], folders: Mapping[str, str]) -> dict[str, str | None]:
    """Return the role of each folder: a split, "class", "ignore", or None if neither its name nor `folders` says."""
    by_name = {normalise_name(name): role for name, role in folders.items()}
    absent = [name for name in folders if normalise_name(name) not in {normalise_name(name) for name in names}]
    if absent:
        raise DataError(
            f"data.folders: found {absent[0]!r}, expected a folder in {base}: {', '.join(names[:20]) or '(none)'}."
        )
    roles = {name: by_name.get(normalise_name(name), name_split(name)) for name in names}
    taken = set(roles.values())
    if "evaluation" in taken:
        role = "test" if "validation" in taken and "test" not in taken else "validation"
        roles = {name: role if found == "evaluation" else found for name, found in roles.items()}
    for split in SPLITS:
        same = [name for name, role in roles.items() if role == split]
        guessed = [name for name in same if normalise_name(name) not in by_name]
        if len(guessed) > 1:
            raise DataError(
                f"{base}: found the folders {_count(base, same)}; more than one of them is {split} by its name. {_ask(base, same)}"
            )
    return roles


def _check_unknown(base: Path, unknown: list[str], splits: dict[str, list[str]], classes: list[str]) -> None:
    """Raise DataError if the role of a folder would have to be guessed."""
    if not splits:
        odd = _find_levels(base, unknown)
        if odd:
            raise DataError(
                f"{base}: found the folders {_count(base, odd)}, which hold class folders themselves. They are splits "
                f"with unusual names, or one level of folders too many. {_ask(base, odd)} If they are one level too many, "
                f"set data.path to the folder that holds the classes, e.g. {base / odd[0]}."
            )
        return
    own = [name for names in splits.values() for name in names]
    known = {normalise_name(name) for split in own for name in list_folders(base / split)}
    odd = [
        name
        for name in unknown
        if "train" not in splits or list_folders(base / name) or normalise_name(name) in (*known, *CANONICAL)
    ]
    if odd or classes:
        odd = odd or classes
        raise DataError(
            f"{base}: found the splits {_count(base, own)}, and beside them {_count(base, odd)}: it is not known "
            f"whether these are splits, classes, or of another kind. {_ask(base, odd)}"
        )


def _find_levels(base: Path, names: list[str]) -> list[str]:
    """Return the folders that hold class folders instead of images: named after expressions, or the same in each."""
    below = {name: [normalise_name(child) for child in list_folders(base / name)] for name in names}
    deep = [
        name
        for name in names
        if len(below[name]) > 1 and normalise_name(name) not in CANONICAL and not _holds_pictures(base / name)
    ]
    odd = [name for name in deep if sum(child in CANONICAL for child in below[name]) > 1]
    same = {child for child in below[deep[0]] if not re.search(r"\d", child)} if len(deep) > 1 else set()
    if not odd and len(deep) == len(names) and len(same) > 1 and all(same <= set(below[name]) for name in deep):
        return deep
    return odd


def _holds_pictures(folder: Path) -> bool:
    return any(path.is_file() and find_rejection_reason(path) is None for path in folder.iterdir())


def _count(base: Path, names: Sequence[str]) -> str:
    more = f" and {len(names) - 10} others" if len(names) > 10 else ""
    return ", ".join(f"{name} ({count_noun(count_files(base / name), 'file')})" for name in names[:10]) + more


def _ask(base: Path, names: Sequence[str]) -> str:
    """Return the request to name the folders' roles, with an example that uses the splits their names suggest."""
    example = ", ".join(f"{_quote(name)}: {_suggest(name)}" for name in names[:3])
    return (
        "Say what each is: a split (train, validation or test), a class (class) or nothing (ignore). In an experiment "
        f"file this is data.folders: {{{example}}}; dlfer init {shlex.quote(str(base))} --folder NAME=ROLE writes such a file, which other "
        "commands take as data, too."
    )


def _suggest(name: str) -> str:
    found = {split for word, split in SPLIT_NAMES.items() if len(word) > 2 and word in normalise_name(name)}
    found |= {"test"} if "hold" in normalise_name(name) else set()
    return found.pop() if len(found) == 1 else "..."


def _quote(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name, ensure_ascii=False)


class _Scan:
    """A scan of class folders that reads no folder twice."""

    def __init__(self, root: Path, base: Path, tally: Tally) -> None:
        self._root = root
        self._base = base
        self._tally = tally
        self._folders: dict[tuple[int, int], Path] = {identify(root): root}
        self._classes: list[tuple[str, Path]] = []

    def add_split(self, split: str, folder: Path) -> None:
        """Register the class folders in the folder of a split.

        Raises:
            DataError: as `add_classes`.
        """
        for name in list_files(folder, self._tally):
            self._tally.leave_out(_OUTSIDE, folder / name)
        names = [name for name in list_folders(folder) if not _is_loop(folder / name, self._root, folder, self._tally)]
        self.add_classes(split, folder, names)

    def add_classes(self, split: str, base: Path, names: Sequence[str]) -> None:
        """Register class folders of a split.

        Raises:
            DataError: there are none, or one was registered before under another path.
        """
        if not names:
            loose = f"; {count_files(base):,} files lie directly in it" if count_files(base) else ""
            advice = "A list of labels beside images is not read: move each image into the folder of its class."
            if base != self._root:
                name = _quote(base.name)
                advice = f"If it is a class itself, set data.folders: {{{name}: class}}; if it is not part of the data, {{{name}: ignore}}."
            raise DataError(f"{base}: found no class folders, expected <class>/<image>{loose}. {advice}")
        for name in names:
            other = self._folders.setdefault(identify(base / name), base / name)
            if other != base / name:
                raise DataError(
                    f"{base / name}: is the same folder as {other}, by a link; its images would count twice. "
                    "Remove the link."
                )
            self._classes.append((split, base / name))

    def run(self) -> Splits:
        """Return the images of the registered class folders by split, including those in their subfolders.

        Raises:
            DataError: a class folder or a split has no images.
        """
        splits: Splits = {}
        visited = set(self._folders)
        for split, folder in self._classes:
            splits.setdefault(split, []).extend(self._scan_class(folder, visited))
        for split, files in splits.items():
            if not files:
                raise DataError(f"{self._root}: {split} has no class folders with images, expected <class>/<image>.")
        return splits

    def _scan_class(self, folder: Path, visited: set[tuple[int, int]]) -> list[ImageFile]:
        inner = [name for name in list_folders(folder) if name_split(name)]
        if inner:
            raise DataError(
                f"{folder}: found the splits {_count(folder, inner)} in the folder of a class; expected the classes in "
                f"the splits: {inner[0]}/{folder.name}/<image>. Move the folders."
            )
        tally = Tally(self._root)
        ids = sorted(path.relative_to(self._root).as_posix() for path in list_pictures(folder, tally, visited))
        self._tally.add(tally)
        if not ids:
            self._check_empty(folder, tally)
        return [ImageFile(path, folder.name) for path in ids]

    def _check_empty(self, folder: Path, tally: Tally) -> None:
        """Raise DataError for a class folder without images, unless it holds only other files and is no expression."""
        found = [reason for reason in tally.list_left_out() if reason.reason != HIDDEN]
        others = bool(found) and all(reason.reason.startswith(NO_PICTURES) for reason in found)
        if others and normalise_name(folder.name) not in CANONICAL:
            self._tally.notes.append(
                f"{folder.name} holds {count_noun(tally.seen, 'file')} and no picture, so it was not taken for a class."
            )
            return
        listed = "; ".join(f"{reason.n:,} {reason.reason} ({reason.first[0]})" for reason in found) or "it is empty"
        raise DataError(
            f"{folder}: the class folder holds no images that can be read: {listed}. Expected pictures "
            f"({', '.join(PICTURE_SUFFIXES[:10])} ...). {self._advise_empty(folder)}"
        )

    def _advise_empty(self, folder: Path) -> str:
        """Return advice on a class folder without images; only top-level folders can be given a role."""
        if folder.parent != self._base:
            return "Put images into it, or delete the folder."
        return (
            f"Put images into it, or delete the folder; or leave the class out: dlfer init {shlex.quote(str(self._root))} --folder "
            f"{shlex.quote(folder.name)}=ignore writes an experiment file with data.folders: {{{_quote(folder.name)}: ignore}}, "
            "which other commands take as data, too."
        )
