"""Names from outside as text for a terminal, csv and Markdown, and the text of csv files as programs write it."""

from __future__ import annotations

import gzip
import io
import math
import os
import tarfile
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlfer.errors import DataError
from dlfer.runs.text import (
    count_noun,
    escape_text,
    open_text,
    read_records,
    round_up,
    to_cell,
    to_markdown,
    to_plain_markdown,
    to_utf8,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("日本 👨‍👩‍👧 é", "日本 👨‍👩‍👧 é"),
        (os.fsdecode(b"caf\xe9\xff.png"), r"caf\xe9\xff.png"),
        ("half \ud800", r"half \ud800"),
        ("a\x1b[2Jb\x07\x7f\x9b", r"a\x1b[2Jb\x07\x7f\x9b"),
        ("two\r\nlines\t\u2028", r"two\r\nlines\t\u2028"),
        ("a\u202egpj.exe\u2066\ufeff\u200b", r"a\u202egpj.exe\u2066\ufeff\u200b"),
    ],
)
def test_what_is_hidden_is_shown(text, expected):
    assert escape_text(text) == expected
    to_utf8(text).encode()


def test_lines_of_a_message_may_stay():
    assert escape_text("a\nb\tc\x1b", keep="\n\t") == "a\nb\tc\\x1b"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", "＝1", "\n-2"])
def test_a_formula_is_text_in_csv(text):
    assert to_cell(text) == "'" + escape_text(text)


def test_numbers_and_plain_names_stay_in_csv():
    assert [to_cell(value) for value in (-1, -0.5, None, True, "a=b", "a-b")] == [-1, -0.5, None, True, "a=b", "a-b"]


def test_markdown_shows_names_and_does_nothing():
    assert to_markdown("<b>[x](http://y)|`z`\n# h") == r"&lt;b&gt;\[x\](http://y)\|\`z\`\\n\# h"
    assert (
        to_plain_markdown("see `data` of <img src=x> | [a](b)\n# no")
        == r"see `data` of &lt;img src=x> \| \[a](b)\n# no"
    )
    assert to_plain_markdown("a & b, &lt;") == "a &amp; b, &amp;lt;"


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "file", "1 file"),
        (0, "image", "0 images"),
        (3589, "row", "3,589 rows"),
        (2, "class", "2 classes"),
        (2, "box", "2 boxes"),
        (5, "entry", "5 entries"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, expected):
    assert count_noun(number, noun) == expected


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
    (tmp_path / "b.zip").write_bytes(_zip({"a.csv": _text(","), "readme.txt": "", "labels.TXT": ""}))
    (tmp_path / "c.zip").write_bytes(_zip({"a.txt": _text(","), "readme.md": ""}))
    for name in ("a.csv.gz", "a.zip", "b.zip", "c.zip"):
        assert _read(tmp_path / name) == _ROWS
    (tmp_path / "d.csv").write_text("\n \n" + _text(";"))
    with open_text(tmp_path / "d.csv") as stream:
        assert list(read_records(stream))[-1] == (len(_ROWS) + 2, _ROWS[-1])


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (_zip({"xl/workbook.xml": ""}), "an Excel workbook"), (_zip({"a.csv": "", "b.csv": ""}), "2 of them csv"),
        (_zip({"a.csv": "", "b.csv": "", "c.txt": ""}), r"3 files, 2 of them csv .a\.csv, b\.csv.;"),
        (_tar(), "a tar archive; unpack"), (b"<!DOCTYPE html><html>", "a web page"), (b"%PDF-1.4", "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"), (b"PAR1" + bytes(9), "Parquet"),
        (gzip.compress(_text(",").encode() * 9000)[:300], "cut short|cannot be unpacked"), (b"PK\3\4" + bytes(40), "cannot be unpacked"),
    ],
    ids=["excel", "two csv", "two csv and a text", "tar", "html", "pdf", "git lfs", "parquet", "half a gzip", "half a zip"],
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0007121562957763672, "0.00072"),
        (4.2825937e-05, "4.3e-05"),
        (0.001, "0.001"),
        (0.0, "0"),
        (0.0996, "0.1"),
        (0.5, "0.5"),
        (math.nan, "nan"),
    ],
)
def test_a_bound_is_rounded_up(value, expected):
    assert round_up(value) == expected


@given(st.floats(1e-12, 1.0))
def test_a_rounded_bound_holds_and_is_close(value):
    assert value * (1 - 1e-12) <= float(round_up(value)) <= 1.1 * value
