"""Reading of pictures, folders, globs, videos, cameras and lists on stdin as frames, decoded ahead on a thread."""

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

from dlfer.data.files import VIDEO_SUFFIXES, Tally, find_kind, find_rejection_reason, walk
from dlfer.data.images import (
    MAX_PIXELS,
    UPLOAD_PIXELS,
    check_side,
    decode_pixels,
    open_undecoded,
    to_channels,
)
from dlfer.errors import DataError, EnvironmentProblem, shorten
from dlfer.predict.video import FORBIDDEN, Video, check_name, is_video, read_video

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM")
"""Pillow's names of the formats read from bytes, which may be untrusted; PPM covers .pgm and .ppm. TIFF is not
read: its decoder has the longest list of vulnerabilities. Local files may have all formats of `dlfer.data.images`."""

MAX_BYTES = 64 * 2**20
MAX_FILE_BYTES = 2**31
"""Size limits in bytes: for contents given as bytes, and for a local file."""


def read_image(
    source: str | Path | bytes,
    *,
    name: str | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
) -> np.ndarray:
    """Return the pixels of a picture, upright, as uint8 [H, W, 3] (RGB).

    The format is determined by the first bytes, never by the name, and the size is read from the header before
    anything is decoded. The EXIF orientation is applied, an animation gives its first frame, transparency is
    composited on white, and values of more than 8 bits are scaled by the range that the file declares.

    Args:
        source: a file's path, or its contents.
        name: name of the picture in errors; None: the path, or "the picture".
        max_pixels: maximum width x height, checked before decoding; None: 200 million for a path, 50 million otherwise.
        max_bytes: maximum size, checked before reading; None: 2 GiB for a path, 64 MiB for contents.

    Raises:
        DataError: the file does not exist, has another format, is damaged, too small (below 8 pixels a side) or too
            large, or has more than 8 bits without declaring their range.

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
    check_side(width, height, name)


def _decode_picture(step: Callable[[], Any], name: str, problem: str) -> Any:
    """Return the result of a call of Pillow; raise DataError for its errors, which may be of almost any type."""
    try:
        return step()
    except (DataError, MemoryError):
        raise
    except PermissionError as error:
        raise DataError(f"{name}: {FORBIDDEN}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"{name}: found more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink the picture.") from error
    except Exception as error:
        # For contents of an unknown format, Pillow's message has only their memory address.
        why = "" if isinstance(error, UnidentifiedImageError) else f" ({shorten(error, name) or type(error).__name__})"
        raise DataError(
            f"{name}: {problem}{why}. Expected a whole JPEG, PNG, WebP, BMP, GIF, PBM, PGM or PPM "
            "(or, as a file, TIFF, AVIF or JPEG 2000); save it again as one of them."
        ) from error


AHEAD = 4
"""Number of pictures that are decoded ahead; each takes 3 bytes per pixel."""

CLOSE_TIMEOUT = 2.0
"""Seconds to wait for a reading thread to end; a camera, or a list typed by hand, may block it for longer."""

NOT_VIDEO = "files that are not videos in spite of their suffix (.ts)"
NOT_READ = "unreadable or incomplete"

_CHUNK = 65_536
"""Maximum number of bytes of a list that are read at once."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Frame:
    """A picture, or a frame of a video.

    Attributes:
        name: the input as it was given, or the path of the file in a given folder.
        image: uint8 [H, W, 3], RGB, upright.
        index: of the frame in its video, from 0; None for a picture.
        seconds: time of the frame in its video; None for a picture.
        video: the video; None for a picture.
    """

    name: str
    image: np.ndarray
    index: int | None = None
    seconds: float | None = None
    video: Video | None = None


@dataclass(frozen=True)
class UnreadableInput:
    """An input that could not be read, or not completely.

    Attributes:
        name: as in `Frame`.
        error: a sentence with the name and the problem.
    """

    name: str
    error: str


