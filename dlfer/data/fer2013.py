"""Reader of FER2013 in all common layouts: csv with or without the column Usage, and Kaggle's folders of JPEGs."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import numpy as np

from dlfer.config.names import FER2013_LABELS, expand_home
from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Reading, Split, get_cache_path, read_cache, write_cache
from dlfer.data.fer2013_csv import (
    SIDE,
    USAGES,
    Rows,
    describe_unread_columns,
    describe_unread_csvs,
    describe_unread_pictures,
    find_csvs,
    find_test_csv,
    name_packed,
    read_csv,
    read_header,
)
from dlfer.data.files import Tally
from dlfer.data.folder import UNREADABLE, load_splits, scan_folder
from dlfer.data.labels import compute_label_map, map_targets
from dlfer.errors import DataError, MissingDataError
from dlfer.runs.records import LeftOut
from dlfer.runs.text import open_text

OFFICIAL_MD5 = "f8428a1edbd21e88f42c73edd2a14f95"

_FROM_FILE_NAME = re.compile(r"(Training|PublicTest|PrivateTest)_\d+\.\w+$")
_VALIDATION_CSVS = ("val.csv", "valid.csv", "validation.csv")
_CACHE_VERSION = 2
_CACHE_FROM_BYTES = 16_000_000


def load_fer2013(config: DataConfig) -> DataBundle:
    """Read FER2013 in its official splits: Training, PublicTest and, if present, PrivateTest.

    `config.path` is a csv (`fer2013.csv`, `icml_face_data.csv`, or `train.csv` with `test.csv`
    beside it), a folder that holds one, or Kaggle's folders `train/angry/...`, `test/angry/...`.
    In folders the official split of an image is read from its file name (PublicTest_17.jpg). If names
    do not say it (im0.png, test.csv), `test` is the test set (PublicTest and PrivateTest together),
    and without a validation split the protocol holds one out of train; notes say so.
    The ids of a csv are "<Usage>/<row>", with rows counted from 0; those of folders are relative paths.

    Raises:
        MissingDataError: there is no data; the message says where to obtain it.
        DataError: a row or an image cannot be read (unless config.skip_unreadable).
    """
    path = expand_home(config.path)
    if not path.exists():
        raise MissingDataError(describe_missing(path))
    if path.is_file():
        return _load_csv(path, config)
    found = find_csvs(path)
    if found:
        bundle = _load_csv(found[0], config)
        unread = (*describe_unread_csvs(path, "data.path"), *describe_unread_pictures(path, found[0]))
        return dataclasses.replace(bundle, notes=(*bundle.notes, *unread))
    if not any(child.is_dir() for child in path.iterdir()):
        raise MissingDataError(describe_missing(path))
    return _load_folders(path, config)


def load_fer2013_usage(path: str | Path, usage: str | None, *, labels: tuple[str, ...] = FER2013_LABELS) -> Split:
    """Return the rows of one Usage of a FER2013 csv, with targets that index `labels` (a model's).

    Args:
        usage: "Training", "PublicTest" or "PrivateTest"; None for all rows, with or without a column Usage.
        labels: the seven labels in the order of the targets, mapped by name.

    Raises:
        MissingDataError: the csv does not exist.
        DataError: a row cannot be read, or the csv has no rows of that Usage.
        ModelError: `labels` are not FER2013's.
    """
    path = _find_csv(path)
    lookup = compute_label_map(FER2013_LABELS, labels)
    rows, _ = _read_cached(path, skip_unreadable=False, usage=None if usage else "all")
    if usage is None:
        return _to_split(rows, np.arange(len(rows.rows)), "all", lookup)
    chosen = np.flatnonzero(rows.usages == usage)
    if not len(chosen):
        names, counts = np.unique(rows.usages, return_counts=True)
        found = ", ".join(f"{name} ({count})" for name, count in zip(names, counts, strict=True))
        raise DataError(f"{path.name}: found no rows of Usage {usage!r}; the file has {found}.")
    return _to_split(rows, chosen, usage, lookup)


def load_fer2013_splits(path: str | Path) -> tuple[list[Split], Reading]:
    """Return the readable rows of a FER2013 csv as one split per Usage, in the official order.

    Without a column Usage all rows form one split, "all".

    Returns:
        splits: at least one split.
        reading: the number of all rows, and the rows that were left out.

    Raises:
        MissingDataError, DataError: the csv does not exist, has other columns, or no readable row.
    """
    path = _find_csv(path)
    rows, _ = _read_cached(path, skip_unreadable=True, usage="all")
    usages = [usage for usage in (*USAGES, "all") if np.any(rows.usages == usage)]
    return [_to_split(rows, np.flatnonzero(rows.usages == usage), usage) for usage in usages], _make_reading(path, rows)


def _find_csv(path: str | Path) -> Path:
    path = expand_home(path)
    if not path.is_file():
        raise MissingDataError(describe_missing(path))
    return path


def describe_missing(path: Path) -> str:
    """Return an error message: where to obtain FER2013, where to put it, and which size and digest to expect."""
    return (
        f"{path}: FER2013 is not there. Obtain it from Kaggle, competition "
        "challenges-in-representation-learning-facial-expression-recognition-challenge "
        "(file icml_face_data.csv, or fer2013.csv in fer2013.tar.gz; about 300 MB, 35,887 rows), and put the csv "
        f"there, or set data.path. The official csv written as emotion,pixels,Usage has MD5 {OFFICIAL_MD5}."
    )


def _load_csv(path: Path, config: DataConfig) -> DataBundle:
    """Read a csv, and the test.csv beside a train.csv, into a bundle; both may be compressed (.gz, .zip)."""
    plain = path.name.casefold() in name_packed("train.csv")
    rows, notes = _read_cached(path, skip_unreadable=config.skip_unreadable, usage="Training" if plain else None)
    notes += describe_unread_columns(path)
    splits: dict[str, Split | None] = {}
    for split, usage in zip(("train", "validation", "test"), USAGES, strict=True):
        chosen = np.flatnonzero(rows.usages == usage)
        splits[split] = _to_split(rows, chosen, usage) if len(chosen) else None
    if not np.any(rows.codes == 0):
        notes += (
            f"{path.name}: no row has the label 0 (Angry). If the file counts labels from 1, or has another code than "
            "FER2013's, all its labels are wrong; look at some images of each class.",
        )
    reading = _make_reading(path, rows)
    beside = find_test_csv(path)
    if beside is not None and splits["test"] is None:
        splits["test"], of_test, more = _load_test_csv(beside, config)
        notes += more
        left_out = (*reading.left_out, *of_test.left_out)
        reading = dataclasses.replace(reading, seen=reading.seen + of_test.seen, left_out=left_out)
    if plain and splits["validation"] is None:
        unread = [name for stem in _VALIDATION_CSVS for name in name_packed(stem) if path.with_name(name).is_file()]
        notes += tuple(
            f"{name} beside {path.name} was not read: write the rows of all splits into one csv with a column Usage "
            f"({', '.join(USAGES)})."
            for name in unread
        )
    if splits["train"] is None:
        raise DataError(f"{path.name}: found no rows of Usage Training; training needs them. Use the whole csv.")
    return DataBundle("fer2013", FER2013_LABELS, **splits, notes=notes, reading=reading)


def _make_reading(path: Path, rows: Rows) -> Reading:
    problems = tuple(f"{path.name} {problem}" for problem in rows.skipped.tolist())
    seen = len(rows.rows) + len(problems)
    lines = [" ".join(problem.split(":")[0].split()) for problem in problems]
    return Reading(unreadable=problems, num_rows=seen, what="rows", seen=seen).leave_out(UNREADABLE, lines)


def _load_test_csv(path: Path, config: DataConfig) -> tuple[Split | None, Reading, tuple[str, ...]]:
    if "emotion" not in [name.casefold() for name in read_header(path)]:
        with open_text(path, errors="replace") as stream:
            number = max(0, sum(1 for line in stream if line.strip()) - 1)
        reading = Reading(what="rows", seen=number)
        lost = LeftOut(reason=f"{path.name} has no column emotion", n=number, first=[path.name])
        note = f"{path.name} has no column emotion, so it cannot be used for evaluation and was left out."
        return None, dataclasses.replace(reading, left_out=(lost,)), (note,)
    rows, notes = _read_cached(path, skip_unreadable=config.skip_unreadable, usage="test")
    notes += (f"{path.name} does not distinguish PublicTest and PrivateTest; all of it is the test split.",)
    return _to_split(rows, np.arange(len(rows.rows)), "test"), _make_reading(path, rows), notes


def _load_folders(root: Path, config: DataConfig) -> DataBundle:
    """Read Kaggle's folders into a bundle, in the official splits if the file names contain them."""
    tally = Tally(root)
    splits = scan_folder(root, config.folders, tally)
    files = [file for own in splits.values() for file in own]
    found = [_FROM_FILE_NAME.search(file.id) for file in files]
    names = {"train": "train", "validation": "validation", "test": "test"}
    note = "The file names do not distinguish PublicTest and PrivateTest; the folders are the splits."
    if all(found):
        split_of = dict(zip(USAGES, names, strict=True))
        splits = {key: [] for key in names}
        for file, match in zip(files, found, strict=True):
            splits[split_of[match[1]]].append(file)
        names = dict(zip(names, USAGES, strict=True))
        note = "The official splits were read from the file names."
    bundle = load_splits(root, splits, config, image_size=SIDE, names=names, tally=tally)
    labels = tuple(label for label in FER2013_LABELS if label in bundle.labels)
    labels += tuple(label for label in bundle.labels if label not in labels)
    mapped = {key: map_targets(split, bundle.labels, labels) for key, split in bundle.splits.items()}
    return dataclasses.replace(bundle, source="fer2013", labels=labels, notes=(*bundle.notes, note), **mapped)


def _to_split(rows: Rows, chosen: np.ndarray, name: str, lookup: np.ndarray | None = None) -> Split:
    targets = rows.codes[chosen].astype(np.int64)
    ids = np.array([f"{usage}/{row}" for usage, row in zip(rows.usages[chosen], rows.rows[chosen], strict=True)])
    return Split(name, rows.pixels[chosen], targets if lookup is None else lookup[targets], ids)


def _read_cached(path: Path, *, skip_unreadable: bool, usage: str | None) -> tuple[Rows, tuple[str, ...]]:
    """Return the rows of a csv and notes on the reading; large files are parsed once and then read from the cache.

    Parsing 300 MB of text takes seconds, reading 82 MB of cached pixels a tenth of a second.
    """
    state = path.stat()
    notes: tuple[str, ...] = ()
    if state.st_size < _CACHE_FROM_BYTES:
        rows = read_csv(path, skip_unreadable=skip_unreadable, usage=usage)
    else:
        key = repr((_CACHE_VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns, skip_unreadable, usage))
        cache = get_cache_path("fer2013", hashlib.sha256(key.encode()).hexdigest())
        arrays = read_cache(cache, [field.name for field in dataclasses.fields(Rows)])
        if arrays is not None:
            rows = Rows(**arrays)
        else:
            rows = read_csv(path, skip_unreadable=skip_unreadable, usage=usage)
            reason = write_cache(cache, vars(rows))
            if reason is not None:
                notes = (f"The parsed csv could not be kept for the next time ({reason}).",)
    if len(rows.skipped):
        total = len(rows.rows) + len(rows.skipped)
        notes += (f"{path.name}: {len(rows.skipped)} of {total} rows were left out; the first: {rows.skipped[0]}",)
    return rows, notes
