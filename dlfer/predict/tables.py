"""Tables of predictions as csv, JSON, JSON lines, parquet, or text on a terminal; rows are written as they arrive.

Columns of csv and parquet, in this order (JSON has the same keys, with `probabilities` in place of the columns
of the labels):

    file        path of the input as it was given; for files in a given folder, the path starts with the folder
    face        1 for the largest in the picture; 0: no face was found, and the columns of the face are empty
    x0 y0 x1 y1 the box, in pixels of the upright picture; empty with --faces whole
    score       of the detector: probability of a face (centerface, mtcnn) or weight (opencv); empty with --faces whole,
                and where a face in a video was followed from other frames
    label       the most probable label; "uncertain" if its probability is below --abstain
    confidence  the probability of the most probable label
    <label>     one column for each label: its probability ("p_" is put before a name that is already a column)
    abstained   true or false: whether the confidence is below --abstain
    frame       index of the frame in its video, from 0
    seconds     time of the frame in its video
    track       number of the face in its video, the same from frame to frame
    error       what is wrong with an input that could not be read completely; all columns but file are empty then

JSON lists such inputs under `failed` instead, with those that were predicted but not drawn, and under `reading` counts
the files seen, used and left out, by reason with the first names; parquet has both in its metadata (`dlfer_failed`,
`dlfer_reading`). Bytes of a name that are not UTF-8 are always written as \\xNN. In csv and on a terminal, control
characters are escaped too (\\n, \\x1b, \\u202e); csv cells that start like a formula (= + - @, a tab) get a ' in front.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from dlfer.errors import EnvironmentProblem, UserError
from dlfer.predict.media import UnreadableInput
from dlfer.predict.predictor import FramePrediction
from dlfer.runs.files import explain_write_error, name_temporary, replace_when_done
from dlfer.runs.records import ReadingRecord
from dlfer.runs.text import escape_text, to_cell, to_utf8

FORMATS = ("csv", "json", "jsonl", "parquet")
_BEFORE = ("file", "face", "x0", "y0", "x1", "y1", "score", "label", "confidence")
_AFTER = ("abstained", "frame", "seconds", "track", "error")
_ROW_GROUP = 4096
_WIDTH = 44


class Table(Protocol):
    """The interface of a table to which predictions are written."""

    def write(self, result: FramePrediction | UnreadableInput) -> None:
        """Add the rows of a picture or frame, or the row of an input that could not be read."""

    def close(self, failed: Sequence[dict[str, str]], reading: ReadingRecord | None = None) -> None:
        """Finish the table; `failed` has {"file", "error"} of inputs not read or drawn, `reading` the counts of all."""

    def discard(self) -> None:
        """Abandon the table, and delete its temporary file."""


def make_rows(result: FramePrediction | UnreadableInput) -> Iterator[dict[str, Any]]:
    """Yield one row per face, with its probabilities under one key; a picture without faces has one row with face 0.

    An input that could not be read has one row, with its error.
    """
    empty = dict.fromkeys(("x0", "y0", "x1", "y1"))
    nothing = dict.fromkeys(("score", "label", "confidence", "probabilities"))
    if isinstance(result, UnreadableInput):
        rest = {**dict.fromkeys(_AFTER), "error": to_utf8(result.error)}
        yield {"file": to_utf8(result.name), "face": None, **empty, **nothing, **rest}
        return
    frame, name = result.frame, to_utf8(result.frame.name)
    seconds = None if frame.seconds is None else round(frame.seconds, 3)
    place = {"frame": frame.index, "seconds": seconds}
    if not result.faces:
        yield {"file": name, "face": 0, **empty, **nothing, "abstained": False, **place, "track": None, "error": None}
    for number, face in enumerate(result.faces, start=1):
        box = empty if face.box is None else dict(zip(empty, (round(value, 2) for value in face.box), strict=True))
        yield {
            "file": name,
            "face": number,
            **box,
            "score": None if face.score is None else round(face.score, 6),
            "label": face.label,
            "confidence": round(face.confidence, 6),
            "probabilities": {label: round(value, 6) for label, value in face.probabilities.items()},
            "abstained": face.abstained,
            **place,
            "track": face.track,
            "error": None,
        }


def list_columns(labels: Sequence[str]) -> dict[str, str]:
    """Return the columns of csv and parquet in order, as column -> label, or "" for a column without a label."""
    taken = {*_BEFORE, *_AFTER}
    middle = {f"p_{label}" if label in taken else label: label for label in labels}
    return {**dict.fromkeys(_BEFORE, ""), **middle, **dict.fromkeys(_AFTER, "")}


def choose_form(path: Path | None, form: str | None = None) -> str:
    """Return the format of a table: one of `FORMATS`, or "table"; see `open_table`.

    Raises:
        UserError: the format is unknown, or not available on stdout or in a file.
    """
    if form is None:
        form = path.suffix.lstrip(".").lower() if path is not None else "table" if sys.stdout.isatty() else "csv"
    known = ("table", *FORMATS[:-1]) if path is None else FORMATS
    if form not in known:
        where = "on stdout" if path is None else str(path)
        raise UserError(f"{where}: found the format {form!r}, expected a file that ends in .{', .'.join(FORMATS)}.")
    return form


def open_table(
    path: Path | None,
    *,
    labels: Sequence[str],
    about: dict[str, Any],
    form: str | None = None,
    has_videos: bool = True,
) -> Table:
    """Open a table for writing predictions.

    Args:
        path: of the file, which appears when the table is closed. None: stdout.
        labels: of the classifier.
        about: the description of all rows in JSON and parquet, from `describe_predictions`.
        form: one of `FORMATS`, or "table" on stdout; None: by the path's suffix; on a terminal "table", else csv.
        has_videos: whether a "table" has a column for the time in a video.

    Raises:
        UserError: see `choose_form`.
        EnvironmentProblem: the format is parquet, and pyarrow is not installed.
    """
    form = choose_form(path, form)
    if form == "parquet":
        return _ParquetTable(path, labels, about)
    if form == "csv":
        return _CsvTable(path, labels)
    if form == "json":
        return _JsonTable(path, about)
    return _LinesTable(path) if form == "jsonl" else _TerminalTable(path, has_times=has_videos)


class _Staged:
    """A file that is written under a temporary name and renamed when it is complete."""

    def __init__(self, path: Path, *, buffering: int = -1) -> None:
        self.path = Path(path)
        self._temporary = name_temporary(self.path)
        with _explaining(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file: Any = self._temporary.open("x+b", buffering)

    def commit(self) -> None:
        """Rename the file to its path; if the folder was removed meanwhile, create it again and copy the file there."""
        with _explaining(self.path):
            self.file.flush()
            try:
                self._temporary.replace(self.path)
            except FileNotFoundError:
                self.file.seek(0)
                with replace_when_done(self.path) as temporary, temporary.open("xb") as copy:
                    shutil.copyfileobj(self.file, copy)
            self.file.close()

    def discard(self) -> None:
        """Close and delete the temporary file."""
        with contextlib.suppress(OSError):  # closing writes buffered data, which fails again on a full disk
            self.file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Replace file system errors by ones that name the output file."""
    try:
        yield
    except OSError as error:
        raise explain_write_error(error, path) from error


