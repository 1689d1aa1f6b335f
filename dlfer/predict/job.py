"""The work of `dlfer predict`: inputs to a table, with pictures and videos in which the faces are marked."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.markup import escape

from dlfer.data.files import Tally
from dlfer.data.images import MAX_PIXELS
from dlfer.errors import DataError, DlferError, EnvironmentProblem, UserError
from dlfer.predict.engines import AUTO, Engine, choose_engine, load_engine
from dlfer.predict.media import CAMERA, NOT_READ, BadInput, Frame, is_video, list_inputs, load_opencv, open_inputs
from dlfer.predict.predictor import FacePrediction, FacePredictor, FramePrediction, describe_predictions, predict_inputs
from dlfer.predict.tables import Table, choose_form, open_table
from dlfer.runs.files import replace_when_done
from dlfer.runs.find import find_default_model
from dlfer.runs.outputs import check_outputs, check_writable, choose_name, fold_name
from dlfer.runs.text import escape_text, to_utf8
from dlfer.train.progress import ConsoleListener

INK, PAPER, UNSURE = (255, 255, 255), (0, 92, 168), (96, 96, 96)
"""White on blue, 6.9 to 1; white on grey, 6.2 to 1, where the classifier abstains."""

MIN_SIDE = 240
"""Pictures with a shorter side are enlarged to it, so that a label can be read."""

_MAX_SIDE = 8192
"""Pixels of the longer side to which such a picture is enlarged at most."""


def draw_faces(image: np.ndarray, faces: list[FacePrediction], *, enlarge: bool = True) -> np.ndarray:
    """Return uint8 [H, W, 3] of a picture with its faces marked.

    Args:
        image: uint8 [H, W, 3].
        faces: in it, as predicted.
        enlarge: small pictures, such as crops of faces, to 240 pixels on the shorter side.
    """
    scale = max(1, min(-(-MIN_SIDE // min(image.shape[:2])), _MAX_SIDE // max(image.shape[:2]))) if enlarge else 1
    picture = Image.fromarray(image)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    font = _load_font(max(12, min(picture.size) // 28))
    for face in faces:
        colour = UNSURE if face.abstained else PAPER
        number = "" if face.track is None else f"#{face.track} "
        text = f"{number}{face.label} {face.confidence:.0%}"
        x, y = 0.0, 0.0
        if face.box is not None:
            x0, y0, x1, y1 = (value * scale for value in face.box)
            pen.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, min(picture.size) // 250))
            x, y = x0, y0
        _write_text(pen, text, (x, y), font=font, colour=colour, size=picture.size)
    return np.array(picture)


_MOST_REPEATED = 100_000
"""Frames, about an hour: a longer gap is a fault in the times of a video."""


class VideoWriter:
    """An mp4 video of `rate` frames a second, written frame by frame; it has its name when it is closed.

    Attributes:
        num_left_out: frames that came before the one before them was over.
    """

    def __init__(self, path: Path, *, rate: float) -> None:
        self.path = path
        self._rate = rate
        self._writer: Any = None
        self._shape: tuple[int, ...] | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._begin = 0.0
        self._num_written = self.num_left_out = 0
        self._last: np.ndarray | None = None

    def write(self, frame: np.ndarray, seconds: float | None = None) -> None:
        """Add uint8 [H, W, 3] RGB; every frame has the size of the first.

        With a time in `seconds` the frame is shown at that time after the first: the one before it is repeated until
        then, and a frame that comes before the last one is over is left out and counted.

        Raises:
            DataError: another size, or the video cannot be written.
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
            for _ in range(min(place - self._num_written, _MOST_REPEATED)):
                self._write_one(self._last)
        self._write_one(pixels)
        self._last = pixels

    def _write_one(self, pixels: np.ndarray) -> None:
        self._writer.write(pixels)
        self._num_written += 1

    def close(self) -> None:
        """End the video; without a frame nothing was written.

        Raises:
            DataError: it cannot be read again, as when the disk became full: OpenCV does not tell.
            OSError: it cannot be given its name.
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
        """Leave nothing behind of a video that is not closed."""
        if self._writer is not None:
            self._writer.release()
        if self._folder is not None:
            self._folder.cleanup()
        self._writer = self._folder = None

    @property
    def _draft(self) -> Path:
        return Path(self._folder.name) / "video.mp4"


def _make_place(path: Path) -> tempfile.TemporaryDirectory:
    """Return a folder beside a file, or elsewhere if the path is not UTF-8, which OpenCV does not take."""
    is_plain = to_utf8(str(path.parent)) == str(path.parent)
    return tempfile.TemporaryDirectory(
        prefix=".dlfer-", dir=path.parent if is_plain else None, ignore_cleanup_errors=True
    )


class Sketches:
    """A folder of marked pictures (.jpg) and videos (.mp4), named after the inputs; -2, -3 ... where names meet.

    Args:
        folder: where they go.
        force: whether files that are there are replaced.

    Attributes:
        notes: a sentence for each video that could not take all frames.
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

        After an error the rest of a video is passed over.

        Raises:
            DataError, OSError, ValueError: it cannot be drawn, or a file that is there would be replaced.
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
        """End the video that is being written."""
        writer, self._writer, self._video = self._writer, None, None
        if writer is None:
            return
        writer.close()
        if writer.num_left_out:
            self.notes.append(
                f"{writer.path}: {writer.num_left_out:,} frames follow others by less than a frame of this video and are "
                "not in it; the table has them, and the others keep their times."
            )

    def _choose_path(self, name: str, suffix: str) -> Path:
        path = self.folder / choose_sketch(name, suffix, self._taken, folder=self.folder)
        if not self._force and os.path.lexists(path):
            raise DataError(f"{path}: is there already and is not replaced")
        return path

    def _save(self, image: np.ndarray, path: Path) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the folder is gone", str(self.folder))
        with replace_when_done(path, durable=False) as temporary:
            Image.fromarray(image).save(temporary, "JPEG", quality=92)


