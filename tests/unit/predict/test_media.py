"""Names lead to files; what is damaged takes its place; decoding runs ahead, but not far."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer.data.files import Tally
from dlfer.predict import media
from dlfer.predict.media import Frame, ReadAhead, UnreadableInput, list_inputs, open_inputs
from dlfer.predict.video import is_video
from tests.unit.conftest import make_stdin, write_video


def write_picture(path, value=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16, 3), value, np.uint8)).save(path)
    return str(path)


def test_folders_globs_lists_and_what_is_absent(tmp_path):
    a, b = write_picture(tmp_path / "in" / "b.jpg"), write_picture(tmp_path / "in" / "a" / "c.PNG")
    write_picture(tmp_path / "in" / ".hidden.png")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    odd = write_picture(tmp_path / "odd[1].png")
    (tmp_path / "empty").mkdir()
    assert list(list_inputs([str(tmp_path / "in")])) == sorted([a, b])
    assert list(list_inputs([str(tmp_path / "in" / "**" / "*.PNG")])) == [b]
    assert list(list_inputs([odd])) == [odd]
    assert list(list_inputs(["-", "camera:0"], stdin=make_stdin(f"{a}\n\n{b}\r\n-\n"))) == [a, b, "camera:0"]
    tally = Tally()
    bad = list(list_inputs([str(tmp_path / "empty"), str(tmp_path / "*.gif")], tally=tally))
    assert tally.seen == 2
    assert [type(item) for item in bad] == [UnreadableInput, UnreadableInput]
    assert "holds no picture" in bad[0].error
    assert "nothing matches" in bad[1].error


@pytest.mark.parametrize("text", ["{a}\0{b}\0", "{a}\0{b}", "\ufeff{a}\n{b}", "\ufeff{a}\r\n\r\n{b}\r\n"])
def test_lists_as_other_programs_write_them(tmp_path, text):
    a, b = write_picture(tmp_path / "a.png"), write_picture(tmp_path / "b c.png")
    assert list(list_inputs(["-"], stdin=make_stdin(text.format(a=a, b=b)))) == [a, b]


def test_between_zero_bytes_a_name_may_hold_a_line_end(tmp_path):
    odd, a = write_picture(tmp_path / "new\nline.png"), write_picture(tmp_path / "a.png")
    assert list(list_inputs(["-"], stdin=make_stdin(f"{odd}\0{a}\0"))) == [odd, a]


def test_a_file_called_minus_that_a_glob_matches_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("-").write_bytes(Path(write_picture(tmp_path / "a.png")).read_bytes())
    found = list(list_inputs(["[-a]*"]))
    assert len(found) == 2
    assert [type(item) for item in open_inputs(found)] == [Frame, Frame]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("https://example.org/a.jpg", "https://example.org/a.jpg: found an address, expected a file. Download it"),
        ("rtsp://camera/1.mp4", "rtsp://camera/1.mp4: found an address"), ("file:///a.png", "an address"),
        ("", "an empty name"), ("  ", "an empty name"), ("camera:", "expected the number of a camera"),
        ("camera:99999999999999999999", "expected the number of a camera"),
    ],
)  # fmt: skip
def test_names_that_are_no_files_are_told_for_what_they_are(name, problem):
    found = list(open_inputs([name]))
    assert [type(item) for item in found] == [UnreadableInput]
    assert problem in found[0].error


def test_what_stands_in_no_folder_is_named_whole():
    tally = Tally()
    tally.leave_out("not read", "/dev/zero")
    assert tally.list_left_out()[0].first == ["/dev/zero"]


def test_what_cannot_be_read_stops_nothing(tmp_path):
    good = write_picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    names = [str(tmp_path / "bad.png"), good, str(tmp_path / "absent.mp4"), good, UnreadableInput("x", "x: why")]
    kinds = [type(item) for item in open_inputs(names)]
    assert kinds == [UnreadableInput, Frame, UnreadableInput, Frame, UnreadableInput]


def test_reading_ahead_is_bounded_keeps_the_order_and_hands_errors_over():
    drawn, met = 0, threading.Event()

    def draw():
        nonlocal drawn
        for number in range(20):
            drawn += 1
            if drawn == 4:
                met.set()
            yield number
        raise ValueError("the last")

    reader = ReadAhead(draw(), 2)
    assert next(reader) == 0
    assert met.wait(5)  # one handed over, two waiting, one in the hand
    assert drawn == 4
    found = []
    with pytest.raises(ValueError, match="the last"):
        found.extend(reader)
    # What a list takes before an error is not kept by every version of Python.
    assert drawn == 20


def test_leaving_early_ends_the_thread_and_closes_the_source():
    closed = threading.Event()

    def draw():
        try:
            yield from range(1000)
        finally:
            closed.set()

    reader = ReadAhead(draw(), 2)
    next(reader)
    reader.close()
    assert closed.wait(5)


def test_closing_ends_a_reader_of_a_reader_that_waits():
    """As Ctrl-C does while `dlfer predict -` waits for the next name."""
    is_waiting, may_end = threading.Event(), threading.Event()

    def draw():
        yield 1
        is_waiting.set()
        may_end.wait(60)

    inner = ReadAhead(draw(), 2, patience=0.01)
    outer = ReadAhead((2 * item for item in inner), 1, patience=None, source=inner)
    assert next(outer) == 2
    assert is_waiting.wait(5)
    assert not outer.wait(0.01)
    begin = time.monotonic()
    outer.close()
    assert time.monotonic() - begin < 30
    may_end.set()
    assert list(outer) == []


def test_of_live_items_the_newest_waits_and_others_keep_their_places():
    may_go_on, is_done = threading.Event(), threading.Event()

    def draw():
        yield "first"
        may_go_on.wait(5)
        yield from ("video 1", "video 2", "live 1", "live 2", "live 3", "video 3")
        is_done.set()

    reader = ReadAhead(draw(), 9, is_live=lambda item: item.startswith("live"))
    assert next(reader) == "first"
    may_go_on.set()
    assert is_done.wait(5)
    assert list(reader) == ["video 1", "video 2", "live 3", "video 3"]


def test_what_a_folder_holds_besides_is_counted_and_kinds_are_told_by_the_first_bytes(tmp_path):
    folder = tmp_path / "in"
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(write_picture(folder / "a.tiff"))
    (folder / "b").write_bytes((folder / "a.tiff").read_bytes())
    video = write_video(folder / "c.mp4")
    (folder / "d").write_bytes(Path(video).read_bytes())
    (folder / "e.jpg").write_bytes(Path(video).read_bytes())
    (folder / "f.ts").write_text("export const a = 1;" * 50)
    (folder / "g.ts").write_bytes((b"\x47" + bytes(187)) * 4)
    for name in ("notes.txt", "Thumbs.db", "._a.png", "empty"):
        (folder / name).write_bytes(b"" if name == "empty" else b"x")
    (folder / "up").symlink_to(tmp_path / "in")
    tally = Tally(folder)
    found = [name.removeprefix(f"{folder}/") for name in list_inputs([str(folder)], tally=tally)]
    assert found == ["a.tiff", "b", "c.mp4", "d", "e.jpg", "g.ts"]
    assert [is_video(str(folder / name)) for name in found] == [False, False, True, True, True, True]
    assert {reason.reason: reason.n for reason in tally.list_left_out()} == {
        "hidden files and files of the system": 2, "files that are not in a supported picture format (.txt)": 1, "empty files": 1, "files that are not videos in spite of their suffix (.ts)": 1,
        "links to a folder that is already read or that contains the link": 1,
    }  # fmt: skip
    assert tally.describe()[0] == "12 files seen, 6 used, 6 left out."


def refuse(*given, **options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["a.png", "a.mp4", "folder"])
def test_what_may_not_be_read_is_told_so_and_not_called_damaged(tmp_path, monkeypatch, name):
    """Whoever runs the tests may be root, who may read everything."""
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        monkeypatch.setattr("dlfer.data.files.os.listdir", refuse)
    else:
        path.write_bytes(b"x")
    monkeypatch.setattr(media, "open_undecoded", refuse)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    [found] = open_inputs(list_inputs([str(path)]))
    assert isinstance(found, UnreadableInput)
    assert found.error == f"{path}: cannot be read; its permissions forbid it."
