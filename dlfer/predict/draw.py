"""Drawing of predicted faces on pictures and videos, which are written to files or shown in a window."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from dlfer.errors import DataError, EnvironmentProblem
from dlfer.predict.media import Frame, UnreadableInput
from dlfer.predict.predictor import FacePrediction, FramePrediction
from dlfer.predict.video import is_video, load_opencv
from dlfer.report.figures import find_font
from dlfer.runs.files import choose_name, fold_name, replace_when_done
from dlfer.runs.text import to_utf8

INK, PAPER, UNSURE = (255, 255, 255), (0, 92, 168), (96, 96, 96)
"""RGB colours of labels: white on blue, contrast 6.9 to 1; white on grey, 6.2 to 1, if the classifier abstains."""

_MAX_OF_JPEG = 65_500
"""Maximum side of a JPEG in pixels."""

MIN_SIDE = 240
"""Shorter side in pixels to which smaller pictures are enlarged, so that labels are readable."""

_MAX_SIDE = 8192
"""Maximum longer side in pixels of an enlarged picture."""


def draw_faces(image: np.ndarray, faces: list[FacePrediction], *, enlarge: bool = True) -> np.ndarray:
    """Return a copy of a picture with its faces marked, uint8 [H, W, 3], possibly enlarged.

    Labels for which there is no font are drawn as numbers, see `number_labels`.

    Args:
        image: uint8 [H, W, 3].
        faces: the predicted faces in it.
        enlarge: whether small pictures, such as face crops, are enlarged to at least 240 pixels on the shorter side.
    """
    scale = max(1, min(-(-MIN_SIDE // min(image.shape[:2])), _MAX_SIDE // max(image.shape[:2]))) if enlarge else 1
    picture = Image.fromarray(image)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for face in faces:
        colour = UNSURE if face.abstained else PAPER
        number = "" if face.track is None else f"#{face.track} "
        label = number_labels(face.probabilities).get(face.label, face.label)
        text = f"{number}{label} {face.confidence:.0%}"
        font = _load_font(_find_font(label), max(12, min(picture.size) // 28))
        x, y = 0.0, 0.0
        if face.box is not None:
            x0, y0, x1, y1 = (value * scale for value in face.box)
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, min(picture.size) // 250))
            x, y = x0, y0
        _write_text(pen, text, (x, y), font=font, colour=colour, size=picture.size)
    return np.array(picture)


_MAX_REPEATED = 100_000
"""Number of frames, about an hour; a longer gap is taken for an error in a video's timestamps."""


class VideoWriter:
    """A writer of an mp4 video with `rate` frames per second; the file appears at its path when it is closed.

    Attributes:
        num_left_out: number of frames left out because they came before the previous frame was over.
        num_gaps: number of implausibly long gaps in the timestamps, which were skipped.
    """

    def __init__(self, path: Path, *, rate: float) -> None:
        self.path = path
        self._rate = rate
        self._writer: Any = None
        self._shape: tuple[int, ...] | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._begin = 0.0
        self._num_written = self.num_left_out = self.num_gaps = 0
        self._last: np.ndarray | None = None

    def write(self, frame: np.ndarray, seconds: float | None = None) -> None:
        """Add a frame, uint8 [H, W, 3] RGB, of the same size as the first one.

        If its time is given in `seconds`, it is shown at that time relative to the first frame: the previous frame is
        repeated until then, and a frame that comes before the previous one is over is left out and counted. A gap of
        more than `_MAX_REPEATED` frames is skipped.

        Raises:
            DataError: the frame has another size, or the video cannot be written.
        """
        cv2 = load_opencv()
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = _make_place(self.path)
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._draft), cv2.VideoWriter_fourcc(*"mp4v"), self._rate, size)
            self._shape = frame.shape
            if not self._writer.isOpened():
                self.discard()
                raise DataError(f"{self.path}: OpenCV cannot write a video of {size[0]} x {size[1]} pixels there.")
        if frame.shape != self._shape:
            raise DataError(f"{self.path}: found a frame of shape {frame.shape}, expected {self._shape} as the first.")
        pixels = np.ascontiguousarray(frame[..., ::-1])
        if seconds is not None:
            self._begin = seconds if self._num_written == 0 else self._begin
            place = round((seconds - self._begin) * self._rate)
            if place < self._num_written and self._num_written:
                self.num_left_out += 1
                return
            num_repeated = place - self._num_written
            if num_repeated > _MAX_REPEATED:
                # All later timestamps have the same offset.
                self._begin, num_repeated = self._begin + num_repeated / self._rate, 0
                self.num_gaps += 1
            for _ in range(num_repeated):
                self._write_one(self._last)
        self._write_one(pixels)
        self._last = pixels

    def _write_one(self, pixels: np.ndarray) -> None:
        self._writer.write(pixels)
        self._num_written += 1

    def close(self) -> None:
        """Finish the video; without any frame no file is written.

        Raises:
            DataError: the video cannot be read again, e.g. because the disk is full, which OpenCV does not report.
            OSError: the file cannot be moved to its path.
        """
        if self._writer is None:
            return
        self._writer.release()
        try:
            capture = load_opencv().VideoCapture(str(self._draft))
            is_whole = capture.isOpened() and capture.grab()
            capture.release()
            if not is_whole:
                raise DataError(f"{self.path}: the video could not be written; is the disk full?")
            with replace_when_done(self.path) as temporary:
                shutil.move(self._draft, temporary)
        finally:
            self.discard()

    def discard(self) -> None:
        """Abandon a video that is not closed, and delete its temporary folder."""
        if self._writer is not None:
            self._writer.release()
        if self._folder is not None:
            self._folder.cleanup()
        self._writer = self._folder = None

    @property
    def _draft(self) -> Path:
        return Path(self._folder.name) / "video.mp4"