def choose_sketch(name: str, suffix: str, taken: set[str], *, folder: Path) -> str:
    """Return the name of a file for an input, and enter it among those that are taken."""
    stem = Path(name.replace(":", "-")).stem
    chosen = choose_name(stem, suffix, taken, folder=folder) + suffix
    taken.add(fold_name(chosen))
    return chosen


def list_sketches(names: Iterable[str], folder: Path) -> list[Path]:
    """Return all files that may be drawn of inputs; if some cannot be read, some of these are not."""
    taken: set[str] = set()
    return [folder / choose_sketch(name, ".mp4" if is_video(name) else ".jpg", taken, folder=folder) for name in names]


@cache
def _load_font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _write_text(
    pen: ImageDraw.ImageDraw, text: str, place: tuple[float, float], *, font, colour, size: tuple[int, int]
) -> None:
    """Write on a coloured ground above a place; below or left of it where the picture ends."""
    right, bottom = font.getbbox(text)[2:]
    width, height = right + 6, bottom + 6
    x = max(0.0, min(place[0], size[0] - width))
    y = place[1] - height if place[1] >= height else place[1]
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 3, y + 3), text, fill=INK, font=font)


TITLE = "dlfer predict: q or Esc ends"

_WINDOW_SIDE = 960
"""Pixels of the longer side of a window at first; what is larger is shrunk to it."""

_POLL = 0.05
"""Seconds after which a window that waits looks whether it was closed."""


