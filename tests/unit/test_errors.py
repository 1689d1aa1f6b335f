"""What other libraries say, as it stands in messages of dlfer."""

from __future__ import annotations

import errno

import pytest

from dlfer.errors import MAX_FOREIGN, shorten


@pytest.fixture(autouse=True)
def without_debug(monkeypatch):
    monkeypatch.setenv("DLFER_DEBUG", "")


def test_a_message_is_one_line_of_200_characters_cut_between_words():
    text = shorten(ValueError("no\n\n  such   file " + "word " * 200))
    assert text.startswith("no such file word word")
    assert text.endswith("word ...")
    assert len(text) <= MAX_FOREIGN == 200
    assert len(shorten("x" * 900)) <= 200
    assert shorten("short") == "short"
    assert shorten(KeyError()) == "KeyError"


def test_debug_shows_all_of_it(monkeypatch):
    monkeypatch.setenv("DLFER_DEBUG", "1")
    assert len(shorten("word " * 200)) == 999


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "/data/a.npz"), "Permission denied"),
        (ValueError("Load model from /data/a.npz failed"), "Load model from it failed"),
        (ValueError("cannot open '/data/a.npz'"), "cannot open it"),
        (OSError("Unable to open file"), "Unable to open file"),
    ],
)
def test_the_path_that_the_message_names_is_not_said_again(error, said):
    assert shorten(error, "/data/a.npz") == said


@pytest.mark.parametrize("path", ["m", "o", ".", "mo"])
def test_a_short_path_is_not_cut_out_of_words(path):
    assert shorten("no module of modules", path) == "no module of modules"
