"""Reading of videos and cameras as frames of pixels."""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dlfer.data.files import VIDEO_SUFFIXES, find_kind
from dlfer.data.images import check_side
from dlfer.errors import DataError, EnvironmentProblem
from dlfer.runs.text import to_utf8

CAMERA = "camera:"
FORBIDDEN = "cannot be read; its permissions forbid it."
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
DEFAULT_RATE = 25.0
"""Frames per second assumed for a video or a camera that does not report a plausible rate."""


@dataclass(frozen=True)
class Video:
    """The properties of a video or camera that are known before its first frame.

    Attributes:
        rate: frames per second.
        num_frames: number of frames according to the header; None for a camera, or if the header does not say.
        is_live: whether it is a camera.
        pixel_aspect: width of a pixel divided by its height in OpenCV's frames; `read_video` yields square pixels.
    """

    rate: float
    num_frames: int | None
    is_live: bool
    pixel_aspect: float = 1.0


def is_video(name: str) -> bool:
    """Return whether a name is a camera, or a video by its first bytes, or by its suffix if those are inconclusive."""
    if name.startswith(CAMERA):
        return True
    kind = find_kind(Path(name))
    return name.lower().endswith(VIDEO_SUFFIXES) if kind in (None, "empty") else kind == "video"


_MAX_FAILURES = 1000
"""Number of consecutive failures after which a video counts as ended, whatever its header says."""


def read_video(
    name: str, *, every: int = 1, seconds: float | None = None
) -> Iterator[tuple[Video, int, float, np.ndarray]]:
    """Yield (video, frame index, time in seconds, uint8 [H, W, 3] RGB), one upright frame with square pixels at a time.

    Frames after a damaged section are read. Indices skip the frames lost there if the timestamps show their number.

    Args:
        name: path of a video, or "camera:0" for the first camera.
        every: yield frames 0, every, 2 * every ...; the others are not decoded into pixels.
        seconds: stop after this time; None: at the end of the video; a camera has none.

    Raises:
        DataError: it cannot be opened, has no readable frame or frames with a side below 8 pixels; or, after the last frame, if frames are missing.
        EnvironmentProblem: OpenCV is not installed.
    """
    is_live = name.startswith(CAMERA)
    capture = _open_capture(name, is_live=is_live)
    try:
        video = _describe_video(capture, name, is_live=is_live)
        count = _FrameCount(video, name)
        begin = time.monotonic()
        while _grab(capture, count):
            count.add(_get_time(capture, count.index + 1, video.rate))
            now = time.monotonic() - begin if is_live else count.time
            if seconds is not None and now > seconds:
                return
            if count.index % every:
                continue
            found, frame = capture.retrieve()
            if found:
                frame = _make_square(frame, video.pixel_aspect)
                check_side(frame.shape[1], frame.shape[0], name)
                yield video, count.index, now, frame[..., ::-1].copy()
            else:
                count.num_read -= 1
        if not count.num_read:
            raise DataError(
                f"{name}: no frame can be read; the file is not a video, it is damaged, or its codec is unknown."
            )
        if count.is_short():
            raise DataError(
                f"{name}: {count.num_read:,} of {video.num_frames:,} frames could be read, up to second {count.time:.1f}; "
                "the video is cut short or damaged. The results contain the frames read; get the video again for the others."
            )
    finally:
        capture.release()


