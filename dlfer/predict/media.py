"""Pictures, folders, globs, videos, cameras and lists on stdin as frames of pixels, decoded ahead."""

from __future__ import annotations

import codecs
import collections
import glob
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from dlfer.data.files import VIDEO_SUFFIXES, Tally, find_kind, find_reason, walk
from dlfer.data.images import (
    MAX_PIXELS,
    MIN_SIDE,
    UPLOAD_PIXELS,
    decode_pixels,
    open_undecoded,
    to_channels,
)
from dlfer.errors import DataError, EnvironmentProblem, shorten
from dlfer.predict.video import FORBIDDEN, Video, check_name, is_video, read_video

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
"""Pillow's names of what is read from bytes, which may be a stranger's; PPM is .pgm and .ppm. TIFF is not: its decoder
has the longest list of holes. Files of one's own are read in all formats of `dlfer.data.images`."""

MAX_BYTES = 64 * 2**20
MAX_FILE_BYTES = 2**31
"""Of contents, and of a file of one's own."""


def read_image(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Return the pixels of a picture, upright, as uint8 [H, W, 3] (RGB).

    The type is told from the first bytes, never from the name; the size is read in the header before
    anything is decoded. The orientation in the EXIF data is applied, an animation gives its first
    frame, transparency is laid over white, and more than 8 bits are scaled by the range that the file names.

    Args:
        source: a file's path, or its contents.
        name: what the picture is called in errors; the path, or "the picture".
        max_pixels: of width x height; more is refused undecoded. None: 200 million of a file, 50 million of contents.
        max_bytes: of the file; more is refused unread. None: 2 GiB of a file, 64 MiB of contents.

    Raises:
        DataError: no such file, another type, damaged, too small (below 8 pixels a side) or too large, or more than
            8 bits of which the file does not tell the range.

    Example:
        >>> read_image("photo.jpg").shape
        (3024, 4032, 3)
    """
    if not isinstance(source, str | Path | bytes):
        raise DataError(
            f"read_image: found a {type(source).__name__}, expected a file's path, or its contents as bytes."
        )
    if isinstance(source, bytes):
        name = name or "the picture"
        _check_bytes(len(source), name, max_bytes or MAX_BYTES)
        opening = partial(Image.open, io.BytesIO(source), formats=FORMATS)
    else:
        name = name or str(source)
        _check_file(Path(source), name, max_bytes or MAX_FILE_BYTES)
        opening = partial(open_undecoded, Path(source))
    limit = max_pixels or (UPLOAD_PIXELS if isinstance(source, bytes) else MAX_PIXELS)
    with _decode_picture(opening, name, "not a picture") as image:
        check_size(image.size, name, limit)
        return _decode_picture(
            lambda: to_channels(decode_pixels(image, name), 3), name, "the picture cannot be decoded"
        )


def _check_file(path: Path, name: str, max_bytes: int) -> None:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{name}: not a file; expected a picture.")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DataError(f"{name}: there is no such file.") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise DataError(f"{name}: cannot be read ({shorten(error, name)}).") from error
    _check_bytes(size, name, max_bytes)


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
            "Such a file can fill the memory; shrink the picture, or raise the limit (dlfer predict: --max-megapixels)."
        )
    if min(size) < MIN_SIDE:
        raise DataError(f"{name}: found {width} x {height} pixels, expected at least {MIN_SIDE} on each side.")


def _decode_picture(step: Callable[[], Any], name: str, problem: str) -> Any:
    """Return what a step of Pillow gives; decoders of damaged files raise nearly anything."""
    try:
        return step()
    except (DataError, MemoryError):
        raise
    except PermissionError as error:
        raise DataError(f"{name}: {FORBIDDEN}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: found more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink the picture.") from error
    except Exception as error:
        # Of contents that Pillow does not know it says only where they are in memory.
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({shorten(error, name) or type(error).__name__})"
        raise DataError(
            f"{name}: {problem}{why}. Expected a whole JPEG, PNG, WebP, BMP, GIF, PGM or PPM "
            "(or, as a file, TIFF, AVIF or JPEG 2000); save it again as one of them."
        ) from error


AHEAD = 4
"""Pictures that are decoded ahead; each takes 3 bytes a pixel."""

PATIENCE = 2.0
"""Seconds; a camera, or a list that somebody types, may hang for longer."""

NOT_VIDEO = "files that are not videos in spite of their suffix (.ts)"
NOT_READ = "unreadable or incomplete"

_CHUNK = 65_536
"""Bytes of a list that are read at once, at most."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frame:
    """A picture, or one of a video.

    Attributes:
        name: as it was given, or the file's path in the folder that was given.
        image: uint8 [H, W, 3], RGB, upright.
        index: of the frame in its video, from 0; None of a picture.
        seconds: its time in the video; None of a picture.
        video: the video; None of a picture.
    """

    name: str
    image: np.ndarray
    index: int | None = None
    seconds: float | None = None
    video: Video | None = None


@dataclass(frozen=True)
class BadInput:
    """What was asked for and cannot be had.

    Attributes:
        name: as in `Frame`.
        error: what is wrong, with the name, in a sentence.
    """

    name: str
    error: str


def list_inputs(
    names: Iterable[str], *, stdin: TextIO | None = None, tally: Tally | None = None
) -> Iterator[str | BadInput]:
    """Yield the files (and cameras) that are meant by names, in order; a name that means nothing as a `BadInput`.

    Args:
        names: files; folders, in which pictures and videos are searched for at any depth, hidden ones left
            out, sorted by path; globs (** for any depth); "camera:N"; "-" for a list on stdin, one name a line,
            or with zero bytes between them.
        stdin: where "-" reads.
        tally: counts the files and names that are seen, and those of folders that are neither pictures nor videos.
    """
    tally = Tally() if tally is None else tally
    for name in names:
        if name == "-":
            yield from list_inputs((entry for entry in _split_list(stdin) if entry not in ("", "-")), tally=tally)
        elif os.path.isdir(name) and (found := sorted(_walk(name, tally))):
            yield from found
        elif not os.path.lexists(name) and glob.has_magic(name) and (matches := glob.glob(name, recursive=True)):
            yield from list_inputs(
                (os.path.join(".", match) if match == "-" else match for match in sorted(matches)), tally=tally
            )
        elif os.path.isdir(name) or (not os.path.lexists(name) and glob.has_magic(name)):
            tally.seen += 1
            yield BadInput(name, f"{name}: {_describe_nothing(name)}")
        else:
            tally.seen += 1
            yield name


def _split_list(stream: TextIO | None) -> Iterator[str]:
    """Yield the names of a list as they arrive: those between zero bytes, as of `find -print0`, where it begins with such, else its lines.

    A mark of byte order at its beginning, which some programs write, belongs to no name.
    """
    if stream is None:
        return
    rest, end = b"", b""
    while chunk := stream.buffer.read1(_CHUNK):
        if not end:
            # Between zero bytes a name may hold the end of a line.
            chunk, end = chunk.removeprefix(codecs.BOM_UTF8), b"\0" if b"\0" in chunk else b"\n"
        *whole, rest = (rest + chunk).split(end)
        yield from (_decode_entry(entry, stream, end) for entry in whole)
    yield _decode_entry(rest, stream, end)


def _decode_entry(entry: bytes, stream: TextIO, end: bytes) -> str:
    return (entry if end == b"\0" else entry.rstrip(b"\r")).decode(stream.encoding, "surrogateescape")


def _describe_nothing(name: str) -> str:
    """Return why a folder or a glob stands for no file."""
    if not os.path.isdir(name):
        return "nothing matches."
    if not os.access(name, os.R_OK | os.X_OK):
        return FORBIDDEN
    return "the folder holds no picture and no video."


def open_inputs(
    names: Iterable[str | BadInput], *, every: int = 1, seconds: float | None = None, max_pixels: int = MAX_PIXELS
) -> ReadAhead[Frame | BadInput]:
    """Return the pictures and the frames of files, decoded one after the other on a thread of their own.

    What cannot be read takes its place in the order as a `BadInput`, and stops nothing.

    `names` are from `list_inputs`; of videos the frames 0, every, 2 * every ... are given, up to the time `seconds`.
    Pictures of more than `max_pixels` are refused. A video of which frames are missing ends with a `BadInput`. Of a camera
    the newest frame is given: frames that arrived while the caller was busy are dropped.

    Raises:
        EnvironmentProblem: a package that a video needs is not installed.
    """
    decoded = _decode(names, every=every, seconds=seconds, max_pixels=max_pixels)
    return ReadAhead(decoded, AHEAD, is_live=_is_of_camera)


def _is_of_camera(item: Frame | BadInput) -> bool:
    return isinstance(item, Frame) and item.video is not None and item.video.is_live


class ReadAhead(Iterator[_T]):
    """Items that a thread draws from an iterable ahead; its exception comes in its place.

    A live item takes the place of a live one that still waits. `close` may be called by any thread, and ends a `next` that waits.

    Args:
        items: what is drawn from.
        size: so many items are drawn ahead at most.
        is_live: whether an item is of a camera.
        patience: seconds that `close` waits for the thread; None: until it has ended, as a network that computes on while Python
            ends takes the process down.
        source: what the items are made of, which is closed first: the thread may wait for it.
    """

    def __init__(
        self,
        items: Iterable[_T],
        size: int,
        *,
        is_live: Callable[[_T], bool] = lambda item: False,
        patience: float | None = PATIENCE,
        source: object = None,
    ) -> None:
        self._size, self._is_live, self._patience = size, is_live, patience
        self._source = source if isinstance(source, ReadAhead) else None
        self._waiting: collections.deque = collections.deque()
        self._changed = threading.Condition()
        self._is_over = False
        self._thread = threading.Thread(target=_put_all, args=(items, self._put), name="dlfer-ahead", daemon=True)

    def __next__(self) -> _T:
        self.wait(None)
        with self._changed:
            kind, value = ("end", None) if self._is_over else self._waiting.popleft()
            self._changed.notify_all()
        if kind == "item":
            return value
        self.close()
        if kind == "error":
            raise value
        raise StopIteration

    def wait(self, seconds: float | None) -> bool:
        """Wait for the next item, at most so long; return whether it is there, or there is none."""
        with self._changed:
            if self._thread.ident is None and not self._is_over:
                self._thread.start()
            return self._changed.wait_for(lambda: self._waiting or self._is_over, seconds)

    def close(self) -> None:
        """End the thread, and every `next` that waits."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if self._source is not None:
            self._source.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(self._patience)

    def _put(self, kind: str, value: Any) -> bool:
        with self._changed:
            if kind == "item" and self._waiting and self._is_live(value) and self._is_live(self._waiting[-1][1]):
                self._waiting.pop()
            self._changed.wait_for(lambda: self._is_over or len(self._waiting) < self._size)
            if not self._is_over:
                self._waiting.append((kind, value))
            self._changed.notify_all()
            return not self._is_over


def _put_all(items: Iterable[Any], put: Callable[[str, Any], bool]) -> None:
    """Put all items, then the end or an error, until nobody wants them any more."""
    iterator = iter(items)
    try:
        for item in iterator:
            if not put("item", item):
                return
        put("end", None)
    except BaseException as error:  # passed on to the reader
        put("error", error)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _walk(folder: str, tally: Tally) -> Iterator[str]:
    """Yield the pictures and videos below a folder, see `dlfer.data.files.walk`; every other file is counted."""
    for path in walk(Path(folder), tally, set()):
        reason = find_reason(path)
        # TypeScript is called .ts as well; other names are taken at their word, so that what is damaged is reported.
        is_named = path.suffix.casefold() in VIDEO_SUFFIXES and path.suffix.casefold() != ".ts"
        if reason is None or is_named or find_kind(path) == "video":
            tally.seen += 1
            yield str(path)
        else:
            tally.leave_out(NOT_VIDEO if path.suffix.casefold() == ".ts" else reason, path)


def _decode(
    names: Iterable[str | BadInput], *, every: int, seconds: float | None, max_pixels: int
) -> Iterator[Frame | BadInput]:
    for name in names:
        if isinstance(name, BadInput):
            yield name
            continue
        try:
            if is_video(name):
                for video, index, moment, image in read_video(name, every=every, seconds=seconds):
                    yield Frame(name, image, index, moment, video)
            else:
                yield Frame(name, read_image(check_name(name), name=name, max_pixels=max_pixels))
        except EnvironmentProblem:
            raise
        except DataError as error:
            yield BadInput(name, str(error))
        except OSError as error:
            yield BadInput(name, f"{name}: {shorten(error, name)}")
