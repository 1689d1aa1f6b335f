"""The rows of a FER2013 csv: parsed fast where they are written as usual, and with care where they are not."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from dlfer.config.names import FER2013_LABELS
from dlfer.errors import DataError

USAGES = ("Training", "PublicTest", "PrivateTest")
SIDE = 48

_NUM_PIXELS = SIDE * SIDE
_VALUES = {str(value): value for value in range(256)}
_CODES = {str(code): code for code in range(len(FER2013_LABELS))}
_MEND = "download the file again, or set data.skip_unreadable: true."


@dataclass(frozen=True)
class Rows:
    """The readable rows of a csv.

    Attributes:
        pixels: uint8 [N, 48, 48, 1].
        codes: uint8 [N], FER2013's codes 0..6.
        usages: str [N].
        rows: int64 [N], number of the record in the file, from 0, whatever was skipped.
        skipped: what was wrong with each row that was left out.
    """

    pixels: np.ndarray
    codes: np.ndarray
    usages: np.ndarray
    rows: np.ndarray
    skipped: np.ndarray


def read_csv(path: Path, *, skip_unreadable: bool, usage: str | None) -> Rows:
    """Read a csv row by row.

    Args:
        path: the csv, with a header.
        skip_unreadable: leave out rows that cannot be read.
        usage: the part of all rows of a file without a column Usage.

    Raises:
        DataError: it is no such csv, or has a row that cannot be read (unless skip_unreadable), or none that can.
    """
    pixels, codes, usages, numbers, skipped = bytearray(), bytearray(), [], [], []
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        records = _iterate_records(stream, path.name)
        _, header = next(records, (1, []))
        columns = _find_columns(path, header, usage)
        number = -1
        for line, fields in records:
            if not fields:
                continue
            number += 1
            try:
                code, values, part = _parse_row(fields, columns, usage)
            except ValueError as problem:
                if not skip_unreadable:
                    raise DataError(f"{path.name} line {line}: {problem}") from None
                skipped.append(f"line {line}: {problem}")
                continue
            pixels += values
            codes.append(code)
            usages.append(part)
            numbers.append(number)
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
    """Yield the number of the last line and the fields of each record, as csv.reader has them.

    Lines without a quotation mark are only divided at their commas, which takes a third of csv.reader's time.
    """
    for number, line in enumerate(stream, 1):
        if '"' in line or len(line) > csv.field_size_limit():
            reader = csv.reader(itertools.chain([line], stream))
            try:
                for fields in reader:
                    yield number - 1 + reader.line_num, fields
            except csv.Error as error:
                last = number - 1 + reader.line_num
                raise DataError(f"{name} line {last}: not a csv ({error}); {_MEND}") from error
            return
        text = line.rstrip("\r\n")
        yield number, text.split(",") if text else []


def _find_columns(path: Path, header: list[str], usage: str | None) -> dict[str, int]:
    """Return the position of each column that is needed, whatever their case and the spaces around."""
    if not header:
        raise DataError(f"{path.name}: the file is empty, expected a header with emotion, pixels and Usage; {_MEND}")
    names = [name.strip().casefold() for name in header]
    needed = ["emotion", "pixels"] + ([] if usage and "usage" not in names else ["usage"])
    missing = [name for name in needed if name not in names]
    if missing:
        shown = ", ".join(name.strip()[:40] for name in header[:6])
        raise DataError(
            f"{path.name} line 1: found the columns {shown}; expected emotion, pixels and Usage "
            f"(missing: {', '.join(missing)}). Without Usage, name the files train.csv and test.csv."
        )
    return {name: names.index(name) for name in needed}


def _parse_row(fields: list[str], columns: dict[str, int], usage: str | None) -> tuple[int, bytes, str]:
    """Return (code, 2304 bytes, usage) of a row; raise ValueError that says what is wrong with it."""
    if len(fields) <= max(columns.values()):
        raise ValueError(f"expected {max(columns.values()) + 1} fields, found {len(fields)}. The row is cut; {_MEND}")
    code = _CODES.get(fields[columns["emotion"]].strip())
    if code is None:
        found = fields[columns["emotion"]].strip()[:40]
        raise ValueError(f"expected a label 0..6, found {found!r}. Correct the row, or set data.skip_unreadable: true.")
    text = fields[columns["pixels"]].strip()
    values = _parse_plain_pixels(text) or _parse_pixels(text)
    if "usage" not in columns:
        return code, values, usage
    part = fields[columns["usage"]].strip()
    if part not in USAGES:
        raise ValueError(f"expected a Usage of {', '.join(USAGES)}, found {part[:40]!r}; {_MEND}")
    return code, values, part


def _parse_plain_pixels(text: str) -> bytes | None:
    """Return the 2304 pixels of a row as it is usually written, None of any other, which may be good or bad.

    Usual are digits and spaces alone, one space between two values and no digit too many. Taken by numpy, it costs a
    third of what it costs value by value.
    """
    if text.encode().translate(None, b"0123456789 "):
        return None
    values = np.fromstring(text, np.int16, sep=" ")
    if len(values) != _NUM_PIXELS or values.min() < 0 or values.max() > 255:
        return None
    # Zeros in front, more spaces, and numbers beyond int16, which come round to others, are longer than this.
    length = 2 * _NUM_PIXELS - 1 + np.count_nonzero(values > 9) + np.count_nonzero(values > 99)
    return values.astype(np.uint8).tobytes() if len(text) == length else None


def _parse_pixels(text: str) -> bytes:
    """Return the 2304 pixels of a row however it is spaced; raise ValueError that says what is wrong with them."""
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