def check_window() -> None:
    """Check that a window can be opened here.

    Raises:
        EnvironmentProblem: OpenCV is not installed or was built without windows, or there is no display.
    """
    cv2 = load_opencv()
    gui = re.search(r"^ *GUI: *(\S+)", cv2.getBuildInformation(), flags=re.MULTILINE)
    if gui is not None and gui.group(1) == "NONE":
        raise EnvironmentProblem(
            "--show: this build of OpenCV has no windows. pip uninstall opencv-python-headless, then pip install "
            "'opencv-python<5'; or leave --show out and write the marked video by --draw DIR."
        )
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise EnvironmentProblem(
            "--show: there is no display (DISPLAY is not set). Run it in a session with a desktop, or through ssh -X; or "
            "leave --show out and write the marked video by --draw DIR."
        )
    # Where the display cannot be reached, Qt ends the process: it is tried in another one.
    code = "import cv2; cv2.namedWindow('dlfer'); cv2.waitKey(1); cv2.destroyAllWindows()"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[0][:200]
        raise EnvironmentProblem(
            f"--show: OpenCV cannot open a window here ({reason}). Check that DISPLAY names a display that can be reached; "
            "or leave --show out and write the marked video by --draw DIR."
        )


class Window:
    """Shows pictures until a key is pressed, videos at most at their own speed, and cameras as they come."""

    def __init__(self) -> None:
        self._cv2 = cv2 = load_opencv()
        cv2.namedWindow(TITLE, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO | cv2.WINDOW_GUI_NORMAL)
        self._size: tuple[int, ...] | None = None
        self._video: object = None
        self._begin = 0.0

    def show(self, prediction: FramePrediction) -> bool:
        """Show a picture or a frame; return whether to go on: not after q, Esc, or where the window was closed."""
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
        """Close it."""
        self._cv2.destroyAllWindows()

    def _find_end(self, frame: Frame) -> float:
        """Return until when a frame is shown, by the monotonic clock; what comes late is not caught up with."""
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


def _show_all(results: Iterator[FramePrediction | BadInput]) -> Iterator[FramePrediction | BadInput]:
    """Yield the results as they are shown, until the window is closed."""
    window = Window()
    try:
        for result in results:
            yield result
            if isinstance(result, FramePrediction) and not window.show(result):
                return
    finally:
        window.close()


@contextlib.contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the work as Ctrl-C does, so that what is done until then is written.

    A signal that is ignored, as under nohup, stays so; on another thread than the main one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in names}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):  # the command line's own handler ends at once
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


_MOST_FAILURES = 20
NOT_REACHED = "not reached before the job ended"


@dataclass(frozen=True)
class PredictionJob:
    """What is asked for.

    Attributes:
        model: a model's name, a run, or a folder; None: the default model.
        out: the table; None: stdout.
        draw: folder of marked pictures and videos, or None.
        faces, detector_size: see `build_cropper`.
        engine: see `load_engine`; "auto": see `choose_engine`.
        abstain, mirror: see `FacePredictor`.
        smooth: see `predict_inputs`.
        detect_every: see `predict_inputs`.
        every, seconds: see `read_video`.
        show: whether what is predicted is shown in a window, see `Window`.
        force: whether files that are there, but for inputs, are replaced.
        max_megapixels: pictures with more are refused.
    """

    model: str | None = None
    out: Path | None = None
    draw: Path | None = None
    faces: str = "auto"
    detector_size: int | None = None
    engine: str | None = None
    abstain: float | None = None
    mirror: bool = False
    smooth: float = 0.5
    detect_every: int | None = None
    every: int = 1
    seconds: float | None = None
    show: bool = False
    force: bool = False
    max_megapixels: float = MAX_PIXELS / 1_000_000


