"""Images: a file decoded safely (what cannot be trusted is refused before it costs memory), resized, equalized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dlfer.config.names import EQUALIZERS
from dlfer.errors import DataError, EnvironmentProblem, ModelError

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "PPM")
"""Pillow's names of the formats that are read; PPM is its reader of .pgm, .ppm and .pnm."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".pgm", ".ppm", ".pnm")
MAX_PIXELS = 50_000_000
MIN_SIDE = 8

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Values of the EXIF tag of the orientation, and what makes such an image upright; from 5 on it lies on a side."""

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")


def read_image(path: str | Path) -> np.ndarray:
    """Return the pixels of one image file, upright, as uint8 [H, W, C]; C is 1 for a grey file, else 3.

    The orientation in the EXIF data is applied, an animation gives its first frame, 16 bits are
    cut to their upper 8, palettes and CMYK become RGB, and transparency is laid over white.

    Raises:
        DataError: the file is damaged, of another format, below 8 pixels a side, or above 50
            megapixels (seen in its header, before anything is decoded).
    """
    path = Path(path)
    with _open(path) as image:
        try:
            image.seek(0)
            image.load()
            turn = find_turn(image)
            return _to_array(image if turn is None else image.transpose(turn), path)
        except DataError:
            raise
        except Exception as error:  # decoders of damaged files raise nearly anything
            raise DataError(
                f"{path}: the image cannot be decoded ({error}). The file is damaged or cut short; "
                "replace or delete it, or set data.skip_unreadable: true."
            ) from error


def read_header(path: str | Path) -> tuple[int, int, bool]:
    """Return (width, height, whether it is grey) of an image file as `read_image` would give it, undecoded.

    Raises:
        DataError: as `read_image`, for what the header tells.
    """
    with _open(Path(path)) as image:
        width, height = image.size
        # Pillow decodes a whole PNG in search of EXIF data that stands behind the pixels; that is left to read_image.
        has_exif = image.format != "PNG" or "exif" in image.info
        if has_exif and find_turn(image) in [_UPRIGHT[value] for value in (5, 6, 7, 8)]:
            width, height = height, width
        return width, height, image.mode in _GREY_MODES


def find_turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes an image upright by its EXIF data, None where it is so, or where they are damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data say nothing of the pixels, which are whole
        return None


def resize_square(pixels: np.ndarray, size: int, aspect: str = "crop") -> np.ndarray:
    """Return an image, uint8 [H, W, C], as uint8 [size, size, C], its aspect ratio kept; see `resize_to`."""
    return resize_to(pixels, (size, size), aspect)


def resize_to(pixels: np.ndarray, size: tuple[int, int], aspect: str = "crop") -> np.ndarray:
    """Return an image, uint8 [H, W, C], as uint8 [*size, C], both axes scaled by the same factor.

    Bilinear, with antialiasing when it shrinks.

    Args:
        pixels: of any size.
        size: (height, width) of the result.
        aspect: how an image of another aspect ratio is fitted. "crop": its largest centred part of that ratio.
            "pad": the whole image in the centre, and its outermost pixels repeated on two sides.
    """
    if pixels.shape[:2] == size:
        return pixels
    grey = pixels.shape[-1] == 1
    choose = max if aspect == "pad" else min
    scale = choose(found / wanted for found, wanted in zip(pixels.shape, size, strict=False))
    part = _cut_centre(pixels[None], *(max(1, round(wanted * scale)) for wanted in size))[0]
    image = Image.fromarray(np.ascontiguousarray(part[..., 0] if grey else part))
    fitted = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR))
    return fitted[..., None] if grey else fitted


def resize_all(images: np.ndarray, size: tuple[int, int], aspect: str = "crop") -> np.ndarray:
    """Return uint8 [N, *size, C] of images [N, H, W, C], each as `resize_to` makes it."""
    if images.shape[1:3] == size:
        return images
    return np.stack([resize_to(image, size, aspect) for image in images])


def compute_side(height: int, width: int, aspect: str) -> int:
    """Return the side in pixels of the square that an image becomes before it is resized: the shorter side under crop."""
    return max(height, width) if aspect == "pad" else min(height, width)


def make_square(images: np.ndarray, aspect: str) -> np.ndarray:
    """Return images [N, H, W] or [N, H, W, C] as squares [N, S, S] or [N, S, S, C]; no pixel is interpolated.

    Under "crop" S is min(H, W), the largest centred square; under "pad" it is max(H, W), and the outermost pixels
    are repeated on the two sides where there are none. `dlfer.model.face_input.make_square` does the same in a network.
    """
    side = compute_side(*images.shape[1:3], aspect)
    return _cut_centre(images, side, side)


def _cut_centre(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return [N, height, width, ...] of [N, H, W, ...]: the central part, edges repeated where the image is smaller."""
    for axis, wanted in ((1, height), (2, width)):
        found = images.shape[axis]
        first, before = max(0, (found - wanted) // 2), max(0, (wanted - found) // 2)
        images = images[:, first : first + wanted] if axis == 1 else images[:, :, first : first + wanted]
        if wanted > found:
            margins = [(0, 0)] * images.ndim
            margins[axis] = (before, wanted - found - before)
            images = np.pad(images, margins, mode="edge")
    return images


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Return `pixels` (uint8 [H, W, C]) with 1 or 3 channels; grey becomes three equal ones, RGB its luma."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def match_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Return uint8 [N, H, W, channels] of images [N, H, W] or [N, H, W, 1 or 3].

    RGB becomes grey by the luma of ITU-R BT.601, as Pillow does it.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise ModelError(
            f"images: found dtype {images.dtype} and shape {images.shape}, "
            "expected uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] with values 0..255."
        )
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return images.repeat(3, axis=-1)
    luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def _open(path: Path) -> Image.Image:
    """Open a file and judge its header; nothing is decoded."""
    try:
        image = Image.open(path, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large(path, f"more than {Image.MAX_IMAGE_PIXELS:,}")) from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except Exception as error:  # as above: readers of headers raise nearly anything
        raise DataError(
            f"{path}: not an image that can be read ({type(error).__name__}); expected JPEG, PNG, BMP, GIF, WEBP "
            "or PGM. Replace or delete it, or set data.skip_unreadable: true."
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise DataError(_too_large(path, f"{width} x {height} = {width * height:,}"))
    if min(width, height) < MIN_SIDE:
        image.close()
        raise DataError(
            f"{path}: found an image of {width} x {height} pixels, expected at least {MIN_SIDE} a side. "
            "Replace or delete it, or set data.skip_unreadable: true."
        )
    return image


def _too_large(path: Path, found: str) -> str:
    return (
        f"{path}: found {found} pixels, expected at most {MAX_PIXELS:,}. Such a file can fill the memory; "
        "shrink or delete it, or set data.skip_unreadable: true."
    )


def _to_array(image: Image.Image, path: Path) -> np.ndarray:
    """Return a decoded image of any mode as uint8 [H, W, 1 or 3]."""
    if image.mode == "F":
        raise DataError(f"{path}: found floating-point pixels, expected 8 or 16 bits a channel.")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return (np.clip(values, 0, 65535) >> 8).astype(np.uint8)[..., None]
    if image.mode in ("LA", "La", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La", "1")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba).convert("L" if grey else "RGB")
    elif image.mode in ("1", "L"):
        image = image.convert("L")
    else:
        image = image.convert("RGB")
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


CLIP_LIMIT = 2.0
TILES = 4
"""CLAHE: a tile's grey level may hold this many times its even share; tiles a side, 12 pixels each of 48."""


def equalize(image: np.ndarray, method: str) -> np.ndarray:
    """Return an image whose grey levels are spread over the whole range; in colour the luma is, and the chroma stays.

    Args:
        image: uint8 [H, W, 1 or 3].
        method: "histogram" (over the whole image), "clahe" (in 4x4 tiles, contrast limited) or "none".

    Raises:
        DataError: the method is none of these.
        EnvironmentProblem: OpenCV is not installed.

    Source: Zuiderveld, Contrast Limited Adaptive Histogram Equalization, Graphics Gems IV (1994) 474.
    """
    if method not in EQUALIZERS:
        raise DataError(f"faces.equalize: found {method!r}, expected one of {', '.join(EQUALIZERS)}.")
    if method == "none":
        return image
    try:
        import cv2
    except ImportError as error:
        raise EnvironmentProblem(
            f"faces.equalize: {method} needs OpenCV ({error}): pip install 'opencv-python-headless<5'"
        ) from error
    grey = np.ascontiguousarray(to_channels(image, 1)[..., 0])
    if method == "histogram":
        equalized = cv2.equalizeHist(grey)
    else:
        equalized = cv2.createCLAHE(clipLimit=CLIP_LIMIT, tileGridSize=(TILES, TILES)).apply(grey)
    if image.shape[-1] == 1:
        return equalized[..., None]
    change = equalized.astype(np.int16) - grey
    return (image + change[..., None]).clip(0, 255).astype(np.uint8)
