"""Decoding of image files, with unsafe files refused before they take memory; resizing and equalization."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dlfer.config.names import EQUALIZERS
from dlfer.data.files import can_read_heif, find_kind
from dlfer.errors import DataError, EnvironmentProblem, ModelError, shorten

# fmt: off
FORMATS = (
    "JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM", "TIFF", "AVIF", "JPEG2000", "ICO", "QOI", "PCX", "DCX", "PSD", "SGI", "SUN", "DDS",
    "CUR", "ICNS", "XBM", "XPM", "MSP", "IM", "FITS", "BLP", "FTEX",
)
# fmt: on
"""Pillow's names of the supported formats; PPM also reads .pgm and .pnm. Left out are formats whose readers run other
programs (EPS) or rely on the operating system (WMF), or that Pillow cannot decode itself (HDF5, GRIB)."""

MAX_PIXELS, UPLOAD_PIXELS = 200_000_000, 50_000_000
"""Size limits in pixels: for a local file, and for uploaded contents. A decoded pixel takes three bytes."""

MIN_SIDE = 8

_ORIENTATION = 0x0112
_EXIF_WITHIN = 2**17
"""Number of leading bytes of a JPEG searched for EXIF data, which are in one of the first segments (64 KiB at most)."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation value -> the transposition that makes the image upright; values from 5 on swap width and height."""

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of one image file, upright, as uint8 [H, W, C]; C is 1 for a grey file, else 3.

    The EXIF orientation is applied, only the first frame of an animation is read, palettes and CMYK become RGB,
    transparency is composited over white, and more than 8 bits are scaled by their actual range (see `decode_upright`).

    Raises:
        DataError: the file is damaged, in an unsupported format, has a side below 8 pixels or more than `max_pixels`
            (checked in the header, before decoding), or its value range cannot be determined.
    """
    path = Path(path)
    with _open(path, max_pixels) as image:
        try:
            return decode_pixels(image, str(path))
        except DataError:
            raise
        except Exception as error:  # decoders raise almost any exception on damaged files
            raise DataError(
                f"{path}: the image cannot be decoded ({shorten(error, path)}). The file is damaged or cut short; "
                "replace or delete it, or set data.skip_unreadable: true."
            ) from error


def read_header(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int, bool]:
    """Return (width, height, is grey) of the image that `read_image` would return, from the header alone.

    Raises:
        DataError: as `read_image`, for problems that show in the header.
    """
    with _open(Path(path), max_pixels) as image:
        width, height = image.size
        # Pillow would decode a whole PNG to find EXIF data after the pixels, so only EXIF data before them count here.
        # For a TIFF its size already includes the orientation.
        has_exif = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        if has_exif and find_transposition(image) in [_UPRIGHT[value] for value in (5, 6, 7, 8)]:
            width, height = height, width
        return width, height, image.mode in _GREY_MODES


def normalise_for_tensorflow(contents: bytes, name: str) -> bytes:
    """Return an encoded image that TensorFlow decodes to the pixels of `read_image`: `contents` or a BMP of the pixels.

    TensorFlow's decoders ignore the EXIF orientation, drop transparency and keep only the upper 8 of 16 bits. Contents
    that cannot be decoded are returned unchanged.

    Args:
        contents: a JPEG, PNG, GIF or BMP file.
        name: the file's name, for errors.

    Raises:
        DataError: it has more than 8 bits, and its value range cannot be determined.
    """
    if _is_plain(contents):
        return contents
    try:
        with Image.open(io.BytesIO(contents), formats=("JPEG", "PNG", "GIF", "BMP")) as image:
            if image.format == "JPEG" and find_transposition(image) is None:
                return contents
            pixels = to_channels(decode_pixels(image, name), 3)
    except DataError:
        raise
    except Exception:  # decoders raise almost any exception on damaged files, which TensorFlow then refuses as well
        return contents
    plain = io.BytesIO()
    Image.fromarray(pixels).save(plain, "BMP")
    return plain.getvalue()


def _is_plain(contents: bytes) -> bool:
    """Return whether contents are a JPEG without EXIF data, or an 8-bit PNG without EXIF data and transparency."""
    if contents.startswith(b"\xff\xd8"):
        return b"Exif\0\0" not in contents[:_EXIF_WITHIN]
    is_eight_bits = contents.startswith(b"\x89PNG") and contents[24:26] in (b"\x08\x00", b"\x08\x02")
    return is_eight_bits and b"tRNS" not in contents and b"eXIf" not in contents


def find_transposition(image: Image.Image) -> Image.Transpose | None:
    """Return the transposition that makes an image upright, from its EXIF data; None if not needed or damaged."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data do not mean that the pixels are damaged
        return None


