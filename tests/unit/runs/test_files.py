"""What may be written where: no output over an input, another file only by force, and all of it known before."""

from __future__ import annotations

import os

import pytest

from dlfer.errors import ConfigError
from dlfer.runs import files
from dlfer.runs.files import check_outputs, check_writable, choose_name, fold_name


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "me.jpg").write_text("me")
    return tmp_path


def test_what_is_new_may_be_written_and_nothing_is_made(here):
    check_outputs(
        {"--json": here / "deep" / "er" / "a.json", "--html": None, "--draw": ["data/you.jpg"]},
        ["data/me.jpg", None, "absent"],
    )
    assert sorted(path.name for path in here.iterdir()) == ["data"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("make", "out"),
    [
        (lambda: None, "data/me.jpg"),
        (lambda: None, "data/../data/./me.jpg"),
        (lambda: os.symlink("data/me.jpg", "soft"), "soft"),
        (lambda: os.link("data/me.jpg", "hard"), "hard"),
        (lambda: os.symlink("data", "folder"), "folder/me.jpg"),
    ],
    ids=["itself", "another path", "symbolic link", "hard link", "through a folder"],
)
def test_an_input_is_never_replaced(here, make, out, force):
    make()
    with pytest.raises(ConfigError, match=r"--out .*is the input data/me\.jpg and is never replaced") as refused:
        check_outputs({"--out": out}, ["data/me.jpg"], force=force)
    assert os.path.basename(out) in str(refused.value)
    assert "--force" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_file_in_an_input_folder_is_an_input_and_a_new_one_is_not(here):
    with pytest.raises(ConfigError, match="is part of the input data and is never replaced"):
        check_outputs({"--html": "data/me.jpg"}, ["data"], force=True)
    check_outputs({"--html": "data/audit.html"}, ["data"])


def test_another_file_is_replaced_by_force_alone(here):
    (here / "a.csv").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out a\.csv: exists already .* --force"):
        check_outputs({"--out": "a.csv"}, ["data/me.jpg"])
    check_outputs({"--out": "a.csv"}, ["data/me.jpg"], force=True)
    (here / "nowhere").symlink_to(here / "gone")
    with pytest.raises(ConfigError, match="exists already"):
        check_outputs({"--out": "nowhere"})


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"--json": "x", "--html": "x"}, "--json would write the same file"),
        ({"--json": "x", "--html": "data/../x"}, "--json would write the same file"),
        ({"--json": "x", "--html": "x/page.html"}, "would make .* a file"),
        ({"--json": "data"}, "is a folder"),
        ({"--json": "/dev/null"}, "a device or a pipe"),
        ({"--json": "data/me.jpg/x.json"}, "expected a folder, and .*me.jpg is a file"),
        ({"--json": "dangling/x.json"}, "a broken link"),
        ({"--json": "x" * 300}, "longer than its file system allows"),
    ],
)
def test_what_cannot_be_written_is_known_before(here, given, problem):
    (here / "dangling").symlink_to(here / "gone")
    with pytest.raises(ConfigError, match=problem):
        check_outputs(given, force=True)


def test_a_folder_that_cannot_be_written_into_is_known_before(here, monkeypatch):
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    for given in ("data/x.json", "new/deep/x.json"):
        with pytest.raises(ConfigError, match=f"--json {given}: nothing can be written into"):
            check_outputs({"--json": given})
    with pytest.raises(ConfigError, match="--out data: nothing can be written"):
        check_writable("data", "--out")


def test_names_that_differ_in_case_are_one_file_where_the_folder_says_so(here, monkeypatch):
    check_outputs({"--json": "a.out", "--html": "A.out"})
    monkeypatch.setattr(files, "_ignores_case", lambda folder: True)
    with pytest.raises(ConfigError, match="the same file"):
        check_outputs({"--json": "a.out", "--html": "A.out"})
    with pytest.raises(ConfigError, match="the same file"):
        check_outputs({"--json": "caf\u00e9", "--html": "cafe\u0301"})


def test_a_folder_that_ignores_case_is_told_by_its_name(here, monkeypatch):
    assert not files._ignores_case(here / "data" / "new")
    (here / "DATA").symlink_to(here / "data")  # what such a disk would answer
    assert files._ignores_case(here / "data" / "new")


def test_names_never_meet_and_are_never_too_long(here):
    taken: set[str] = set()
    for stem in ("a", "A", "a", "x" * 300, "x" * 299 + "y", "é" * 200, "..", " ", "\udcff" * 200):
        name = choose_name(stem, ".jpg", taken, folder=here) + ".jpg"
        assert fold_name(name) not in taken
        taken.add(fold_name(name))
        (here / name).touch()
    assert {"a.jpg", "A-2.jpg", "a-3.jpg", "picture...jpg", "picture.jpg"} <= {path.name for path in here.iterdir()}
    assert len(taken) == 9


@pytest.mark.parametrize("contents", [rb'"\ud800"', b'"\xed\xa0\x80"', '"\\ud800"'.encode("utf-16")])
def test_half_a_character_is_no_text(contents):
    with pytest.raises(ValueError, match="half a character"):
        files.parse_json(contents)


@pytest.mark.parametrize("contents", [rb'"\ud83d\ude00"', '"\U0001f600"'.encode(), '"\U0001f600"'.encode("utf-16")])
def test_a_whole_character_is_text(contents):
    assert files.parse_json(contents) == "\U0001f600"
