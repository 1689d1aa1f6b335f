"""Names lead to files; what is damaged takes its place; decoding runs ahead, but not far; videos keep their times."""

import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dlfer.data.files import Tally
from dlfer.errors import DataError
from dlfer.predict import media
from dlfer.predict.draw import VideoWriter
from dlfer.predict.media import BadInput, Frame, ReadAhead, is_video, list_inputs, open_inputs, read_video
from tests.unit.conftest import make_stdin


def write_picture(path, value=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((12, 16, 3), value, np.uint8)).save(path)
    return str(path)


def write_video(path, num_frames=6, rate=5.0):
    pytest.importorskip("cv2")
    writer = VideoWriter(path, rate=rate)
    for index in range(num_frames):
        frame = np.zeros((48, 64, 3), np.uint8)
        frame[..., 0] = 30 * index  # red
        writer.write(frame)
    writer.close()
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
    assert [type(item) for item in bad] == [BadInput, BadInput]
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
    assert [type(item) for item in found] == [BadInput]
    assert problem in found[0].error


def test_what_stands_in_no_folder_is_named_whole():
    tally = Tally()
    tally.leave_out("not read", "/dev/zero")
    assert tally.list_left_out()[0].first == ["/dev/zero"]


def test_what_cannot_be_read_stops_nothing(tmp_path):
    good = write_picture(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("no picture")
    names = [str(tmp_path / "bad.png"), good, str(tmp_path / "absent.mp4"), good, BadInput("x", "x: why")]
    kinds = [type(item) for item in open_inputs(names)]
    assert kinds == [BadInput, Frame, BadInput, Frame, BadInput]


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


def test_a_video_frame_by_frame_with_its_times(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    frames = list(open_inputs([path]))
    assert [frame.index for frame in frames] == list(range(6))
    assert [frame.seconds for frame in frames] == pytest.approx([index / 5 for index in range(6)], abs=1e-3)
    assert [int(frame.image[20, 30, 0]) for frame in frames] == pytest.approx([30 * i for i in range(6)], abs=12)
    assert max(int(frame.image[20, 30, 2]) for frame in frames) < 30  # RGB, not BGR
    assert frames[0].video.num_frames == 6
    assert frames[0].video.rate == pytest.approx(5)
    assert [frame.index for frame in open_inputs([path], every=4)] == [0, 4]
    assert [frame.index for frame in open_inputs([path], seconds=0.5)] == [0, 1, 2]


def test_videos_that_are_none(tmp_path):
    pytest.importorskip("cv2")
    (tmp_path / "a.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    for name, problem in (
        (tmp_path / "a.mp4", "cannot be opened|no frame"),
        (tmp_path / "empty.mp4", "the file is empty"),
        (tmp_path / "absent.avi", "no such file"),
        ("http://127.0.0.1:9/a.mp4", "an address"),
        ("camera:x", "number of a camera"),
    ):
        with pytest.raises(DataError, match=problem):
            list(read_video(str(name)))
    writer = VideoWriter(tmp_path / "b.mp4", rate=5)
    writer.write(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(DataError, match="expected"):
        writer.write(np.zeros((48, 66, 3), np.uint8))
    writer.close()


class FakeCamera:
    """Gives frames for ever; the index is their blue."""

    released = 0

    def __init__(self, source) -> None:
        self.source, self.index = source, -1

    def isOpened(self):
        return self.source == 0

    def get(self, what):
        return 0.0

    def grab(self):
        self.index += 1
        return True

    def retrieve(self):
        return self.index != 1, np.full((48, 64, 3), (self.index % 256, 0, 0), np.uint8)

    def release(self):
        FakeCamera.released += 1


def test_a_camera_goes_the_way_of_videos(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    monkeypatch.setattr(cv2, "VideoCapture", FakeCamera)
    ticks = iter(range(1000))
    monkeypatch.setattr(media.time, "monotonic", lambda: next(ticks) / 10)
    FakeCamera.released = 0
    frames = list(read_video("camera:0", seconds=0.5))
    assert [index for _, index, _, _ in frames] == [0, 2, 3, 4]  # the second could not be fetched
    assert [round(seconds, 3) for _, _, seconds, _ in frames] == [0.1, 0.3, 0.4, 0.5]
    assert frames[-1][3][0, 0].tolist() == [0, 0, 4]
    assert frames[0][0].is_live
    assert frames[0][0].num_frames is None
    assert FakeCamera.released == 1
    with pytest.raises(DataError, match="no such camera"):
        list(read_video("camera:1"))


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


def write_noisy_video(path, code):
    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 10.0, (160, 120))
    rng = np.random.default_rng(0)
    for index in range(60):
        frame = np.full((120, 160, 3), 4 * index, np.uint8)
        frame[:60] = rng.integers(0, 256, (60, 160, 3))
        writer.write(frame)
    writer.release()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "code"),
    [
        (".ts", "MPG2"),
        (".mts", "MPG2"),
        (".M2TS", "MPG2"),
        (".3gp", "mp4v"),
        (".flv", "FLV1"),
        (".MOV", "mp4v"),
        (".m4v", "mp4v"),
        (".wmv", "WMV2"),
        (".webm", "VP80"),
        (".mpg", "MPG1"),
        (".mkv", "mp4v"),
        (".avi", "MJPG"),
    ],
)
def test_videos_of_many_containers_are_read_by_suffix_and_by_content(tmp_path, suffix, code):
    cv2 = pytest.importorskip("cv2")
    named = tmp_path / f"a{suffix}"
    writer = cv2.VideoWriter(str(named), cv2.VideoWriter_fourcc(*code), 25.0, (64, 48))
    for index in range(10):
        writer.write(np.full((48, 64, 3), 20 * index, np.uint8))
    writer.release()
    bare = tmp_path / "bare"
    bare.write_bytes(named.read_bytes())
    assert is_video(str(named))
    assert is_video(str(bare))
    for path in (named, bare):
        frames = list(open_inputs([str(path)]))
        assert [type(frame) for frame in frames] == [Frame] * 10
        assert [frame.image[20, 20, 0] for frame in frames] == pytest.approx(range(0, 200, 20), abs=8)


@pytest.mark.parametrize(("name", "code"), [("a.avi", "MJPG"), ("a.avi", "XVID"), ("a.mkv", "mp4v"), ("a.mp4", "mp4v")])
def test_damaged_videos_are_read_behind_the_hole_and_reported(tmp_path, name, code):
    data = bytearray(write_noisy_video(tmp_path / name, code))
    assert [type(item) for item in open_inputs([str(tmp_path / name)])] == [Frame] * 60
    begin, length = len(data) * 4 // 10, len(data) // 10
    data[begin : begin + length] = bytes(length)
    (tmp_path / name).write_bytes(data)
    *frames, last = open_inputs([str(tmp_path / name)])
    assert len(frames) > 40
    assert frames[-1].image[100, 80, 0] > 215
    indices = [frame.index for frame in frames]
    assert indices == sorted(set(indices))
    assert f"{len(frames)} of 60 frames could be read" in last.error


@pytest.mark.parametrize(("name", "code"), [("a.avi", "MJPG"), ("a.mkv", "mp4v")])
def test_a_video_that_is_cut_short_is_reported_with_its_frames(tmp_path, name, code):
    data = write_noisy_video(tmp_path / name, code)
    (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
    *frames, last = open_inputs([str(tmp_path / name)])
    assert 20 < len(frames) < 45
    assert f"{len(frames)} of 60 frames could be read" in last.error
    assert [type(item) for item in open_inputs([str(tmp_path / name)], seconds=1.0)] == [Frame] * 11


def test_a_video_trimmed_by_its_edit_list_is_whole(tmp_path):
    """As phones and `ffmpeg -c copy` trim: the frames that are not shown stay in the file."""
    data = bytearray(write_noisy_video(tmp_path / "a.mp4", "mp4v"))
    edit, movie, track = (data.find(kind) for kind in (b"elst", b"mvhd", b"mdhd"))
    [movie_scale], [track_scale] = (struct.unpack_from(">I", data, place + 16) for place in (movie, track))
    struct.pack_into(">Ii", data, edit + 12, movie_scale * 40 // 10, track_scale * 20 // 10)
    (tmp_path / "a.mp4").write_bytes(data)
    frames = list(open_inputs([str(tmp_path / "a.mp4")]))
    assert [type(item) for item in frames] == [Frame] * len(frames)
    assert 40 <= len(frames) <= 41
    # Where such a file is cut short, frames are missing all the same.
    begin = len(data) * 6 // 10
    (tmp_path / "a.mp4").write_bytes(data[:begin] + bytes(len(data) // 5) + data[begin + len(data) // 5 :])
    *_, last = open_inputs([str(tmp_path / "a.mp4")])
    assert "of 40 frames could be read" in last.error


def test_frames_that_an_avi_leaves_empty_are_not_missing(tmp_path):
    """Recorders write them where a frame came too late; the frame before is shown again."""
    data = write_noisy_video(tmp_path / "a.avi", "MJPG")
    begin = data.find(b"movi") - 8
    [size] = struct.unpack_from("<I", data, begin + 4)
    place, movie, index, number = begin + 12, b"", b"", 0
    while place < begin + 8 + size:
        kind, length = struct.unpack_from("<4sI", data, place)
        content = data[place + 8 : place + 8 + length]
        if kind == b"00dc":
            content = b"" if number in (10, 11, 20) else content
            number += 1
            index += struct.pack("<4sIII", kind, 0x10, 4 + len(movie), len(content))
        movie += struct.pack("<4sI", kind, len(content)) + content + bytes(len(content) % 2)
        place += 8 + length + length % 2
    body = data[12:begin] + struct.pack("<4sI4s", b"LIST", 4 + len(movie), b"movi") + movie
    body += struct.pack("<4sI", b"idx1", len(index)) + index
    (tmp_path / "a.avi").write_bytes(struct.pack("<4sI4s", b"RIFF", 4 + len(body), b"AVI ") + body)
    frames = list(open_inputs([str(tmp_path / "a.avi")]))
    assert [frame.index for frame in frames] == [index for index in range(60) if index not in (10, 11, 20)]
    assert frames[-1].seconds == pytest.approx(5.9)


def test_marked_videos_keep_the_times_of_frames_at_varying_rates(tmp_path):
    pytest.importorskip("cv2")
    writer = VideoWriter(tmp_path / "a.mp4", rate=10)
    for value, seconds in ((40, 0.5), (80, 0.6), (90, 0.62), (120, 1.5), (200, 1.6)):
        writer.write(np.full((48, 64, 3), value, np.uint8), seconds)
    writer.close()
    frames = [int(frame.image[20, 20, 0]) for frame in open_inputs([str(tmp_path / "a.mp4")])]
    assert frames == pytest.approx([40, *[80] * 9, 120, 200], abs=6)


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
    monkeypatch.setattr(media.os, "access", lambda path, mode: False)
    [found] = open_inputs(list_inputs([str(path)]))
    assert isinstance(found, BadInput)
    assert found.error == f"{path}: cannot be read; its permissions forbid it."