def _make_place(path: Path) -> tempfile.TemporaryDirectory:
    """Create a temporary folder beside a file, or elsewhere if the path is not UTF-8, which OpenCV does not accept."""
    is_plain = to_utf8(str(path.parent)) == str(path.parent)
    return tempfile.TemporaryDirectory(
        prefix=".dlfer-", dir=path.parent if is_plain else None, ignore_cleanup_errors=True
    )


class AnnotatedWriter:
    """A writer of marked pictures (.jpg) and videos (.mp4) named after the inputs, with -2, -3 ... for equal names.

    Args:
        folder: the output folder, which is created if it does not exist.
        force: whether existing files are replaced.

    Attributes:
        notes: a sentence for each video with frames or gaps left out, and for each shrunk picture.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.notes: list[str] = []
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._force = force
        self._taken: set[str] = set()
        self._video: object = None
        self._writer: VideoWriter | None = None

    def add(self, prediction: FramePrediction, *, every: int = 1) -> None:
        """Write a picture, or the next frame of a video of which every `every`-th frame is predicted.

        After an error, the remaining frames of a video are ignored.

        Raises:
            DataError, OSError, ValueError: it cannot be drawn, or an existing file would be replaced.
        """
        frame = prediction.frame
        if frame.video is None:
            self.close()
            self._save(draw_faces(frame.image, prediction.faces), self._choose_path(frame.name, ".jpg"))
            return
        if frame.video is not self._video:
            self.close()
            self._video = frame.video
            self._writer = VideoWriter(self._choose_path(frame.name, ".mp4"), rate=frame.video.rate / every)
        if self._writer is None:
            return
        try:
            self._writer.write(draw_faces(frame.image, prediction.faces, enlarge=False), frame.seconds)
        except BaseException:
            self._writer.discard()
            self._writer = None
            raise

    def close(self) -> None:
        """Finish the video that is being written, if there is one."""
        writer, self._writer, self._video = self._writer, None, None
        if writer is None:
            return
        writer.close()
        if writer.num_left_out:
            self.notes.append(
                f"{writer.path}: {writer.num_left_out:,} frames are closer together than one frame of the written "
                "video and are left out of it; the table has them, and the other frames keep their times."
            )
        if writer.num_gaps:
            self.notes.append(
                f"{writer.path}: the times of the frames jump by more than {_MAX_REPEATED:,} frames at {writer.num_gaps:,} "
                f"place{'s' * (writer.num_gaps > 1)}, and the written video goes on there at once; the table has the times "
                "of the file."
            )

    def _choose_path(self, name: str, suffix: str) -> Path:
        path = self.folder / choose_output_name(name, suffix, self._taken, folder=self.folder)
        if not self._force and os.path.lexists(path):
            raise DataError(f"{path}: exists already and is not replaced")
        return path

    def _save(self, image: np.ndarray, path: Path) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder no longer exists", str(self.folder))
        with replace_when_done(path, durable=False) as temporary:
            picture = Image.fromarray(image)
            if max(picture.size) > _MAX_OF_JPEG:
                self.notes.append(
                    f"{path}: shrunk to {_MAX_OF_JPEG:,} pixels, which is the most that a JPEG holds a side."
                )
                picture.thumbnail((_MAX_OF_JPEG, _MAX_OF_JPEG))
            picture.save(temporary, "JPEG", quality=92)


def choose_output_name(name: str, suffix: str, taken: set[str], *, folder: Path) -> str:
    """Return a file name for an input that is not in `taken`, and add it there in folded form."""
    stem = Path(name.replace(":", "-")).stem
    chosen = choose_name(stem, suffix, taken, folder=folder) + suffix
    taken.add(fold_name(chosen))
    return chosen


def list_output_paths(names: Iterable[str], folder: Path) -> list[Path]:
    """Return the paths that may be written for inputs; fewer are written if some inputs cannot be read."""
    taken: set[str] = set()
    return [
        folder / choose_output_name(name, ".mp4" if is_video(name) else ".jpg", taken, folder=folder) for name in names
    ]


def number_labels(labels: Iterable[str]) -> dict[str, str]:
    """Return the numbers of the labels that cannot be drawn, from [1] in the order of all labels, e.g. {"快乐": "[4]"}."""
    return {label: f"[{number}]" for number, label in enumerate(labels, start=1) if _find_font(label) is None}


@cache
def _find_font(label: str) -> str | None:
    """Return the file of a font for a label; "" for Pillow's own, which is for ASCII alone; None if there is none."""
    if label.isascii():
        return ""
    # Arabic, Hebrew, Indic and other scripts are illegible unless Raqm, an optional part of Pillow, lays them out.
    is_complex = any(
        unicodedata.bidirectional(one) in ("R", "AL") or unicodedata.category(one)[0] == "M" for one in label
    )
    if is_complex and not features.check("raqm"):
        return None
    try:
        return find_font({*label, *"#0123456789%"})
    except ImportError:  # matplotlib, which knows the installed fonts, is not there (make install-predict)
        return None


