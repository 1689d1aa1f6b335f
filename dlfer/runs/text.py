"""Escaping of untrusted text such as names of files and labels, and reading of csv files written by other programs.

Text is escaped for UTF-8, terminals, csv, Markdown and HTML. A csv may be in UTF-8, UTF-16 or UTF-32, plain, gzip or
zip, with commas, semicolons, tabs or bars.
"""

from __future__ import annotations

import contextlib
import csv
import decimal
import gzip
import html
import io
import itertools
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from dlfer.errors import DataError
from dlfer.errors import shorten as shorten_message

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Characters that a spreadsheet takes for the start of a formula, including full-width forms."""

_CELL_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u200b\u2060\ufeff]"
)
"""Control characters, line separators and lone surrogates; marks of writing direction, which can disguise a name;
zero-width spaces, and the byte order mark."""

_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Lone surrogates other than those of surrogateescape, which represent undecodable bytes of a file name."""


def to_utf8(text: str) -> str:
    r"""Return text that can be encoded in UTF-8: each byte of a file name that is not UTF-8 becomes \xNN.

    Example:
        >>> print(to_utf8(os.fsdecode(b"caf\xe9.png")))
        caf\xe9.png
    """
    if text.isascii():
        return text
    are_bytes = _OTHER_SURROGATE.search(text) is None  # only surrogateescape, as in file names
    return text.encode("utf-8", "surrogateescape" if are_bytes else "backslashreplace").decode(
        "utf-8", "backslashreplace"
    )


def escape_text(text: str, *, keep: str = "") -> str:
    r"""Return text that is safe to display: control characters, marks of writing direction and invisible characters
    become escapes such as \n, \x1b or \u202e, and bytes that are not UTF-8 become \xNN.

    Args:
        text: untrusted text.
        keep: characters that are not escaped, e.g. "\n" in a message of several lines.
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), to_utf8(text))


def to_cell(value: Any) -> Any:
    """Return a value that is safe in a csv file opened in a spreadsheet; only text is changed.

    Text is escaped by `escape_text` and, if it begins like a formula (= + - @, a tab), prefixed with a '.
    """
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip(" ").startswith(_FORMULA) else "") + escape_text(value)


_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#+!|~&$])")


def to_markdown(text: str) -> str:
    """Escape text so that Markdown shows it literally, on one line: no links, no HTML, no table columns."""
    return _MARKDOWN.sub(r"\\\1", escape_text(text)).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def to_plain_markdown(text: str) -> str:
    """Escape a sentence for one line of Markdown: emphasis and code keep working; links, HTML and columns do not."""
    return escape_text(text).replace("&", "&amp;").replace("<", "&lt;").replace("[", r"\[").replace("|", r"\|")


def count_noun(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or the plural.

    Args:
        number: how many there are.
        noun: in the singular; a final y becomes "ies", a final s or x gets "es", others "s".

    Example:
        >>> count_noun(1, "file"), count_noun(3589, "image"), count_noun(0, "class")
        ('1 file', '3,589 images', '0 classes')
    """
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"
    return f"{number:,} {plural}"


def _escape(character: str) -> str:
    number = ord(character)
    if character in _CELL_ESCAPES:
        return _CELL_ESCAPES[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


_CELL = "padding:0.2em 0.7em;border-bottom:1px solid rgba(128,128,128,0.35);"
MAX_ROWS = 20
"""Maximum number of rows that an HTML table shows; a longer one shows the first rows and the total."""


class Interval(Protocol):
    """An object with a value and optionally its 95 % interval, as in the records of `dlfer.runs.metrics_record`."""

    value: float | None
    low: float | None
    high: float | None


def format_interval(estimate: Interval | None) -> str:
    """Return a fraction as percent with its 95 % interval, e.g. "64.3 % (61.2 to 67.1)"; "–" if there is no value."""
    if estimate is None or estimate.value is None:
        return "–"
    text = f"{100 * estimate.value:.1f} %"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def shorten(estimate: Interval | None) -> tuple[float | None, ...]:
    """Return (value, low, high) with four decimals, or (value,) without an interval, for the `repr` of a record."""
    if estimate is None or estimate.value is None:
        return (None,)
    ends = () if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)
    return tuple(round(number, 4) for number in (estimate.value, *ends))


def format_html(
    title: str, rows: Sequence[Sequence[Any]], *, header: Sequence[str] = (), notes: Iterable[str | None] = ()
) -> str:
    """Return an HTML table with a title above and notes below, with all text escaped.

    Args:
        title: one line.
        rows: the cells of each row; integers are right-aligned, None is shown as "–".
        header: names of the columns; empty for no header.
        notes: paragraphs; None and "" are left out.

    Example:
        >>> "&lt;b&gt;" in format_html("labels", [("<b>", 3)])
        True
    """
    heads = "".join(
        f'<th style="{_CELL}text-align:{_align(rows, i)}">{_escape_html(h)}</th>' for i, h in enumerate(header)
    )
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(_format_cell(cell) for cell in row)}</tr>" for row in rows[:MAX_ROWS])
    more = f"The first {MAX_ROWS} of {len(rows):,} rows." if len(rows) > MAX_ROWS else None
    below = "".join(f'<p style="margin:0.3em 0">{_escape_html(note)}</p>' for note in (more, *notes) if note)
    table = f'<table style="border-collapse:collapse">{head}<tbody>{body}</tbody></table>' if rows else ""
    return f"<div><p><b>{_escape_html(title)}</b></p>{table}{below}</div>"


def _escape_html(value: Any) -> str:
    return html.escape(escape_text(str(value), keep="\n"))


def _format_cell(value: Any) -> str:
    text = "–" if value is None else f"{value:,}" if _is_count(value) else str(value)
    return f'<td style="{_CELL}text-align:{"right" if _is_count(value) else "left"}">{_escape_html(text)}</td>'