class _FrameCount:
    """Counts of the frames read from a video, and of the failures since the last frame.

    Attributes:
        video: the video.
        kind: "mp4" (or MOV), "avi" or "".
        index: of the last frame, from 0; frames known to be lost before it count, and frames dropped in an AVI.
        time: of the last frame, in seconds.
        num_read: number of frames read.
        num_failures: number of consecutive failures.
    """

    def __init__(self, video: Video, name: str) -> None:
        self.video = video
        self.kind = "" if video.is_live else find_container(name)
        self._num_empty = count_empty_frames(name) if self.kind == "avi" else 0
        self._num_regular = 0
        self.index, self.time, self.num_read, self.num_failures = -1, 0.0, 0, 0

    def add(self, moment: float) -> None:
        """Count a frame with the timestamp `moment` in seconds."""
        steps = (moment - self.time) * self.video.rate
        self._num_regular += 0.9 < steps < 1.1
        # An AVI has a constant frame rate; in other containers a gap may be a pause.
        may_miss = self.num_failures > 0 or self.kind == "avi"
        is_behind_hole = may_miss and self.index >= 0 and steps > 1.5
        self.index += round(steps) if is_behind_hole else 1
        self.time, self.num_failures = moment, 0
        self.num_read += 1

    def is_short(self) -> bool:
        """Return whether frames are missing. Only MP4, MOV and AVI declare their number; others declare a duration."""
        expected = self.video.num_frames
        if expected is None or self.num_read >= expected - self._num_empty:
            return False
        if self.kind:
            return True
        is_regular = self._num_regular > 0.9 * (self.num_read - 1)
        return is_regular and self.num_read < expected - max(2, expected // 50)


def _grab(capture: Any, count: _FrameCount) -> bool:
    """Advance to the next frame, or return False; failures before the declared end of the video are skipped."""
    expected = count.video.num_frames
    while not capture.grab():
        count.num_failures += 1
        if expected is None or count.index + 1 >= expected or count.num_failures > _MAX_FAILURES:
            return False
    return True


def load_opencv() -> Any:
    """Import and return the module cv2.

    Raises:
        EnvironmentProblem: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise EnvironmentProblem(
            f"videos and cameras need OpenCV ({error}): pip install 'opencv-python-headless<5'"
        ) from error
    return cv2


def _open_capture(name: str, *, is_live: bool) -> Any:
    cv2 = load_opencv()
    if is_live:
        number = name[len(CAMERA) :]
        if not (number.isdecimal() and len(number) < 10):
            raise DataError(f"{name}: expected the number of a camera, e.g. camera:0.")
        source: int | str = int(number)
    else:
        # OpenCV would also accept URLs and file name patterns; allow files only.
        if not check_name(name).is_file():
            raise DataError(f"{name}: there is no such file.")
        if not os.path.getsize(name):
            raise DataError(f"{name}: the file is empty.")
        if not os.access(name, os.R_OK):
            raise DataError(f"{name}: {FORBIDDEN}")
        source = str(Path(name).resolve())
    with _make_utf8_path(source) as source:
        capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        what = (
            "there is no such camera, or another program uses it"
            if is_live
            else "not a video, damaged, or of an unknown codec"
        )
        raise DataError(f"{name}: cannot be opened ({what}).")
    return capture


@contextlib.contextmanager
def _make_utf8_path(source: str | int) -> Iterator[str | int]:
    """Yield `source`, or a temporary link to it if its path is not UTF-8, which OpenCV does not accept."""
    if isinstance(source, int) or to_utf8(source) == source:
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"video{to_utf8(Path(source).suffix)}"
        link.symlink_to(source)
        yield str(link)


def _describe_video(capture: Any, name: str, *, is_live: bool) -> Video:
    cv2 = load_opencv()
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    rate = float(rate) if 0 < rate < 1000 else DEFAULT_RATE
    num_frames = int(count) if count > 0 and not is_live else None
    if num_frames is not None and find_container(name) == "mp4" and (shown := find_shown_seconds(name)) is not None:
        # Trimming without re-encoding leaves hidden frames in the file, so the edit list's duration limits the count.
        num_frames = min(num_frames, max(1, math.floor(shown * rate + 0.01)))
    return Video(rate, num_frames, is_live, _find_pixel_aspect(capture))


_MAX_ASPECT = 4.0
"""Maximum ratio of a pixel's sides that is not taken for an error; those of video standards are at most 2.4."""


def _find_pixel_aspect(capture: Any) -> float:
    """Return a pixel's width divided by its height in OpenCV's frames; 1 if the video states no plausible one."""
    cv2 = load_opencv()
    width, height = capture.get(cv2.CAP_PROP_SAR_NUM), capture.get(cv2.CAP_PROP_SAR_DEN)
    if not (width > 0 and height > 0 and 1 / _MAX_ASPECT <= width / height <= _MAX_ASPECT):
        return 1.0
    # The header describes the stored frames, and OpenCV rotates them.
    is_turned = capture.get(cv2.CAP_PROP_ORIENTATION_AUTO) and capture.get(cv2.CAP_PROP_ORIENTATION_META) % 180
    return height / width if is_turned else width / height


def _make_square(frame: np.ndarray, aspect: float) -> np.ndarray:
    """Return a frame resampled to square pixels by enlarging the axis that has fewer pixels per length."""
    if aspect == 1:
        return frame
    cv2 = load_opencv()
    height, width = frame.shape[:2]
    size = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
    return cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)