@cache
def _load_font(file: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def _write_text(
    pen: ImageDraw.ImageDraw, text: str, place: tuple[float, float], *, font, colour, size: tuple[int, int]
) -> None:
    """Draw a text on a coloured background above a position, moved down or left if it would leave the picture."""
    right, bottom = font.getbbox(text)[2:]
    width, height = right + 6, bottom + 6
    x = max(0.0, min(place[0], size[0] - width))
    y = place[1] - height if place[1] >= height else place[1]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3, y + 3), text, fill=INK, font=font)


TITLE = "dlfer predict: q or Esc ends"

_WINDOW_SIDE = 960
"""Maximum longer side in pixels of a window when a picture is first shown; larger pictures are scaled down to it."""

_POLL = 0.05
"""Seconds between checks of a waiting window for whether it was closed."""


def check_window() -> None:
    """Check that a window can be opened here.

    Raises:
        EnvironmentProblem: OpenCV is not installed or was built without windows, or there is no display.
    """
    cv2 = load_opencv()
    gui = re.search(r"^ *GUI: *(\S+)", cv2.getBuildInformation(), flags=re.MULTILINE)
    if gui is not None and gui.group(1) == "NONE":
        raise EnvironmentProblem(
            "--show: this build of OpenCV cannot open windows. Run pip uninstall opencv-python-headless, then pip "
            "install 'opencv-python<5'; or write the marked video with --draw DIR instead of --show."
        )
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise EnvironmentProblem(
            "--show: there is no display (DISPLAY is not set). Run it in a desktop session or through ssh -X; or "
            "write the marked video with --draw DIR instead of --show."
        )
    # Qt ends the process if the display cannot be reached, so try it in another process.
    code = "import cv2; cv2.namedWindow('dlfer'); cv2.waitKey(1); cv2.destroyAllWindows()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[0][:200]
        raise EnvironmentProblem(
            f"--show: OpenCV cannot open a window here ({reason}). Check that DISPLAY names a reachable display; or "
            "write the marked video with --draw DIR instead of --show."
        )


class Window:
    """A window that shows pictures until a key is pressed, videos at most at their own speed, and cameras live."""

    def __init__(self) -> None:
        self._cv2 = cv2 = load_opencv()
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        self._size: tuple[int, ...] | None = None
        self._video: object = None
        self._begin = 0.0

    def show(self, prediction: FramePrediction) -> bool:
        """Show a picture or a frame; return whether to continue: False after q or Esc, or if the window was closed."""
        frame = prediction.frame
        marked = draw_faces(frame.image, prediction.faces, enlarge=frame.video is None)
        height, width = marked.shape[:2]
        if (width, height) != self._size:
            self._size = width, height
            scale = min(1.0, _WINDOW_SIDE / max(width, height))
            self._cv2.resizeWindow(TITLE, round(width * scale), round(height * scale))
        self._cv2.imshow(TITLE, np.ascontiguousarray(marked[..., ::-1]))
        return self._wait(self._find_end(frame), until_key=frame.video is None)

    def close(self) -> None:
        """Close the window."""
        self._cv2.destroyAllWindows()

    def _find_end(self, frame: Frame) -> float:
        """Return the monotonic time until which a frame is shown; after a delay, later frames are not shown faster."""
        now = time.monotonic()
        if frame.video is None or frame.video.is_live:
            return now
        if frame.video is not self._video:
            self._video, self._begin = frame.video, now - (frame.seconds or 0.0)
        self._begin = max(self._begin, now - (frame.seconds or 0.0))
        return self._begin + (frame.seconds or 0.0)

    def _wait(self, end: float, *, until_key: bool) -> bool:
        while True:
            rest = _POLL if until_key else min(_POLL, end - time.monotonic())
            key = self._cv2.waitKey(max(1, round(1000 * rest)))
            is_closed = self._cv2.getWindowProperty(TITLE, self._cv2.WND_PROP_VISIBLE) < 1
            if is_closed or (key != -1 and key & 0xFF in (ord("q"), 27)):
                return False
            if key != -1 if until_key else time.monotonic() >= end:
                return True


def show_all(results: Iterator[FramePrediction | UnreadableInput]) -> Iterator[FramePrediction | UnreadableInput]:
    """Yield each result and then show it, until the window is closed."""
    window = Window()
    try:
        for result in results:
            yield result
            if isinstance(result, FramePrediction) and not window.show(result):
                return
    finally:
        window.close()