def resize_square(pixels: np.ndarray, size: int, aspect: str = "crop") -> np.ndarray:
    """Resize an image, uint8 [H, W, C], to uint8 [size, size, C] without distortion; see `resize_to`."""
    return resize_to(pixels, (size, size), aspect)


def resize_to(pixels: np.ndarray, size: tuple[int, int], aspect: str = "crop") -> np.ndarray:
    """Resize an image, uint8 [H, W, C], to uint8 [*size, C], with the same factor for both axes.

    The interpolation is bilinear, with antialiasing when the image shrinks.

    Args:
        size: (height, width) of the result.
        aspect: how an image of another aspect ratio is fitted. "crop": its largest central part of that ratio.
            "pad": the whole image, centred, with its edge pixels repeated on two sides.
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
    """Resize images, uint8 [N, H, W, C], to uint8 [N, *size, C]; see `resize_to`."""
    if images.shape[1:3] == size:
        return images
    return np.stack([resize_to(image, size, aspect) for image in images])


def compute_side(height: int, width: int, aspect: str) -> int:
    """Return the side in pixels of the square that `make_square` crops or pads an image to."""
    return max(height, width) if aspect == "pad" else min(height, width)


def make_square(images: np.ndarray, aspect: str) -> np.ndarray:
    """Crop or pad images [N, H, W] or [N, H, W, C] to squares [N, S, S] or [N, S, S, C], without interpolation.

    With "crop" S is min(H, W), the largest central square; with "pad" it is max(H, W), and the edge pixels are repeated
    on two sides. `dlfer.model.face_input.make_square` does the same in a network.
    """
    side = compute_side(*images.shape[1:3], aspect)
    return _cut_centre(images, side, side)


def _cut_centre(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crop images [N, H, W, ...] centrally to [N, height, width, ...]; pad smaller ones by repeating their edges."""
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
    """Convert `pixels` (uint8 [H, W, C]) to 1 or 3 channels: grey is repeated three times, RGB becomes its luma."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def match_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert images, uint8 [N, H, W] or [N, H, W, 1 or 3], to uint8 [N, H, W, channels].

    RGB becomes grey by the luma of ITU-R BT.601, rounded as in Pillow.

    Raises:
        ModelError: the images are of another dtype or shape.
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


_OPENING = threading.Lock()


_UNREADABLE_KINDS = {
    "empty": "the file is empty",
    "heif": "a HEIC picture, which needs a package: pip install pillow-heif",
    "raw": "a raw picture of a camera, which is not decoded: convert it to JPEG or PNG",
    "linear": "a high-dynamic-range picture (OpenEXR, Radiance), which is not decoded: map its tones and save it with 8 bits",
}


def open_undecoded(source: Path | io.BytesIO, formats: Sequence[str] = FORMATS) -> Image.Image:
    """Open an image file with Pillow without decoding its pixels and without a size limit.

    PAM and PFM files are an exception: OpenCV decodes them at once.

    Raises:
        DataError: the file is of a known but unsupported kind, e.g. a camera's raw image, or is a damaged PAM or PFM.
    """
    if isinstance(source, Path):
        suffix, kind = source.suffix.casefold(), find_kind(source)
        if suffix in _TGA_SUFFIXES:  # TGA has no signature, so only the suffix identifies it
            formats = (*formats, "TGA")
        if kind == "heif" and can_read_heif():
            formats = ("HEIF",)
        elif kind in _UNREADABLE_KINDS:
            raise DataError(f"{source}: {_UNREADABLE_KINDS[kind]}.")
        elif kind == "picture" and (converted := _read_by_opencv(source)) is not None:
            return converted
    with _OPENING:  # Pillow's limit is global to the process; _open checks ours before anything is decoded as well
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


_TGA_SUFFIXES = (".tga", ".icb", ".vda", ".vst")
_OPENCV_HEAD = re.compile(
    rb"PF\s+(\d{1,6})\s+(\d{1,6})\s|P7\n(?:[^\n]*\n)*?WIDTH (\d{1,6})\n(?:[^\n]*\n)*?HEIGHT (\d{1,6})\n"
)


def _read_by_opencv(path: Path) -> Image.Image | None:
    """Decode a format that OpenCV reads and Pillow does not: PAM, or colour PFM with values in 0..1; None for others.

    Neither is compressed, so the decoded image takes no more memory than the file is large.
    """
    with open(path, "rb") as stream:
        head = _OPENCV_HEAD.match(stream.read(600))
    if head is None:
        return None
    width, height = (int(number) for number in head.groups() if number is not None)
    if width * height > path.stat().st_size:
        raise DataError(f"{path}: found a header of {width} x {height} pixels, and fewer bytes. The file is cut short.")
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            f"{path}: PAM and PFM pictures are decoded by OpenCV, which cannot be imported ({error}). Save the picture as PNG, or install it: pip install 'opencv-python-headless<5'"
        ) from error
    found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype not in (np.uint8, np.float32):
        raise DataError(f"{path}: OpenCV cannot decode this PAM or PFM picture. Save it as PNG.")
    if found.dtype == np.float32:
        if not (np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
            raise DataError(
                f"{path}: found floating-point pixels beyond 0..1. Scale them, or save the picture with 8 bits."
            )
        found = _scale(found, 1.0)
    return Image.fromarray(found if found.ndim == 2 else np.ascontiguousarray(found[..., 2::-1]))


def _open(path: Path, max_pixels: int) -> Image.Image:
    """Open an image file and check the size in its header without decoding the pixels."""
    try:
        image = open_undecoded(path)
    except DataError as error:
        raise DataError(f"{error} Replace or delete it, or set data.skip_unreadable: true.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except Exception as error:  # header parsers also raise almost any exception
        raise DataError(
            f"{path}: not an image that can be read ({type(error).__name__}); expected JPEG, PNG, TIFF, WEBP, AVIF, "
            "JPEG 2000, BMP, GIF, PGM or another format of docs/images.md. Replace or delete it, or set data.skip_unreadable: true."
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise DataError(
            f"{path}: found {width} x {height} = {width * height:,} pixels, expected at most {max_pixels:,} "
            "(data.max_megapixels). Such a file can fill the memory; raise the limit if it is a photograph, shrink or "
            "delete it, or set data.skip_unreadable: true."
        )
    if min(width, height) < MIN_SIDE:
        image.close()
        raise DataError(
            f"{path}: found an image of {width} x {height} pixels, expected at least {MIN_SIDE} on each side. "
            "Replace or delete it, or set data.skip_unreadable: true."
        )
    return image


def check_side(width: int, height: int, name: str) -> None:
    """Raise DataError for a picture with a side below `MIN_SIDE`."""
    if min(width, height) < MIN_SIDE:
        raise DataError(
            f"{name}: found {width} x {height} pixels, expected at least {MIN_SIDE} on each side. Use a larger picture."
        )


def decode_pixels(image: Image.Image, name: str) -> np.ndarray:
    """Decode an opened image of any mode to upright pixels, uint8 [H, W, 1 or 3]; see `decode_upright`."""
    return to_array(decode_upright(image, name))


def decode_upright(image: Image.Image, name: str) -> Image.Image:
    """Decode an opened image of any mode to upright pixels with 8 bits per channel, as `to_array` expects them.

    For more than 8 bits per channel the range comes from the file: TIFF's BitsPerSample, SMaxSampleValue and
    MaxSampleValue, PNG's sBIT, the largest value that a PGM names. Without them only the upper 8 of 16 bits are kept,
    and floats must be in 0..1.

    Raises:
        DataError: the values are so small that the file probably holds 8 to 14 bits in 16; floats are not finite or not
            in 0..1; or the file needs OpenCV, which is missing or cannot decode it.
    """
    # A PSD's frame 1 is the composite image, the others are its layers; a HEIC file names its primary image.
    if image.tell() > 0 and image.format not in ("PSD", "HEIF"):
        image.seek(0)
    is_png = image.format == "PNG"
    bits = _read_significant_bits(image) if is_png else None
    key = image.info.get("transparency") if is_png else None
    tiles = getattr(image, "tile", ())
    rawmode = _find_rawmode(tiles[0][3]) if tiles else ""
    if is_png and rawmode in ("L;2", "L;4") and key is not None:  # Pillow scales the pixels to 0..255, but not the key
        image.info["transparency"] = key * (85 if rawmode == "L;2" else 17)
    is_ranged = bool(tiles) and tiles[0][0].startswith("ppm")
    deep_colour = "16" in rawmode and image.format not in ("SGI", "PSD") and image.mode in ("RGB", "RGBA", "RGBX", "LA")
    contents = _read_all(image) if deep_colour else b""
    image.load()
    turn = None if image.format == "TIFF" else find_transposition(image)  # Pillow applies a TIFF's orientation itself
    values = None
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
    elif deep_colour and (
        key is not None or bits not in (None, 16) or _find_largest(image) < 64 or _find_tag(image, _MAX_TAGS)
    ):
        values = _decode_deep(contents, name)
    if values is not None:
        white = 65535.0 if is_ranged else _find_white(image, values, bits, name)
        scaled = _scale(values, white)
        if key is not None:
            _clear_transparent(scaled, values, key)
        # With 8 bits Pillow inverts such images itself.
        is_negative = image.mode.startswith("I") and _find_tag(image, (_PHOTOMETRIC_TAG,)) == 0
        image = Image.fromarray(255 - scaled if is_negative else scaled)
    return image if turn is None else image.transpose(turn)


def _find_rawmode(parameters: object) -> str:
    """Return Pillow's raw mode from a decoder's parameters (the mode or a tuple that begins with it), "" if absent."""
    first = parameters[0] if isinstance(parameters, tuple) and parameters else parameters
    return first if isinstance(first, str) else ""


_BITS_TAG, _PHOTOMETRIC_TAG, _MAX_TAGS = 258, 262, (341, 281)
"""TIFF's BitsPerSample, PhotometricInterpretation (0: white is zero), and SMaxSampleValue, MaxSampleValue."""

