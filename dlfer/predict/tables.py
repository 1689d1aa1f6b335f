"""Predictions as rows: csv, JSON, JSON lines, parquet, or a table to look at; written as they come.

Columns of csv and parquet, in this order (in JSON the same keys, with `probabilities` in place of the columns
of the labels):

    file        as it was named; in a folder, with the folder
    face        1 is the largest in the picture; 0: no face was found, and what follows is empty
    x0 y0 x1 y1 the box, in pixels of the upright picture; empty with --faces whole
    score       of the detector; centerface, mtcnn: probability of a face, opencv: a weight
    label       the most probable one; "uncertain" if its probability is below --abstain
    confidence  the probability of the most probable label
    <label>     one column for each label: its probability ("p_" before a name that is taken)
    abstained   true or false
    frame       of a film: number of the frame, from 0
    seconds     of a film: time of the frame
    track       of a film: number of the face, the same from frame to frame
"""

from __future__ import annotations

import csv
import json
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from dlfer.errors import EnvironmentProblem, UserError
from dlfer.predict.predictor import FramePrediction

FORMATS = ("csv", "json", "jsonl", "parquet")
_BEFORE = ("file", "face", "x0", "y0", "x1", "y1", "score", "label", "confidence")
_AFTER = ("abstained", "frame", "seconds", "track")
_ROW_GROUP = 4096
_WIDTH = 44


class Table(Protocol):
    """Takes predictions, and is closed at the end."""

    def write(self, prediction: FramePrediction) -> None:
        """Add the rows of a picture."""

    def close(self, failed: Sequence[dict[str, str]]) -> None:
        """End it; `failed` are {"file", "error"} of what could not be read."""

    def discard(self) -> None:
        """Leave nothing behind."""


def make_rows(prediction: FramePrediction) -> Iterator[dict[str, Any]]:
    """Yield a row for each face, with its probabilities under one key; where no face was found, one that says so."""
    frame = prediction.frame
    seconds = None if frame.seconds is None else round(frame.seconds, 3)
    place = {"frame": frame.index, "seconds": seconds}
    empty = dict.fromkeys(("x0", "y0", "x1", "y1"))
    if not prediction.faces:
        nothing = {**dict.fromkeys(("score", "label", "confidence", "probabilities")), "abstained": False}
        yield {"file": frame.name, "face": 0, **empty, **nothing, **place, "track": None}
    for number, face in enumerate(prediction.faces, start=1):
        box = empty if face.box is None else dict(zip(empty, (round(value, 2) for value in face.box), strict=True))
        yield {
            "file": frame.name,
            "face": number,
            **box,
            "score": None if face.score is None else round(face.score, 6),
            "label": face.label,
            "confidence": round(face.confidence, 6),
            "probabilities": {label: round(value, 6) for label, value in face.probabilities.items()},
            "abstained": face.abstained,
            **place,
            "track": face.track,
        }


def list_columns(labels: Sequence[str]) -> dict[str, str]:
    """Return column -> label or "" for csv and parquet, in order."""
    taken = {*_BEFORE, *_AFTER}
    middle = {f"p_{label}" if label in taken else label: label for label in labels}
    return {**dict.fromkeys(_BEFORE, ""), **middle, **dict.fromkeys(_AFTER, "")}


def open_table(path: Path | None, *, labels: Sequence[str], about: dict[str, Any], form: str | None = None) -> Table:
    """Return the table that predictions are written to.

    Args:
        path: of the file; it appears, whole, when the table is closed. None: stdout.
        labels: of the classifier.
        about: what JSON and parquet say of all rows, from `describe_predictions`.
        form: one of `FORMATS`, or "table" on stdout; None: by the path's ending; on a terminal "table", else csv.

    Raises:
        UserError: no such format.
        EnvironmentProblem: pyarrow is not installed, and parquet was asked for.
    """
    if form is None:
        form = path.suffix.lstrip(".").lower() if path is not None else "table" if sys.stdout.isatty() else "csv"
    if (
        form not in (*FORMATS, "table")
        or (form == "table" and path is not None)
        or (form == "parquet" and path is None)
    ):
        where = "on stdout" if path is None else str(path)
        raise UserError(f"{where}: found the format {form!r}, expected a file that ends in .{', .'.join(FORMATS)}.")
    if form == "parquet":
        return _ParquetTable(path, labels, about)
    if form == "csv":
        return _CsvTable(path, labels)
    if form == "json":
        return _JsonTable(path, about)
    return _LinesTable(path) if form == "jsonl" else _TerminalTable(path)


