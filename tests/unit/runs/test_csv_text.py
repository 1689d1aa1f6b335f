"""Text of a csv as programs write it."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import pytest

from dlfer.errors import DataError
from dlfer.runs.csv_text import open_text, read_records

_ROWS = [["id", "age"], ["a", "30"], ["b, or c", "4"]]


def _text(delimiter: str) -> str:
    return "\r\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in _ROWS)


def _zip(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return stream.getvalue()


def _tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("fer2013.csv"), io.BytesIO(b""))
    return stream.getvalue()


def _read(path):
    with open_text(path) as stream:
        return [fields for _, fields in read_records(stream)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_delimiters_and_encodings(tmp_path, delimiter, encoding):
    (tmp_path / "a.csv").write_bytes(_text(delimiter).encode(encoding))
    assert _read(tmp_path / "a.csv") == _ROWS


def test_packed_files(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(_text(";").encode("utf-16")))
    (tmp_path / "a.zip").write_bytes(_zip({"x/a.csv": _text(","), "__MACOSX/x/._a.csv": "", "readme.md": ""}))
    assert _read(tmp_path / "a.csv.gz") == _read(tmp_path / "a.zip") == _ROWS


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (_zip({"xl/workbook.xml": ""}), "an Excel workbook"), (_zip({"a.csv": "", "b.csv": ""}), "2 of them csv"),
        (_tar(), "a tar archive; unpack"), (b"<!DOCTYPE html><html>", "a web page"), (b"%PDF-1.4", "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"PAR1" + bytes(9), "Parquet"),
        (gzip.compress(_text(",").encode() * 9000)[:300], "cut short|cannot be unpacked"), (b"PK\3\4" + bytes(40), "cannot be unpacked"),
    ],
    ids=["excel", "two csv", "tar", "html", "pdf", "git lfs", "parquet", "half a gzip", "half a zip"],
)  # fmt: skip
def test_what_is_no_csv_is_named(tmp_path, contents, message):
    (tmp_path / "a.csv").write_bytes(contents)
    with pytest.raises(DataError, match=message):
        _read(tmp_path / "a.csv")


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: _zip({"a.csv": data.decode()})])
def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path, pack):
    (tmp_path / "a.csv").write_bytes(pack(b"id,age\n" + b"0" * 2_000_000))
    with pytest.raises(DataError, match="line 2: found more than 1,000,000 characters in one line"):
        _read(tmp_path / "a.csv")