_LEAST_OF_16_BITS = 1 << 14


def _find_tag(image: Image.Image, tags: Sequence[int]) -> float | None:
    """Return the largest value of the first of `tags` that a TIFF has; None without any of them."""
    found = getattr(image, "tag_v2", {})
    for tag in tags:
        if tag in found:
            return float(np.max(found[tag]))
    return None


def _find_white(image: Image.Image, values: np.ndarray, bits: int | None, name: str) -> float:
    """Return the pixel value of white; raise DataError if it is not in the file and a guess could be wrong."""
    if not np.isfinite(values).all():
        raise DataError(
            f"{name}: found pixels that are NaN or infinite, expected finite numbers. Save the picture with 8 bits."
        )
    least, most = float(values.min()), float(values.max())
    tagged = _find_tag(image, _MAX_TAGS)
    if tagged is not None and tagged >= most > 0 and least >= 0:
        return tagged
    if values.dtype.kind == "f":
        if least < 0 or most > 1:
            raise DataError(
                f"{name}: found floating-point pixels from {least:g} to {most:g}, expected 0..1 or the tag "
                "SMaxSampleValue. Scale them, or save the picture with 8 bits."
            )
        return 1.0
    depth = int(_find_tag(image, (_BITS_TAG,)) or 16)
    if 8 < depth < 16 and most < 1 << depth:
        return float((1 << depth) - 1)
    if bits is not None and bits < 16 and most < 1 << bits and not _fills_16_bits(values, bits):
        return float((1 << bits) - 1)
    if bits is not None and bits < 16:
        return 65535.0
    if least < 0 or most > 65535 or 0 < most < _LEAST_OF_16_BITS:
        raise DataError(
            f"{name}: found values from {least:,.0f} to {most:,.0f} in pixels of {max(16, depth)} bits, but no tag that "
            "says which value is white, so that a picture of 8 to 14 bits would become dark. Write the range "
            "into the file (TIFF: SMaxSampleValue; PNG: sBIT), or save the picture with 8 bits."
        )
    return 65535.0