def _align(rows: Sequence[Sequence[Any]], column: int) -> str:
    return "right" if rows and _is_count(rows[0][column]) else "left"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ShownModel:
    """A mixin that gives a model a short `repr` and an HTML table for notebooks, whatever its inference engine."""

    def __repr__(self) -> str:
        words = [f"{key}={value!r}" for key, value in self._describe() if key in ("name", "labels", "image_size")]
        return f"{type(self).__name__}({', '.join(words)})"

    def _repr_html_(self) -> str:
        smoke = "Trained by a smoke run: its predictions are meaningless." if self.about.smoke else None
        rows = [(key, ", ".join(value) if isinstance(value, tuple) else value) for key, value in self._describe()]
        return format_html(f"{type(self).__name__}", [row for row in rows if row[1] is not None], notes=[smoke])

    def _describe(self) -> list[tuple[str, Any]]:
        about, temperature = self.about, self.temperature_fit
        return [
            ("name", about.name or about.run or about.experiment),
            ("family", getattr(self, "family", None)),
            ("labels", tuple(self.labels)),
            ("image_size", int(self.image_size)),
            ("channels", int(self.channels)),
            ("temperature", None if temperature is None or temperature.value is None else f"{temperature.value:.3f}"),
            ("protocol", about.protocol),
        ]


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
    """Open a csv file as text, decompressed if it is gzip or a zip with one csv in it; `errors` is as in `open`.

    Raises:
        DataError: the file is of another kind, which the message names, or its archive is damaged.
    """
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(path.open("rb"))
        try:
            binary = stack.enter_context(_unpack(stream, path))
            start = binary.read(512)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
            raise DataError(
                f"{path.name}: an archive that cannot be unpacked ({shorten_message(error, path)}); fetch it again."
            ) from error
        binary.seek(0)
        _check_kind(path, start)
        text = io.TextIOWrapper(binary, encoding=_find_encoding(start), errors=errors, newline="")
        stack.callback(text.close)
        try:
            yield text
        except (EOFError, zlib.error, zipfile.BadZipFile, gzip.BadGzipFile) as error:
            raise DataError(
                f"{path.name}: the archive is cut short or damaged ({shorten_message(error, path)}); fetch it again."
            ) from error


def find_delimiter(header: str) -> str:
    """Return the delimiter of a csv header: the most frequent of comma, semicolon, tab and bar."""
    return max(DELIMITERS, key=header.count)


MAX_LINE = 1_000_000
"""Maximum characters of a line; a row of FER2013 has 9,000. A longer line is no row, and could fill the memory."""


def read_lines(stream: TextIO) -> Iterator[str]:
    """Yield the lines of a text stream; raise DataError for a line longer than `MAX_LINE`."""
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
    """Yield the number of the first line and the fields of each csv record; the header determines the delimiter.

    Raises:
        DataError: a quotation mark is not closed, so that a field holds following rows; or a field is too long.
    """
    lines = read_lines(stream)
    first, header = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
    delimiter = find_delimiter(header)
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter)
    name, start = Path(str(getattr(stream, "name", "the file"))).name, 1
    try:
        for fields in reader:
            if any(delimiter in text and ("\n" in text or "\r" in text) for text in fields):
                raise DataError(
                    f"{name} line {first + start}: found a field that begins with a quotation mark and goes on to line "
                    f"{first + reader.line_num}, expected one that is closed in its row. Close or delete the mark."
                )
            yield first + start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name} line {first + start}: not a csv ({error}). If the row has a quotation mark that is not closed, close or delete it."
        ) from error


def _unpack(stream: BinaryIO, path: Path) -> BinaryIO:
    start = stream.read(4)
    stream.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=stream)
    if start != b"PK\3\4":
        return stream
    archive = zipfile.ZipFile(stream)
    names = [info.filename for info in archive.infolist() if not info.is_dir() and "__MACOSX" not in info.filename]
    if any(name.startswith("xl/") for name in names):
        raise DataError(f"{path.name}: an Excel workbook; export its sheet as csv (UTF-8).")
    tables = [name for name in names if name.casefold().endswith((".csv", ".tsv"))]
    tables = tables or [name for name in names if name.casefold().endswith(".txt")]  # a .txt beside a csv describes it
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


_OWN_KINDS = {".keras": "a zip archive", ".h5": "an HDF5 file", ".hdf5": "an HDF5 file"}


def describe_damage(path: Path) -> str:
    """Return a sentence on what a model's file that cannot be opened is, by its first bytes, and what to do."""
    with path.open("rb") as stream:
        start = stream.read(512)
    if not start:
        return "The file is empty: get it again."
    kinds = {"a zip archive": re.compile(rb"PK\x03\x04"), "a gzip archive": re.compile(rb"\x1f\x8b"), **_OTHER_KINDS}
    found = next((kind for kind, pattern in kinds.items() if pattern.match(start)), None)
    if found in (None, _OWN_KINDS.get(path.suffix)):
        return f"The file is damaged, cut short or not of the format {path.suffix}: get it again, or export the model again."
    if found == "a zip archive":
        return "The file is a zip archive: unpack it and give the model in it, or name it .keras if Keras saved it."
    return f"The file is {found}, expected the format {path.suffix}: get the model again in this format."


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


def round_up(value: float) -> str:
    """Format an upper bound, 0 or more, with two significant digits, rounded up: 0.000712 -> "0.00072"."""
    if not (math.isfinite(value) and value > 0):
        return f"{value:.2g}"
    exact = decimal.Decimal(repr(float(value)))
    return f"{float(exact.quantize(decimal.Decimal(1).scaleb(exact.adjusted() - 1), decimal.ROUND_CEILING)):.2g}"