class _TextTable:
    """On stdout, or in a file that has a temporary name until it is closed."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._temporary = path, None if path is None else _name_temporary(path)
        self._file: TextIO = sys.stdout
        if self._temporary is not None:
            self._file = self._temporary.open("x", encoding="utf-8", newline="")

    def close(self, failed: Sequence[dict[str, str]]) -> None:
        self._file.flush()
        if self._path is not None:
            self._file.close()
            self._temporary.replace(self._path)

    def discard(self) -> None:
        if self._path is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)


class _CsvTable(_TextTable):
    def __init__(self, path: Path | None, labels: Sequence[str]) -> None:
        super().__init__(path)
        self._columns = list_columns(labels)
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(self._columns)

    def write(self, prediction: FramePrediction) -> None:
        for row in make_rows(prediction):
            cells = _flatten(row, self._columns).values()
            self._writer.writerow(str(cell).lower() if isinstance(cell, bool) else cell for cell in cells)


class _LinesTable(_TextTable):
    def write(self, prediction: FramePrediction) -> None:
        for row in make_rows(prediction):
            self._file.write(json.dumps(row) + "\n")


class _JsonTable(_TextTable):
    """{"about": {...}, "rows": [...], "failed": [...]}, written row by row."""

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        super().__init__(path)
        self._separator = "\n"
        self._file.write(f'{{"about": {json.dumps(about)},\n"rows": [')

    def write(self, prediction: FramePrediction) -> None:
        for row in make_rows(prediction):
            self._file.write(self._separator + json.dumps(row))
            self._separator = ",\n"

    def close(self, failed: Sequence[dict[str, str]]) -> None:
        self._file.write(f'\n],\n"failed": {json.dumps(list(failed))}}}\n')
        super().close(failed)


class _TerminalTable(_TextTable):
    """For people: what a row says in few columns; long names lose their beginning."""

    _has_head = False

    def write(self, prediction: FramePrediction) -> None:
        if not self._has_head:
            self._print("file", "seconds", "face", "label", "", "box")
            self._has_head = True
        for row in make_rows(prediction):
            name = row["file"] if len(row["file"]) <= _WIDTH else "..." + row["file"][3 - _WIDTH :]
            time = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
            if row["face"] == 0:
                self._print(name, time, "", "no face found", "", "")
                continue
            box = "" if row["x0"] is None else " ".join(f"{row[key]:.0f}" for key in ("x0", "y0", "x1", "y1"))
            face = row["face"] if row["track"] is None else f"#{row['track']}"
            self._print(name, time, face, row["label"], f"{row['confidence']:.1%}", box)

    def _print(self, name: str, time: str, face: object, label: str, confidence: str, box: str) -> None:
        line = f"{name:{_WIDTH}} {time:>8} {face!s:>5}  {label:14} {confidence:>6}  {box}"
        self._file.write(line.rstrip() + "\n")


class _ParquetTable:
    """Written in groups of rows; `about` is in the metadata of the schema."""

    def __init__(self, path: Path, labels: Sequence[str], about: dict[str, Any]) -> None:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise EnvironmentProblem(f"{path}: parquet needs pyarrow ({error}): pip install pyarrow==26.0.1") from error
        self._columns = list_columns(labels)
        texts, wholes = ("file", "label"), ("face", "frame", "track")
        kinds = dict.fromkeys(texts, pyarrow.string()) | dict.fromkeys(wholes, pyarrow.int64())
        kinds["abstained"] = pyarrow.bool_()
        fields = [
            (name, pyarrow.float64() if label else kinds.get(name, pyarrow.float64()))
            for name, label in self._columns.items()
        ]
        self._schema = pyarrow.schema(fields, metadata={"dlfer": json.dumps(about)})
        self._path, self._temporary = path, _name_temporary(path)
        self._writer = parquet.ParquetWriter(self._temporary, self._schema)
        self._rows: list[dict[str, Any]] = []
        self._make = pyarrow.Table.from_pylist

    def write(self, prediction: FramePrediction) -> None:
        self._rows += [_flatten(row, self._columns) for row in make_rows(prediction)]
        if len(self._rows) >= _ROW_GROUP:
            self._flush()

    def close(self, failed: Sequence[dict[str, str]]) -> None:
        self._flush()
        self._writer.close()
        self._temporary.replace(self._path)

    def discard(self) -> None:
        self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(self._make(self._rows, schema=self._schema))
            self._rows = []


def _flatten(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return a row with a column for each label."""
    probabilities = row["probabilities"] or {}
    return {name: probabilities.get(label) if label else row[name] for name, label in columns.items()}


def _name_temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