_KEPT_ENDS = 64
"""Number of last pictures whose rows can be removed again, to make room for the end of a table on a full disk."""


class _TextTable(ABC):
    """A table of text, on stdout or in a file that has a temporary name until it is closed.

    After a failed `write`, the table in a file ends with the previous picture and can still be closed.
    """

    def __init__(self, path: Path | None) -> None:
        self._staged = None if path is None else _Staged(path, buffering=0)
        self._ends: deque[int] = deque(maxlen=_KEPT_ENDS)

    def write(self, result: FramePrediction | UnreadableInput) -> None:
        self._append("".join(self._format(row) for row in make_rows(result)))

    def close(self, failed: Sequence[dict[str, str]], reading: ReadingRecord | None = None) -> None:
        end = self._format_end(failed, reading)
        if self._staged is None:
            self._append(end)
            sys.stdout.flush()
            return
        while end:
            try:
                self._append(end)
                break
            except OSError:
                # The disk is full: remove the rows of the last pictures to make room for the end.
                if len(self._ends) < 2:
                    self.discard()
                    raise
                self._ends.pop()
                self._cut()
        self._staged.commit()

    def discard(self) -> None:
        if self._staged is not None:
            self._staged.discard()

    @abstractmethod
    def _format(self, row: dict[str, Any]) -> str:
        """Return the text of a row, including its separator."""

    def _format_end(self, failed: Sequence[dict[str, str]], reading: ReadingRecord | None) -> str:
        """Return the text after the last row."""
        return ""

    def _append(self, text: str) -> None:
        """Write a text; in a file, a failed write is undone."""
        if self._staged is None:
            sys.stdout.write(text)
            return
        left = memoryview(text.encode())
        try:
            with _explaining(self._staged.path):
                while left:
                    left = left[self._staged.file.write(left) :]
        except OSError:
            self._cut()
            raise
        self._ends.append(self._staged.file.tell())

    def _cut(self) -> None:
        """Remove the text after the last complete picture."""
        end = self._ends[-1] if self._ends else 0
        self._staged.file.truncate(end)
        self._staged.file.seek(end)


class _CsvTable(_TextTable):
    def __init__(self, path: Path | None, labels: Sequence[str]) -> None:
        super().__init__(path)
        self._columns = list_columns(labels)
        self._append(_format_cells(self._columns))

    def _format(self, row: dict[str, Any]) -> str:
        cells = _flatten(row, self._columns).values()
        return _format_cells(str(cell).lower() if isinstance(cell, bool) else cell for cell in cells)