def list_inputs(
    names: Iterable[str], *, stdin: TextIO | None = None, tally: Tally | None = None
) -> Iterator[str | UnreadableInput]:
    """Yield the files and cameras that names refer to, in order; a folder or glob without any gives a `UnreadableInput`.

    Args:
        names: files; folders, which are searched for pictures and videos at any depth, without hidden ones and
            sorted by path; globs (** for any depth); "camera:N"; "-" for a list on stdin, with one name per line,
            or separated by NUL bytes.
        stdin: the stream that is read for "-".
        tally: counts the files and names that are seen, and files in folders that are neither pictures nor videos.
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
            yield UnreadableInput(name, f"{name}: {_explain_no_files(name)}")
        else:
            tally.seen += 1
            yield name


def _split_list(stream: TextIO | None) -> Iterator[str]:
    """Yield the names of a list as they arrive, separated by NUL bytes, as by `find -print0`, or else by newlines.

    The first chunk that arrives decides which it is. A byte order mark at the beginning is removed.
    """
    if stream is None:
        return
    rest, end = b"", b""
    while chunk := stream.buffer.read1(_CHUNK):
        if not end:
            # Names that are separated by NUL bytes may contain newlines.
            chunk, end = chunk.removeprefix(codecs.BOM_UTF8), b"\0" if b"\0" in chunk else b"\n"
        *whole, rest = (rest + chunk).split(end)
        yield from (_decode_entry(entry, stream, end) for entry in whole)
    yield _decode_entry(rest, stream, end)


def _decode_entry(entry: bytes, stream: TextIO, end: bytes) -> str:
    return (entry if end == b"\0" else entry.rstrip(b"\r")).decode(stream.encoding, "surrogateescape")


def _explain_no_files(name: str) -> str:
    """Return why a folder or a glob gives no file."""
    if not os.path.isdir(name):
        return "nothing matches."
    if not os.access(name, os.R_OK | os.X_OK):
        return FORBIDDEN
    return "the folder holds no picture and no video."


def open_inputs(
    names: Iterable[str | UnreadableInput],
    *,
    every: int = 1,
    seconds: float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> ReadAhead[Frame | UnreadableInput]:
    """Return an iterator over the pictures and video frames of inputs, decoded ahead on a separate thread.

    An input that cannot be read gives a `UnreadableInput` in its place, and the iteration continues.

    `names` are from `list_inputs`; videos give the frames 0, every, 2 * every ... up to the time `seconds`. Pictures of
    more than `max_pixels` are refused. A video with missing frames ends with a `UnreadableInput`. A camera gives its newest
    frame: frames that arrive while the caller is busy are dropped.

    Raises:
        EnvironmentProblem: a package needed for videos is not installed; this is raised by the iteration.
    """
    decoded = _decode(names, every=every, seconds=seconds, max_pixels=max_pixels)
    return ReadAhead(decoded, AHEAD, is_live=_is_of_camera)


def _is_of_camera(item: Frame | UnreadableInput) -> bool:
    return isinstance(item, Frame) and item.video is not None and item.video.is_live


class ReadAhead(Iterator[_T]):
    """An iterator whose items a thread reads ahead from an iterable; an exception is raised after the items before it.

    A live item replaces a waiting live one. `close` may be called from any thread and ends a waiting `next`.

    Args:
        items: the iterable.
        size: maximum number of items that are read ahead.
        is_live: whether an item is from a camera.
        patience: seconds that `close` waits for the thread; None: until it has ended, because a network that still
            computes while Python exits crashes the process.
        source: a ReadAhead from which the items are made; it is closed first, since the thread may be waiting for it.
    """

    def __init__(
        self,
        items: Iterable[_T],
        size: int,
        *,
        is_live: Callable[[_T], bool] = lambda item: False,
        patience: float | None = CLOSE_TIMEOUT,
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
        """Wait at most `seconds` for the next item; return whether it, or the end of the iteration, has arrived."""
        with self._changed:
            if self._thread.ident is None and not self._is_over:
                self._thread.start()
            return self._changed.wait_for(lambda: self._waiting or self._is_over, seconds)

    def close(self) -> None:
        """Stop the thread, and end every `next` that is waiting."""
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
    """Pass all items to `put`, then the end or an error; stop when it returns False."""
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
    """Yield the pictures and videos below a folder, see `dlfer.data.files.walk`; other files are counted."""
    for path in walk(Path(folder), tally, set()):
        reason = find_rejection_reason(path)
        # TypeScript files end in .ts, too. Other video suffixes are trusted, so that damaged videos are reported.
        is_named = path.suffix.casefold() in VIDEO_SUFFIXES and path.suffix.casefold() != ".ts"
        if reason is None or is_named or find_kind(path) == "video":
            tally.seen += 1
            yield str(path)
        else:
            tally.leave_out(NOT_VIDEO if path.suffix.casefold() == ".ts" else reason, path)


def _decode(
    names: Iterable[str | UnreadableInput], *, every: int, seconds: float | None, max_pixels: int
) -> Iterator[Frame | UnreadableInput]:
    for name in names:
        if isinstance(name, UnreadableInput):
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
            yield UnreadableInput(name, str(error))
        except OSError as error:
            yield UnreadableInput(name, f"{name}: {shorten(error, name)}")
