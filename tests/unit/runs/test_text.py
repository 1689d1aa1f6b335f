"""Names from outside as text for a terminal, csv and Markdown."""

from __future__ import annotations

import os

import pytest

from dlfer.runs.text import count_noun, escape_text, to_cell, to_markdown, to_plain_markdown, to_utf8


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
