"""Pictures, folders, globs, films, cameras and lists on stdin as frames of pixels, decoded ahead."""

from __future__ import annotations

import glob
import io
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from PIL import Image

from dlfer.data.images import MAX_PIXELS, MIN_SIDE, SUFFIXES, find_turn
from dlfer.errors import DataError, EnvironmentProblem

FILM_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
CAMERA = "camera:"
DEFAULT_RATE = 25.0
"""Frames a second where a film or a camera does not tell."""


@dataclass(frozen=True)
class Film:
    """What is known of a film before its first frame.

    Attributes:
        rate: frames a second.
        num_frames: as its header says; None of a camera, or where it does not say.
        is_live: whether it is a camera.
    """

    rate: float
    num_frames: int | None
    is_live: bool


def is_film(name: str) -> bool:
    """Return whether a name is that of a film or of a camera."""
    return name.startswith(CAMERA) or name.lower().endswith(FILM_SUFFIXES)


def read_film(
    name: str, *, every: int = 1, seconds: float | None = None
) -> Iterator[tuple[Film, int, float, np.ndarray]]:
    """Yield (film, index of the frame, its time in seconds, uint8 [H, W, 3] RGB), upright, one frame in memory.

    Args:
        name: of a film, or "camera:0" for the first camera.
        every: give every so many-th frame; the others are not decoded into pixels.
        seconds: stop there; None: at the end, which a camera does not have.

    Raises:
        DataError: it cannot be opened, or holds no frame.
        EnvironmentProblem: OpenCV is not installed.
    """
    is_live = name.startswith(CAMERA)
    capture = _open_capture(name, is_live=is_live)
    try:
        film = _describe_film(capture, is_live=is_live)
        index, begin = -1, time.monotonic()
        while capture.grab():
            index += 1
            now = time.monotonic() - begin if is_live else _get_time(capture, index, film.rate)
            if seconds is not None and now > seconds:
                break
            if index % every:
                continue
            found, frame = capture.retrieve()
            if found:
                yield film, index, now, frame[..., ::-1].copy()
        if index < 0:
            raise DataError(f"{name}: no frame can be read; the file is no film, is damaged, or its codec is unknown.")
    finally:
        capture.release()


def load_opencv() -> Any:
    """Return the module cv2.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise EnvironmentProblem(
            f"films and cameras need OpenCV ({error}): pip install 'opencv-python-headless<5'"
        ) from error
    return cv2


def _open_capture(name: str, *, is_live: bool) -> Any:
    cv2 = load_opencv()
    if is_live:
        number = name[len(CAMERA) :]
        if not number.isdecimal():
            raise DataError(f"{name}: expected the number of a camera, e.g. camera:0.")
        source: int | str = int(number)
    else:
        # OpenCV would take other names for addresses and patterns; only files are meant.
        if not Path(name).is_file():
            raise DataError(f"{name}: there is no such file.")
        source = str(Path(name).resolve())
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        capture.release()
        what = "no such camera, or another program holds it" if is_live else "no film, damaged, or of an unknown codec"
        raise DataError(f"{name}: cannot be opened ({what}).")
    return capture


def _describe_film(capture: Any, *, is_live: bool) -> Film:
    cv2 = load_opencv()
    rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return Film(
        rate=float(rate) if 0 < rate < 1000 else DEFAULT_RATE,
        num_frames=int(count) if count > 0 and not is_live else None,
        is_live=is_live,
    )


def _get_time(capture: Any, index: int, rate: float) -> float:
    """Return the time of the frame that was grabbed: its own where the film tells (rates may vary), else by the rate."""
    stamp = capture.get(load_opencv().CAP_PROP_POS_MSEC) / 1000
    return stamp if stamp > 0 or index == 0 else index / rate


FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
"""Pillow's names of what is read; PPM is .pgm and .ppm. TIFF is not: its decoder has the longest list of holes."""

MAX_BYTES = 64 * 2**20


def read_image(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
) -> np.ndarray:
    """Return the pixels of a picture, upright, as uint8 [H, W, 3] (RGB).

    The type is told from the first bytes, never from the name; the size is read in the header before
    anything is decoded. The orientation in the EXIF data is applied, an animation gives its first
    frame, 16 bits are cut to their upper 8, and transparency is laid over white.

    Args:
        source: a file's path, or its contents.
        name: what the picture is called in errors; the path, or "the picture".
        max_pixels: of width x height; more is refused undecoded.
        max_bytes: of the file; more is refused unread.

    Raises:
        DataError: no such file, another type, damaged, too small (below 8 pixels a side) or too large.

    Example:
        >>> read_image("photo.jpg").shape
        (3024, 4032, 3)
    """
    if isinstance(source, bytes):
        name, contents = name or "the picture", source
        _check_bytes(len(contents), name, max_bytes)
    else:
        name = name or str(source)
        contents = _read_bytes(Path(source), name, max_bytes)
    with _decode_picture(lambda: Image.open(io.BytesIO(contents), formats=FORMATS), name, "not a picture") as image:
        check_size(image.size, name, max_pixels)
        return _decode_picture(lambda: to_rgb(upright(image)), name, "the picture cannot be decoded")