def predict_files(names: Sequence[str], job: PredictionJob, *, say: Callable[[str], None]) -> int:
    """Predict files, write the table and the marked pictures; return how many inputs could not be read or drawn.

    `names` are as of `list_inputs`; `say` is told what a reader of the results has to know, and what failed.

    Raises:
        UserError, ModelError, EnvironmentProblem: the job cannot begin, as when an output would replace something.
        OSError: the table cannot be written; the rows until then stand in it, but of parquet.
    """
    choose_form(job.out)
    # A list on stdin may be endless; what is named is counted first, for the time left.
    tally = Tally()
    listed = list_inputs(names, stdin=sys.stdin, tally=tally)
    files = listed if "-" in names else list(listed)
    known = [] if "-" in names else [name for name in files if isinstance(name, str)]
    _check_places(known, job, has_list="-" in names)
    if job.show:
        check_window()
    num_pictures, has_videos = None, False
    if "-" not in names:
        num_pictures = sum(not is_video(name) for name in known)
        has_videos = any(is_video(name) for name in known)
    predictor, about = _open_predictor(job, num_pictures, has_videos=has_videos, say=say)
    max_pixels = int(job.max_megapixels * 1_000_000)
    inputs = open_inputs(files, every=job.every, seconds=job.seconds, max_pixels=max_pixels)
    results = predict_inputs(predictor, inputs, smooth=job.smooth, detect_every=job.detect_every, every=job.every)
    outcome = _Outcome(tally, every=job.every)
    try:
        table = open_table(job.out, labels=predictor.labels, about=about)
        sketches = Sketches(job.draw, force=job.force) if job.draw is not None else None
        with (
            interrupt_on_signals(),
            contextlib.closing(inputs),
            contextlib.closing(results),
            contextlib.closing(_report_progress(results, num_pictures)) as reported,
            contextlib.closing(_show_all(reported) if job.show else reported) as shown,
        ):
            outcome.write_all(shown, table, sketches)
    finally:
        outcome.tell(say)
    if job.out is not None:
        say(f"written: {job.out}")
    return len(outcome.unread) + len(outcome.undrawn)


def _open_predictor(
    job: PredictionJob, num_pictures: int | None, *, has_videos: bool, say: Callable[[str], None]
) -> tuple[FacePredictor, dict[str, Any]]:
    """Return what predicts, and what a reader of its answers has to know, which is said as well."""
    classifier = _open_engine(job, num_pictures, say=say)
    predictor = FacePredictor(
        classifier, faces=job.faces, detector_size=job.detector_size, abstain=job.abstain, mirror=job.mirror
    )
    about = describe_predictions(predictor, faces=job.faces, smooth=job.smooth, detect_every=job.detect_every)
    for key in ("notice", "probabilities", "mirror", *(["detection", "smoothing"] if has_videos else [])):
        if about[key] is not None:
            say(f"{key}: {about[key]}")
    return predictor, about


def _check_places(known: Sequence[str], job: PredictionJob, *, has_list: bool) -> None:
    """Check that nothing is written over an input, or over another file unless that is allowed."""
    inputs = [name for name in known if not name.startswith(CAMERA)]
    if has_list and job.force and job.draw is not None:
        raise UserError(
            "dlfer predict - --draw --force: what is on the list is not known before, so that a picture of it could be "
            "replaced; draw into an empty folder, without --force."
        )
    drawn = list_sketches(known, job.draw) if job.draw is not None else []
    check_outputs({"--out": job.out, "--draw": drawn}, [*inputs, job.model], force=job.force)
    if job.draw is not None:
        check_writable(job.draw, "--draw")


def _open_engine(job: PredictionJob, num_pictures: int | None, *, say: Callable[[str], None]) -> Engine:
    """Return what computes; of videos and lists the number of pictures is not known, and they are many."""
    name = str(find_default_model() if job.model is None else job.model)
    if job.engine == AUTO:
        return choose_engine(name, num_faces=num_pictures or 64, any_size=job.faces == "whole", say=say)
    if job.model is None and job.engine == "litert":
        raise UserError("--engine litert: name an export by --model FOLDER; dlfer export MODEL --to litert makes one.")
    return load_engine(name, job.engine)


