"""Text of a csv file as programs write it: UTF-8 or UTF-16, plain, gzip or zip, with commas, semicolons or tabs."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from dlfer.errors import DataError, shorten

DELIMITERS = ",;\t|"

_OTHER_KINDS = {
    "a picture": re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|II\*\0|MM\0\*"),
    "a PDF": re.compile(rb"%PDF"),
    "a web page, perhaps of a login": re.compile(rb"\s*<(?:!doctype|html|\?xml)", re.IGNORECASE),
    "a pointer of Git LFS, not the file itself (git lfs pull)": re.compile(rb"version https://git-lfs"),
    "a Parquet file": re.compile(rb"PAR1"),
    "an HDF5 file": re.compile(rb"\x89HDF"),
    "a pickle": re.compile(rb"\x80[\x02-\x05]"),
    "an .npy array": re.compile(rb"\x93NUMPY"),
    "an old Excel workbook": re.compile(rb"\xd0\xcf\x11\xe0"),
    "a 7-Zip archive": re.compile(rb"7z\xbc\xaf"),
    "a RAR archive": re.compile(rb"Rar!"),
    "a bzip2 archive": re.compile(rb"BZh"),
    "an xz archive": re.compile(rb"\xfd7zXZ"),
    "a Zstandard archive": re.compile(rb"\x28\xb5\x2f\xfd"),
    "JSON": re.compile(rb"\s*[{\[]"),
}


@contextlib.contextmanager
def open_text(path: Path, *, errors: str = "strict") -> Iterator[TextIO]:
    """Open the text of a csv, unpacked where it is gzip or a zip with one csv in it; `errors` is as of `open`.

    Raises:
        DataError: the file is of another kind, which is named, or its archive is damaged.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("rb"))
        try:
            binary = stack.enter_context(_unpack(stream, path))
            start = binary.read(512)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise DataError(
                f"{path.name}: an archive that cannot be unpacked ({shorten(error, path)}); fetch it again."
            ) from error
        binary.seek(0)
        _check_kind(path, start)
        text = io.TextIOWrapper(binary, encoding=_find_encoding(start), errors=errors, newline="")
        stack.callback(text.close)
        try:
            yield text
        except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path.name}: the archive is cut short or damaged ({shorten(error, path)}); fetch it again."
            ) from error


def find_delimiter(header: str) -> str:
    """Return what separates the columns of a header: the most frequent of comma, semicolon, tab and bar."""
    return max(DELIMITERS, key=header.count)


MAX_LINE = 1_000_000
"""Characters; a picture of FER2013 takes 9,000. A longer line is no row, and could fill the memory when it is unpacked."""


def read_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a text; raise DataError for one that is longer than any row."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            name = Path(str(getattr(stream, "name", "the file"))).name
            raise DataError(
                f"{name} line {number}: found more than {MAX_LINE:,} characters in one line; it is no csv of rows."
            )
        yield line


def read_records(stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the last line and the fields of each record; the header tells what separates them."""
    lines = read_lines(stream)
    header = next(lines, "")
    reader = csv.reader(itertools.chain([header], lines), delimiter=find_delimiter(header))
    for fields in reader:
        yield reader.line_num, fields


def _unpack(stream: BinaryIO, path: Path) -> BinaryIO:
    start = stream.read(4)
    stream.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)
    if start != b"PK\3\4":
        return stream
    archive = zipfile.ZipFile(stream)
    names = [info.filename for info in archive.infolist() if not info.is_dir()]
    if any(name.startswith("xl/") for name in names):
        raise DataError(f"{path.name}: an Excel workbook; export its sheet as csv (UTF-8).")
    tables = [name for name in names if name.casefold().endswith((".csv", ".tsv", ".txt")) and "__MACOSX" not in name]
    if len(tables) != 1:
        raise DataError(
            f"{path.name}: a zip archive with {len(names)} files, {len(tables)} of them csv "
            f"({', '.join((tables or names)[:5]) or 'none'}); expected one csv. Unpack it and name the csv."
        )
    return archive.open(tables[0])


def _check_kind(path: Path, start: bytes) -> None:
    if start[257:262] == b"ustar":
        raise DataError(f"{path.name}: a tar archive; unpack it (tar -xf {path.name}) and name the csv in it.")
    for kind, pattern in _OTHER_KINDS.items():
        if pattern.match(start):
            raise DataError(f"{path.name}: found {kind}, expected a csv.")


def _find_encoding(start: bytes) -> str:
    if start[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        return "utf-32"
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if start[1:2] == b"\0" and start[:1] != b"\0":
        return "utf-16-le"
    if start[:1] == b"\0" and start[1:2] not in (b"", b"\0"):
        return "utf-16-be"
    return "utf-8-sig"