def find_container(name: str) -> str:
    """Return "mp4" (also for MOV) or "avi" according to a file's first bytes, else ""."""
    with open(name, "rb") as file:
        start = file.read(12)
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mp4"
    return "avi" if start[8:] == b"AVI " else ""


_MAX_OF_INDEX = 2**26
"""Maximum number of bytes of a video's index that are read; an hour has about a megabyte."""


def find_shown_seconds(name: str) -> float | None:
    """Return the seconds that the edit list of an MP4's first video track lasts; None if it is absent or invalid.

    Source: ISO/IEC 14496-12, 8.6.6 Edit List Box.
    """
    try:
        with open(name, "rb") as file:
            movie = _read_box(file, b"moov")
        [header] = _find_boxes(movie, b"mvhd")
        place = 20 if header[0] else 12
        [scale] = struct.unpack_from(">I", header, place)
        for track in _find_boxes(movie, b"trak"):
            handlers = [box[8:12] for media in _find_boxes(track, b"mdia") for box in _find_boxes(media, b"hdlr")]
            edits = [box for outer in _find_boxes(track, b"edts") for box in _find_boxes(outer, b"elst")]
            if b"vide" in handlers and edits:
                [number] = struct.unpack_from(">I", edits[0], 4)
                form = ">QqI" if edits[0][0] else ">IiI"
                entries = struct.iter_unpack(form, edits[0][8 : 8 + number * struct.calcsize(form)])
                # An entry with media time -1 is an empty edit, which shows nothing.
                total = sum(duration for duration, start, _ in entries if start >= 0)
                return total / scale if total and scale else None
    except (struct.error, ValueError, IndexError):
        return None
    return None


def _read_box(file: BinaryIO, kind: bytes) -> bytes:
    """Return the content of the first top-level box of a kind, at most `_MAX_OF_INDEX` bytes; b"" if there is none."""
    while len(head := file.read(8)) == 8:
        size, found = struct.unpack(">I4s", head)
        rest = size - 8 if size != 1 else struct.unpack(">Q", file.read(8))[0] - 16
        if found == kind:
            return file.read(min(rest, _MAX_OF_INDEX))
        if size == 0 or rest < 0:
            break
        file.seek(rest, os.SEEK_CUR)
    return b""


def _find_boxes(content: bytes, kind: bytes) -> list[bytes]:
    """Return the contents of the boxes of a kind that are direct children in the content of another box."""
    found, place = [], 0
    while place + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, place)
        if size < 8:
            break
        if name == kind:
            found.append(content[place + 8 : place + size])
        place += size
    return found


def count_empty_frames(name: str) -> int:
    """Return the number of empty frames in an AVI's index; each repeats the previous frame, so none is missing."""
    with open(name, "rb") as file:
        file.seek(12)
        while len(head := file.read(8)) == 8:
            kind, size = struct.unpack("<4sI", head)
            if kind == b"idx1":
                index = file.read(min(size, _MAX_OF_INDEX) // 16 * 16)
                entries = struct.iter_unpack("<4sIII", index[: len(index) // 16 * 16])
                return sum(chunk[2:] in (b"dc", b"db") and length == 0 for chunk, _, _, length in entries)
            file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def _get_time(capture: Any, index: int, rate: float) -> float:
    """Return the seconds of the grabbed frame: its timestamp if it has one (rates may vary), else index / rate."""
    stamp = capture.get(load_opencv().CAP_PROP_POS_MSEC) / 1000
    return stamp if stamp > 0 or index == 0 else index / rate


def check_name(name: str) -> Path:
    """Return a name as a path; raise DataError if it is empty or a URL."""
    if not name.strip():
        raise DataError(f"{name!r}: an empty name; expected a file, a folder, a glob or camera:0.")
    if _ADDRESS.match(name) and not os.path.lexists(name):
        raise DataError(f"{name}: found an address, expected a file. Download it, and give the file.")
    return Path(name)
