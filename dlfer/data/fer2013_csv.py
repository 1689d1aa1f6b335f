"""Parser of FER2013 csv files, with a fast path for rows in the usual form, and finder of such files in folders."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from dlfer.config.names import FER2013_LABELS
from dlfer.data.files import Tally, find_rejection_reason, identify, list_folders, normalise_name, walk
from dlfer.data.labels import CANONICAL
from dlfer.errors import DataError
from dlfer.runs.text import count_noun, find_delimiter, open_text, read_lines

USAGES = ("Training", "PublicTest", "PrivateTest")
_USAGES = {usage.casefold(): usage for usage in USAGES}
SIDE = 48
CSV_NAMES = tuple(
    f"{name}{packed}"
    for name in ("fer2013.csv", "icml_face_data.csv", "fer2013/fer2013.csv", "train.csv")
    for packed in ("", ".gz", ".zip")
)
"""Paths, relative to a folder of FER2013, at which its csv is looked for, in order of preference."""

_NUM_PIXELS = SIDE * SIDE
_VALUES = {str(value): value for value in range(256)}
_CODES = {str(code): code for code in range(len(FER2013_LABELS))}
_SKIP = ", or set data.skip_unreadable: true"
_MEND = f"download the file again{_SKIP}."
_UNCLOSED = "found a quotation mark that is not closed on its line, expected a closing one: a row is one line."


@dataclass(frozen=True)
class Rows:
    """The readable rows of a csv.

    Attributes:
        pixels: uint8 [N, 48, 48, 1].
        codes: uint8 [N], FER2013's codes 0..6.
        usages: str [N].
        rows: int64 [N], number of the record in the file, from 0, counting skipped records.
        skipped: str [K], an error message for each row that was left out.
    """

    pixels: np.ndarray
    codes: np.ndarray
    usages: np.ndarray
    rows: np.ndarray
    skipped: np.ndarray


def find_csvs(folder: Path) -> list[Path]:
    """Return the files in a folder that have the name of a FER2013 csv; the first one is read by default.

    Files with a column of pixels come first. If no file has one and folders beside them hold images, the images are the
    data and the result is empty.
    """
    found = [folder / name for name in CSV_NAMES if (folder / name).is_file()]
    are_data = {path: has_pixels(path) for path in found}
    if found and not any(are_data.values()) and next(iterate_pictures(folder), None) is not None:
        return []
    return sorted(found, key=lambda path: not are_data[path])


def has_pixels(path: Path) -> bool:
    """Return whether a csv has a column pixels; True for a damaged one too, so that its reader reports the damage."""
    try:
        return "pixels" in [name.casefold() for name in read_header(path)]
    except DataError:
        return True


def iterate_pictures(folder: Path) -> Iterator[Path]:
    """Yield the images in the subfolders of a folder, at any depth, sorted by path."""
    visited = {identify(folder)}
    for name in list_folders(folder):
        yield from (path for path in walk(folder / name, Tally(), visited) if find_rejection_reason(path) is None)


def describe_unread_pictures(folder: Path, csv: Path) -> tuple[str, ...]:
    """Return a note about images in folders beside the csv that is read instead of them; empty without any."""
    names = [path.relative_to(folder).as_posix() for path in iterate_pictures(folder)]
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{count_noun(len(names), 'picture')} in folders beside {csv.name} {'was' if len(names) == 1 else 'were'} not read "
        f"({shown}); to read pictures, move the csv out of {folder}.",
    )


def name_packed(name: str) -> tuple[str, ...]:
    """Return the possible file names of a csv: plain, .gz and .zip."""
    return tuple(f"{name}{packed}" for packed in ("", ".gz", ".zip"))


def find_test_csv(path: Path) -> Path | None:
    """Return the test.csv beside a train.csv, compressed or not; None without one, or if `path` is no train.csv."""
    if path.name.casefold() not in name_packed("train.csv"):
        return None
    return next((path.with_name(name) for name in name_packed("test.csv") if path.with_name(name).is_file()), None)


def is_divided(path: Path) -> bool:
    """Return whether a csv without a column Usage and the labelled test.csv beside it are two splits."""
    beside = find_test_csv(path)
    if beside is None:
        return False
    columns = {name.casefold() for name in read_header(path)}
    return "usage" not in columns and "emotion" in {name.casefold() for name in read_header(beside)}


def describe_unread_csvs(folder: Path, option: str) -> tuple[str, ...]:
    """Return a note about the csv files of a folder that are not read; `option` is the setting that selects a file."""
    read, *others = [str(path.relative_to(folder)) for path in find_csvs(folder)] or [""]
    return (f"{', '.join(others)} beside {read} was not read; to read another file, name it in {option}.",) * bool(
        others
    )


def read_csv(path: Path, *, skip_unreadable: bool, usage: str | None) -> Rows:
    """Read a FER2013 csv row by row.

    Args:
        skip_unreadable: leave out rows that cannot be read.
        usage: the Usage of all rows of a file without a column Usage; None: the column is required.

    Raises:
        DataError: the columns or the code of the labels are wrong, a row cannot be read (unless skip_unreadable), or
            no row can be read.
    """
    pixels, codes, usages, numbers, skipped = bytearray(), bytearray(), [], [], []
    with open_text(path, errors="replace") as stream:
        records = _iterate_records(stream, path.name)
        columns = _find_columns(path, *_next_header(records), usage)
        number, is_checked = -1, False
        for line, fields in records:
            if not fields:
                continue
            number += 1
            try:
                code, values, split = _parse_row(fields, columns, usage)
            except ValueError as problem:
                if not is_checked:
                    _check_code(path)
                    is_checked = True
                if not skip_unreadable:
                    raise DataError(f"{path.name} line {line}: {problem}") from None
                skipped.append(f"line {line}: {problem}")
                continue
            pixels += values
            codes.append(code)
            usages.append(split)
            numbers.append(number)
    if skipped and not codes:
        raise DataError(
            f"{path.name}: none of the {count_noun(len(skipped), 'row')} can be read; the first: {skipped[0].replace(_SKIP, '')}"
        )
    if not codes:
        raise DataError(f"{path.name}: found no readable rows, expected one per image; download the file again.")
    images = np.frombuffer(bytes(pixels), np.uint8).reshape(-1, SIDE, SIDE, 1)
    return Rows(
        images,
        np.frombuffer(bytes(codes), np.uint8),
        np.array(usages),
        np.array(numbers, np.int64),
        np.array(skipped, dtype=str),
    )


def _iterate_records(stream: TextIO, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line, as csv.reader would return them; no record spans several lines.

    If a quotation mark is not closed on its line, the last field ends with a line feed. Lines without quotation marks are
    only split at the delimiter, in a third of csv.reader's time.
    """
    delimiter = None
    for number, line in enumerate(read_lines(stream), 1):
        if delimiter is None and line.strip():
            delimiter = find_delimiter(line)
        text = line.rstrip("\r\n")
        if '"' not in text and len(text) <= csv.field_size_limit():
            yield number, text.split(delimiter or ",") if text else []
            continue
        try:
            yield number, next(csv.reader([text + "\n"], delimiter=delimiter))
        except csv.Error as error:
            raise DataError(f"{name} line {number}: not a csv ({error}); download the file again.") from error


