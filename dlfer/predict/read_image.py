"""One picture from a stranger, decoded safely: known types only, judged by its header before it costs memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dlfer.data.images import MAX_PIXELS, MIN_SIDE, find_turn
from dlfer.errors import DataError

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
    with _decode(lambda: Image.open(io.BytesIO(contents), formats=FORMATS), name, "not a picture") as image:
        _check_size(image.size, name, max_pixels)
        return _decode(lambda: _to_rgb(image), name, "the picture cannot be decoded")


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


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{name}: found {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,}. "
            "Such a file can fill the memory; shrink the picture."
        )
    if min(size) < MIN_SIDE:
        raise DataError(f"{name}: found {width} x {height} pixels, expected at least {MIN_SIDE} a side.")


def _decode(step: Callable[[], Any], name: str, problem: str) -> Any:
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


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Return a picture of any mode as uint8 [H, W, 3], upright."""
    image.seek(0)
    image.load()
    turn = find_turn(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, (255, 255, 255, 255)), pixels)
    image = image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))