def _format_cells(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([to_cell(cell) for cell in cells])
    return text.getvalue()


class _LinesTable(_TextTable):
    def _format(self, row: dict[str, Any]) -> str:
        return json.dumps(row) + "\n"


class _JsonTable(_TextTable):
    """A JSON object {"about": {...}, "rows": [...], "failed": [...], "reading": {...}}, written row by row."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        super().__init__(path)
        self._has_rows = False
        self._append(f'{{"about": {json.dumps(about)},\n"rows": [')

    def _format(self, row: dict[str, Any]) -> str:
        return f",\n{json.dumps(row)}"

    def write(self, result: FramePrediction | UnreadableInput) -> None:
        if isinstance(result, UnreadableInput):
            return
        text = "".join(self._format(row) for row in make_rows(result))
        self._append(text if self._has_rows else text[1:])
        self._has_rows = True

    def _format_end(self, failed: Sequence[dict[str, str]], reading: ReadingRecord | None) -> str:
        counts = "null" if reading is None else reading.model_dump_json()
        return f'\n],\n"failed": {json.dumps(list(failed))},\n"reading": {counts}}}\n'


class _TerminalTable(_TextTable):
    """A table for reading on a terminal, with few columns; long file names are cut at the start."""

    def __init__(self, path: Path | None, *, has_times: bool) -> None:
        super().__init__(path)
        self._has_head = False
        self._has_times = has_times

    def write(self, result: FramePrediction | UnreadableInput) -> None:
        if not self._has_head:
            self._append(self._format_line("file", "seconds", "face", "label", "", "box"))
            self._has_head = True
        super().write(result)

    def _format(self, row: dict[str, Any]) -> str:
        name = escape_text(row["file"])
        name = name if len(name) <= _WIDTH else "..." + name[3 - _WIDTH :]
        if row["face"] is None:
            return self._format_line(name, "", "", "not read", "", "")
        time = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        if row["face"] == 0:
            return self._format_line(name, time, "", "no face found", "", "")
        box = "" if row["x0"] is None else " ".join(f"{row[key]:.0f}" for key in ("x0", "y0", "x1", "y1"))
        face = row["face"] if row["track"] is None else f"#{row['track']}"
        return self._format_line(name, time, face, escape_text(row["label"]), f"{row['confidence']:.1%}", box)

    def _format_line(self, name: str, time: str, face: object, label: str, confidence: str, box: str) -> str:
        shown_time = f" {time:>8}" if self._has_times else ""
        line = f"{name:{_WIDTH}}{shown_time} {face!s:>5}  {label:14} {confidence:>6}  {box}"
        return line.rstrip() + "\n"


class _ParquetTable:
    """A parquet file, written in row groups; `about` is in the metadata of the schema."""

    def __init__(self, path: Path, labels: Sequence[str], about: dict[str, Any]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise EnvironmentProblem(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow==26.0.1") from error
        self._columns = list_columns(labels)
        texts, wholes = ("file", "label", "error"), ("face", "frame", "track")
        kinds = dict.fromkeys(texts, pyarrow.string()) | dict.fromkeys(wholes, pyarrow.int64())
        kinds["abstained"] = pyarrow.bool_()
        fields = [
            (name, pyarrow.float64() if label else kinds.get(name, pyarrow.float64()))
            for name, label in self._columns.items()
        ]
        self._schema = pyarrow.schema(fields, metadata={"dlfer": json.dumps(about)})
        self._staged = _Staged(path)
        self._writer = parquet.ParquetWriter(self._staged.file, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._make = pyarrow.Table.from_pylist

    def write(self, result: FramePrediction | UnreadableInput) -> None:
        self._rows += [_flatten(row, self._columns) for row in make_rows(result)]
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def close(self, failed: Sequence[dict[str, str]], reading: ReadingRecord | None = None) -> None:
        try:
            self._flush()
            ends = {"dlfer_failed": json.dumps(list(failed))}
            if reading is not None:
                ends["dlfer_reading"] = reading.model_dump_json()
            self._writer.add_key_value_metadata(ends)
            with _explaining(self._staged.path):
                self._writer.close()
            self._staged.commit()
        except (OSError, ValueError):  # pyarrow raises ValueError for a writer that failed before
            self.discard()
            raise

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing writes buffered data, which fails again on a full disk
            self._writer.close()
        self._staged.discard()

    def _flush(self) -> None:
        if self._rows:
            with _explaining(self._staged.path):
                self._writer.write_table(self._make(self._rows, schema=self._schema))
            self._rows = []


def _flatten(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with one column per label in place of the dictionary of probabilities."""
    probabilities = row["probabilities"] or {}
    return {name: probabilities.get(label) if label else row[name] for name, label in columns.items()}