def _next_header(records: Iterator[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """Return the line number and the fields of the first record that is not blank."""
    return next(((line, fields) for line, fields in records if "".join(fields).strip()), (1, []))


def read_header(path: Path) -> list[str]:
    """Return the names of a csv's columns, without surrounding spaces and quotation marks.

    Raises:
        DataError: the file is not a csv.
    """
    with open_text(path, errors="replace") as stream:
        line = next((line for line in read_lines(stream) if line.strip()), "")
    return [name.strip().strip('"').strip() for name in line.split(find_delimiter(line))]


def _find_columns(path: Path, line: int, header: list[str], usage: str | None) -> dict[str, int]:
    """Return the position of each required column, ignoring case and surrounding spaces."""
    if not header:
        raise DataError(
            f"{path.name}: the file is empty, expected a header with emotion, pixels and Usage; download it again."
        )
    if header[-1].endswith("\n"):
        raise DataError(f"{path.name} line {line}: {_UNCLOSED} Close or delete it.")
    names = [name.strip().casefold() for name in header]
    needed = ["emotion", "pixels"] + ([] if usage and "usage" not in names else ["usage"])
    missing = [name for name in needed if name not in names]
    if missing:
        shown = ", ".join(name.strip()[:40] for name in header[:6])
        raise DataError(
            f"{path.name} line {line}: found the columns {shown}; expected emotion, pixels and Usage "
            f"(missing: {', '.join(missing)}). {_advise_columns(names, missing)}"
        )
    for name in needed:
        places = [place for place, found in enumerate(names, 1) if found == name]
        if len(places) > 1:
            raise DataError(
                f"{path.name} line {line}: found the column {header[places[-1] - 1].strip()} more than once (columns "
                f"{' and '.join(map(str, places))}; upper and lower case count as the same), expected it once. Delete or rename all but the right one."
            )
    return {name: names.index(name) for name in needed}


def describe_unread_columns(path: Path) -> tuple[str, ...]:
    """Return one sentence about the columns of a csv that are not read; empty if all are read.

    Raises:
        DataError: the file is not a csv.
    """
    names = read_header(path)
    folded = [name.casefold() for name in names]
    unread = [
        name[:40] for name, key in zip(names, folded, strict=True) if key not in ("", "emotion", "pixels", "usage")
    ]
    if not unread:
        return ()
    shown = ", ".join(unread[:6]) + (", ..." if len(unread) > 6 else "")
    lost = "" if "usage" in folded else " A column of splits is read only if it is named Usage; all rows are one split."
    return (f"{path.name}: not read: {count_noun(len(unread), 'column')} ({shown}).{lost}",)


def _advise_columns(names: list[str], missing: list[str]) -> str:
    """Return advice on how to convert a csv with other columns into data that dlfer reads."""
    if {"path", "file", "filename", "file_name", "image", "image_path", "filepath"} & set(names):
        return (
            "A list of files is not read: move each image into a folder of its label, and give the folder above these."
        )
    if missing == ["usage"]:
        return "Without Usage, name the files train.csv and test.csv."
    return "Rename the columns, if they hold the same: labels 0..6, 2,304 grey values, Training, PublicTest or PrivateTest."


def _parse_row(fields: list[str], columns: dict[str, int], usage: str | None) -> tuple[int, bytes, str]:
    """Return (code, 2304 bytes, usage) of a row; raise ValueError with the reason if it is invalid."""
    if fields[-1].endswith("\n"):
        raise ValueError(f"{_UNCLOSED} Close or delete it{_SKIP}.")
    if len(fields) <= max(columns.values()):
        raise ValueError(f"expected {max(columns.values()) + 1} fields, found {len(fields)}. The row is cut; {_MEND}")
    code = _CODES.get(_normalize_code(fields[columns["emotion"]]))
    if code is None:
        found = fields[columns["emotion"]].strip()[:40]
        raise ValueError(f"expected a label 0..6, found {found!r}. Correct the row{_SKIP}.")
    text = fields[columns["pixels"]].strip()
    values = _parse_plain_pixels(text) or _parse_pixels(text)
    if "usage" not in columns:
        return code, values, usage
    found = fields[columns["usage"]].strip()
    split = _USAGES.get(found.casefold())
    if split is None:
        raise ValueError(
            f"expected a Usage of {', '.join(USAGES)}, found {found[:40]!r}. If all rows use another name for this split, replace it by "
            f"FER2013's; if this row is damaged, {_MEND}"
        )
    return code, values, split


def _normalize_code(text: str) -> str:
    """Strip a label, and return "3" for "3.0" or "3,0", which programs write if a column of integers has gaps."""
    text = text.strip()
    whole, point, rest = text.replace(",", ".").partition(".")
    return whole if point and rest and not rest.strip("0") else text


def _check_code(path: Path) -> None:
    """Raise DataError if the labels of a csv are in another code than FER2013's, so that all of them are unreliable.

    Single wrong labels are errors of their rows. It is another code if expressions occur as words in several rows, if
    numbers above 6 but no 0 occur, if 7 occurs and an invalid label repeats, or if over one label in ten is invalid.
    """
    with open_text(path, errors="replace") as stream:
        records = _iterate_records(stream, path.name)
        _, header = _next_header(records)
        place = [name.strip().casefold() for name in header].index("emotion")
        whole = (fields for _, fields in records if len(fields) > place and not fields[-1].endswith("\n"))
        counts = Counter(_normalize_code(fields[place])[:40] for fields in whole)
    strange = {value: n for value, n in counts.items() if value not in _CODES and value}
    number, total = sum(strange.values()), sum(counts.values())
    is_beyond = any(value.isdecimal() for value in strange) and "0" not in counts and total > 1
    repeated = any(n > 1 for n in strange.values()) and "7" in strange
    words = [value for value in strange if normalise_name(value) in CANONICAL]
    if not (sum(strange[word] for word in words) > 1 or is_beyond or repeated or number > max(1, total / 10)):
        return
    found = ", ".join(f"{value} ({n:,} rows)" for value, n in sorted(counts.items())[:12])
    code = ", ".join(f"{number} {label}" for number, label in enumerate(FER2013_LABELS))
    raise DataError(
        f"{path.name}: the column emotion is not in FER2013's code; found {found}; expected {code}. "
        f"{'The column holds words' if words else 'These numbers are another code'}, and leaving out single rows does not help: "
        "the others would get wrong labels. Look up what each value means where the file comes from, and write the "
        "column again in FER2013's code, label by label; or save the images as class folders (source folder)."
    )


def _parse_plain_pixels(text: str) -> bytes | None:
    """Return the 2304 pixels of a row in the usual form; None for any other form, valid or not.

    The usual form has only digits and spaces, one space between two values, and no leading zeros. Parsing it with NumPy
    takes a third of the time of parsing each value.
    """
    if text.encode().translate(None, b"0123456789 "):
        return None
    values = np.fromstring(text, np.int16, sep=" ")
    if len(values) != _NUM_PIXELS or values.min() < 0 or values.max() > 255:
        return None
    # Leading zeros, extra spaces, and numbers beyond int16 (which wrap around) make the text longer than this.
    length = 2 * _NUM_PIXELS - 1 + np.count_nonzero(values > 9) + np.count_nonzero(values > 99)
    return values.astype(np.uint8).tobytes() if len(text) == length else None


def _parse_pixels(text: str) -> bytes:
    """Return the 2304 pixels of a row with any spacing; raise ValueError with the reason if they are invalid."""
    tokens = text.split()
    if len(tokens) != _NUM_PIXELS:
        raise ValueError(
            f"expected {_NUM_PIXELS} pixel values, found {len(tokens)}. "
            f"The row is {'cut short' if len(tokens) < _NUM_PIXELS else 'too long'}; {_MEND}"
        )
    try:
        return bytes(map(_VALUES.__getitem__, tokens))
    except KeyError:
        place, found = next((i, token) for i, token in enumerate(tokens, 1) if token not in _VALUES)
        raise ValueError(
            f"expected pixel values that are whole numbers 0..255, found {found[:40]!r} as value {place}; {_MEND}"
        ) from None