def _read_bytes(path: Path, name: str, max_bytes: int) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{name}: not a file; expected a picture.")
        with open(path, "rb") as file:
            contents = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise DataError(f"{name}: cannot be read ({error}).") from error
    _check_bytes(len(contents), name, max_bytes)
    return contents


def _check_bytes(size: int, name: str, max_bytes: int) -> None:
    if size == 0:
        raise DataError(f"{name}: the file is empty.")
    if size > max_bytes:
        raise DataError(f"{name}: found more than {max_bytes:,} bytes, which is the limit; shrink the picture.")


def check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    """Raise DataError for a picture (width, height) that is too large or too small."""
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: found {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,}. "
            "Such a file can fill the memory; shrink the picture."
        )
    if min(size) < MIN_SIDE:
        raise DataError(f"{name}: found {width} x {height} pixels, expected at least {MIN_SIDE} a side.")


def _decode_picture(step: Callable[[], Any], name: str, problem: str) -> Any:
    """Return what a step of Pillow gives; decoders of damaged files raise nearly anything."""
    try:
        return step()
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: found more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink the picture.") from error
    except Exception as error:
        raise DataError(
            f"{name}: {problem} ({type(error).__name__}). Expected a whole JPEG, PNG, WebP, BMP, GIF, PGM or PPM; "
            "save it anew as one of them."
        ) from error


def upright(image: Image.Image) -> Image.Image:
    """Return the first frame of a picture, decoded, as its EXIF data say that it is held."""
    image.seek(0)
    image.load()
    turn = find_turn(image)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> np.ndarray:
    """Return a decoded picture of any mode, or rows of one, as uint8 [H, W, 3]."""
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, (255, 255, 255, 255)), pixels)
    return np.array(image.convert("RGB"))


AHEAD = 4
"""Pictures that are decoded ahead; each is at most 150 MB."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frame:
    """A picture, or one of a film.

    Attributes:
        name: as it was given, or the file's path in the folder that was given.
        image: uint8 [H, W, 3], RGB, upright.
        index: of the frame in its film, from 0; None of a picture.
        seconds: its time in the film; None of a picture.
        film: the film; None of a picture.
    """

    name: str
    image: np.ndarray
    index: int | None = None
    seconds: float | None = None
    film: Film | None = None


@dataclass(frozen=True)
class BadInput:
    """What was asked for and cannot be had.

    Attributes:
        name: as in `Frame`.
        error: what is wrong, with the name, in a sentence.
    """

    name: str
    error: str


def list_inputs(names: Iterable[str], *, stdin: TextIO | None = None) -> Iterator[str | BadInput]:
    """Yield the files (and cameras) that are meant by names, in order.

    Args:
        names: files; folders, in which pictures and films are searched for at any depth, hidden ones left
            out, sorted by path; globs (** for any depth); "camera:N"; "-" for a list on stdin, one name a line.
        stdin: where "-" reads.
    """
    for name in names:
        if name == "-":
            lines = (line.rstrip("\r\n") for line in stdin or ())
            yield from list_inputs(line for line in lines if line and line != "-")
        elif name.startswith(CAMERA):
            yield name
        elif os.path.isdir(name):
            found = sorted(_walk(name))
            yield from found or [BadInput(name, f"{name}: the folder holds no picture and no film.")]
        elif not os.path.lexists(name) and glob.has_magic(name):
            matches = sorted(glob.glob(name, recursive=True))
            yield from list_inputs(matches) if matches else [BadInput(name, f"{name}: nothing matches.")]
        else:
            yield name


def open_inputs(
    names: Iterable[str | BadInput], *, every: int = 1, seconds: float | None = None
) -> Iterator[Frame | BadInput]:
    """Yield the pictures and the frames of files, decoded one after the other on a thread of their own.

    What cannot be read takes its place in the order as a `BadInput`, and stops nothing.

    `names` are from `list_inputs`; of films every so many-th frame is given, and they are left after so many seconds.

    Raises:
        EnvironmentProblem: a package that a film needs is not installed.
    """
    yield from read_ahead(_decode(names, every=every, seconds=seconds), AHEAD)


def read_ahead(items: Iterable[_T], size: int) -> Iterator[_T]:
    """Yield items that a thread draws from an iterable, at most `size` of them ahead; its exception comes in its place."""
    waiting: queue.Queue = queue.Queue(size)
    is_over = threading.Event()

    def put(kind: str, value: object) -> bool:
        while not is_over.is_set():
            try:
                waiting.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        iterator = iter(items)
        try:
            for item in iterator:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed over to whoever reads
            put("error", error)
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    thread = threading.Thread(target=work, name="dlfer-decode", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        is_over.set()
        thread.join(timeout=5)


def _walk(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and name.lower().endswith((*SUFFIXES, *FILM_SUFFIXES)):
                yield os.path.join(parent, name)


def _decode(names: Iterable[str | BadInput], *, every: int, seconds: float | None) -> Iterator[Frame | BadInput]:
    for name in names:
        if isinstance(name, BadInput):
            yield name
            continue
        try:
            if is_film(name):
                for film, index, moment, image in read_film(name, every=every, seconds=seconds):
                    yield Frame(name, image, index, moment, film)
            else:
                yield Frame(name, read_image(Path(name)))
        except EnvironmentProblem:
            raise
        except DataError as error:
            yield BadInput(name, str(error))
        except OSError as error:
            yield BadInput(name, f"{name}: {error}")
