"""Videos give frames with their own times, square pixels, and a report of what is missing."""

import struct

import numpy as np
import pytest

from dlfer.errors import DataError
from dlfer.predict import video
from dlfer.predict.draw import VideoWriter
from dlfer.predict.media import Frame, open_inputs
from dlfer.predict.video import is_video, read_video
from tests.unit.conftest import write_video


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


def set_pixel_aspect(content, width, height, *, is_turned=False):
    """Return an MP4 of OpenCV with a box that tells the shape of a pixel, and a track that players turn by 90 degrees if asked to."""
    out = bytearray(content)
    entry = content.index(b"stsd") + 12
    end = entry + struct.unpack_from(">I", out, entry)[0]
    boxes = [content.index(kind) - 4 for kind in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd")]
    assert boxes[0] > content.index(b"mdat")  # the places of the frames remain
    for place in (*boxes, entry):
        struct.pack_into(">I", out, place, struct.unpack_from(">I", out, place)[0] + 16)
    if is_turned:
        struct.pack_into(">9i", out, content.index(b"tkhd") + 44, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    out[end:end] = struct.pack(">I4sII", 16, b"pasp", width, height)
    return bytes(out)


@pytest.mark.parametrize(
    ("pixel", "is_turned", "shape"),
    [
        ((3, 2), False, (48, 96)),
        ((1, 2), False, (96, 64)),
        ((3, 2), True, (96, 48)),
        ((1, 1), True, (64, 48)),
        ((1000, 1), False, (48, 64)),  # a wrong header
    ],
)
def test_pixels_that_are_not_square_become_square(tmp_path, pixel, is_turned, shape):
    """As camcorders and discs store videos: a network would see squeezed faces."""
    path = tmp_path / "a.mp4"
    write_video(path)
    path.write_bytes(set_pixel_aspect(path.read_bytes(), *pixel, is_turned=is_turned))
    frames = list(open_inputs([str(path)]))
    assert len(frames) == 6
    assert {frame.image.shape for frame in frames} == {(*shape, 3)}
    assert int(frames[5].image[20, 20, 0]) == pytest.approx(150, abs=8)


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
    monkeypatch.setattr(video.time, "monotonic", lambda: next(ticks) / 10)
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


def test_a_video_with_a_short_side_is_refused(tmp_path):
    import cv2

    path = str(tmp_path / "small.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (16, 6))
    writer.write(np.zeros((6, 16, 3), np.uint8))
    writer.release()
    with pytest.raises(DataError, match=r"small.avi: found 16 x 6 pixels, expected at least 8 on each side"):
        list(read_video(path))