def _fills_16_bits(values: np.ndarray, bits: int) -> bool:
    """Return whether values of `bits` significant bits are scaled to 16 as in PNG: shifted or repeated."""
    is_repeated = is_shifted = True
    for rows in _cut_rows(values):
        wide = rows.astype(np.int64)
        shifted = wide >> (16 - bits) << (16 - bits)
        is_shifted = is_shifted and np.array_equal(wide, shifted)
        is_repeated = is_repeated and np.array_equal(wide, shifted | (wide >> (16 - bits) >> max(0, 2 * bits - 16)))
    return is_repeated or is_shifted


def _scale(values: np.ndarray, white: float) -> np.ndarray:
    """Scale values in 0..white to uint8; integers are rounded down, so 16 bits keep their upper 8."""
    scaled = np.empty(values.shape, np.uint8)
    for rows, result in zip(_cut_rows(values), _cut_rows(scaled), strict=True):
        exact = rows.astype(np.float64)
        if values.dtype.kind == "f":
            result[...] = np.round(np.clip(exact / white, 0, 1) * 255)
        else:
            result[...] = np.clip(exact * 256 // (white + 1), 0, 255)
    return scaled


def _clear_transparent(scaled: np.ndarray, values: np.ndarray, key: int | tuple[int, int, int]) -> None:
    """Set to white, in place, the pixels whose 16-bit value is the transparent one (`key`) of a PNG's tRNS chunk."""
    for rows, result in zip(_cut_rows(values), _cut_rows(scaled), strict=True):
        same = rows == np.asarray(key)
        result[same if same.ndim == 2 else same.all(axis=-1)] = 255


def _cut_rows(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield blocks of rows (views of [H, W, ...]) of about a million values, so that wider copies stay small."""
    rows = max(1, 2**20 // max(1, values[0].size))
    for first in range(0, len(values), rows):
        yield values[first : first + rows]


def _find_largest(image: Image.Image) -> int:
    """Return the largest 8-bit value that Pillow decoded in a colour image, without alpha; 255 if it is black."""
    return max(high for _, high in image.convert("RGB").getextrema()) or 255


def _read_all(image: Image.Image) -> bytes:
    place = image.fp.tell()
    image.fp.seek(0)
    contents = image.fp.read()
    image.fp.seek(place)
    return contents


def _decode_deep(contents: bytes, name: str) -> np.ndarray:
    """Decode a file with 16 bits per channel, of which Pillow keeps only 8, to uint16 [H, W, 3] RGB without alpha."""
    try:
        import cv2
    except ImportError as error:
        raise DataError(
            f"{name}: a picture with 16 bits per channel and a value range of its own is decoded by OpenCV, which cannot be imported ({error}). Save the picture with 8 bits, or install it: pip install 'opencv-python-headless<5'"
        ) from error
    found = cv2.imdecode(np.frombuffer(contents, np.uint8), cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype != np.uint16 or found.ndim != 3:
        raise DataError(f"{name}: this picture with 16 bits per channel cannot be decoded. Save it with 8 bits.")
    return found[..., 2::-1] if found.shape[-1] >= 3 else np.repeat(found[..., :1], 3, axis=-1)


def _read_significant_bits(image: Image.Image) -> int | None:
    """Return the largest number in a PNG's sBIT chunk, None without one; the file position is restored."""
    place = image.fp.tell()
    image.fp.seek(8)
    found = None
    while len(head := image.fp.read(8)) == 8 and head[4:] not in (b"IDAT", b"IEND"):
        length = int.from_bytes(head[:4], "big")
        if head[4:] == b"sBIT" and 1 <= length <= 4:
            found = max(image.fp.read(length)) or None
            break
        image.fp.seek(length + 4, io.SEEK_CUR)
    image.fp.seek(place)
    return found


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a decoded 8-bit image to uint8 [H, W, 1 or 3], with transparency composited over white."""
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
"""CLAHE: clip limit, as a multiple of a grey level's mean count in a tile; tiles per side (12 px each for 48 px)."""


def equalize(image: np.ndarray, method: str) -> np.ndarray:
    """Equalize the grey levels of an image over the whole range; of a colour image the luma, with the chroma kept.

    Args:
        image: uint8 [H, W, 1 or 3].
        method: "histogram" (over the whole image), "clahe" (contrast-limited, in 4x4 tiles) or "none".

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