class _Outcome:
    """What became of a job: what could not be read, and what was predicted and could not be drawn.

    Args:
        tally: counted the inputs; it is told which could not be read, and which the job did not come to.
        every: frames of videos, see `PredictionJob`.
    """

    def __init__(self, tally: Tally, *, every: int) -> None:
        self.unread: list[dict[str, str]] = []
        self.undrawn: list[dict[str, str]] = []
        self.notes: list[str] = []
        self._tally = tally
        self._every = every
        self._num_done = 0
        self._last: tuple[str, object] = ("", None)

    def write_all(self, results: Iterator[FramePrediction | BadInput], table: Table, sketches: Sketches | None) -> None:
        """Write every result. Ctrl-C and a full disk end the table where it is, and go on to the caller."""
        try:
            for result in results:
                if isinstance(result, BadInput):
                    # What is known is named at the end, even where no row of it can be written.
                    self._count(result)
                table.write(result)
                if isinstance(result, FramePrediction):
                    self._count(result)
                    if sketches is not None:
                        self._draw(result, sketches)
            self._end(table, sketches)
        except (KeyboardInterrupt, OSError):
            self._end(table, sketches)
            raise
        except BaseException:
            table.discard()
            if sketches is not None:
                self._close(sketches)
            raise

    def tell(self, say: Callable[[str], None]) -> None:
        """Say what was counted, and name what failed: the first ones, and how many there are."""
        self._count_missed()
        for line in [*self.notes, *self._tally.describe()]:
            say(line)
        for failed, what in ((self.unread, "read"), (self.undrawn, "drawn")):
            for failure in failed[:_MOST_FAILURES]:
                say(f"not {what}: {escape_text(failure['error'])}")
            if failed:
                say(f"{len(failed):,} of the inputs could not be {what}.")

    def _count(self, result: FramePrediction | BadInput) -> None:
        """Count an input when its first result comes; a video that ends with an error was counted with its first frame."""
        name = result.name if isinstance(result, BadInput) else result.frame.name
        video = None if isinstance(result, BadInput) else result.frame.video
        is_same = (
            video is self._last[1] if video is not None else isinstance(result, BadInput) and self._last[1] is not None
        )
        self._num_done += not (is_same and name == self._last[0])
        self._last = (name, video)
        if isinstance(result, BadInput):
            failure = {"file": to_utf8(result.name), "error": to_utf8(result.error)}
            self.unread.append(failure)
            self._tally.leave_out(NOT_READ, failure["file"], was_seen=True)

    def _draw(self, result: FramePrediction, sketches: Sketches) -> None:
        try:
            sketches.add(result, every=self._every)
        except Exception as error:  # of whatever encoder: one picture does not end the job
            self._note(result.frame.name, error)

    def _end(self, table: Table, sketches: Sketches | None) -> None:
        if sketches is not None:
            self._close(sketches)
        self._count_missed()
        table.close([*self.unread, *self.undrawn], self._tally.as_record())

    def _count_missed(self) -> None:
        """Count the inputs that the job did not come to as left out; those of them that were counted are not counted again."""
        others = sum(reason.n for reason in self._tally.list_left_out() if reason.reason != NOT_READ)
        missed = self._tally.seen - others - self._num_done
        if missed > 0:
            last = to_utf8(self._last[0])
            self._tally.leave_out(NOT_REACHED, f"all after {last}" if last else "all of them", missed, was_seen=True)

    def _close(self, sketches: Sketches) -> None:
        try:
            sketches.close()
        except (DlferError, OSError) as error:
            self._note("the last video", error)
        self.notes = sketches.notes

    def _note(self, name: str, error: Exception) -> None:
        name = to_utf8(name)
        text = to_utf8(describe_failure(error))
        self.undrawn.append({"file": name, "error": f"{name}: predicted, not drawn: {text}"})


def describe_failure(error: Exception) -> str:
    """Return what is wrong with one item, in words; the kind of an error that is not dlfer's own stands before it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) if isinstance(error, DlferError | OSError) else f"{type(error).__name__}: {error}"


def _report_progress(
    results: Iterator[FramePrediction | BadInput], num_pictures: int | None
) -> Iterator[FramePrediction | BadInput]:
    """Yield the results, and show how far it is; the number of pictures on a list that is being read is not known."""
    progress = ConsoleListener()
    num_done = 0
    try:
        for result in results:
            frame = result.frame if isinstance(result, FramePrediction) else None
            if frame is not None and frame.video is not None:
                progress.finish_part(
                    escape(escape_text(Path(frame.name).name)), (frame.index or 0) + 1, frame.video.num_frames
                )
            elif frame is not None:
                num_done += 1
                progress.finish_part("pictures", num_done, num_pictures)
            yield result
    finally:
        progress.close()
