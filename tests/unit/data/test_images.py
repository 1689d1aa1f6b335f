"""Decoding one file: every mode gives uint8 [H, W, 1 or 3], and what cannot be trusted is refused."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from dlfer.data import images
from dlfer.data.files import find_rejection_reason
from dlfer.data.images import (
    CLIP_LIMIT,
    TILES,
    equalize,
    read_header,
    read_image,
    resize_all,
    resize_square,
    resize_to,
    to_channels,
)
from dlfer.errors import DataError, EnvironmentProblem
from dlfer.predict import media as predict_media
from dlfer.serve.limits import Limits
from dlfer.serve.worker import decode_picture


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def _write_png_header(path, width: int, height: int) -> None:
    """Write a PNG that claims to be width x height and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize(("shape", "expected"), [((10, 12), (10, 12, 1)), ((10, 12, 3), (10, 12, 3))])
@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "ppm"])
def test_lossless_formats_give_the_very_pixels(tmp_path, shape, expected, suffix):
    pixels = _noise(*shape)
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    found = read_image(path)
    assert found.dtype == np.uint8
    if suffix == "webp":  # WebP has no grey mode
        expected = (10, 12, 3)
        pixels = np.broadcast_to(pixels.reshape(10, 12, -1), expected)
    assert found.shape == expected
    assert np.array_equal(found, pixels.reshape(expected))
    assert read_header(path) == (12, 10, expected[-1] == 1)


def test_sixteen_bits_become_the_upper_eight(tmp_path):
    values = np.arange(100, dtype=np.uint16).reshape(10, 10) * 650
    Image.fromarray(values).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png")[..., 0], values >> 8)


def test_palette_gives_its_colours(tmp_path):
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, 200, 10, 30])
    image.save(tmp_path / "image.png")
    assert read_image(tmp_path / "image.png")[4, 4].tolist() == [200, 10, 30]


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "image.png")
    found = read_image(tmp_path / "image.png")
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[7, 7].tolist() == [255, 255, 255]


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "image.jpg", quality=95)
    red, green, blue = read_image(tmp_path / "image.jpg")[8, 8].tolist()
    assert red > 200
    assert max(green, blue) < 60


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("L", (10, 10), value) for value in (40, 250)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert np.unique(read_image(tmp_path / "image.gif")).tolist() == [40]


def test_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((10, 20), np.uint8)
    pixels[:, 10:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = tmp_path / "image.jpg"
    Image.fromarray(pixels).save(path, exif=exif)
    found = read_image(path)
    assert found.shape == (20, 10, 1)
    assert found[:8].mean() < 20
    assert found[12:].mean() > 235
    assert read_header(path) == (10, 20, True)


@pytest.mark.parametrize("keep", [30, 300, 900])
def test_truncated_or_corrupt_jpeg_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "happy_17.jpg"
    Image.fromarray(_noise(48, 48)).save(path)
    assert path.stat().st_size > keep
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"happy_17\.jpg.*skip_unreadable"):
        read_image(path)


def test_text_with_the_name_of_an_image_is_refused(tmp_path):
    (tmp_path / "image.jpg").write_text("<html>not found</html>")
    with pytest.raises(DataError, match="expected JPEG, PNG"):
        read_image(tmp_path / "image.jpg")


def test_formats_outside_the_list_are_refused(tmp_path):
    Image.fromarray(_noise(16, 16)).save(tmp_path / "image.png", format="PDF")
    with pytest.raises(DataError, match="expected JPEG, PNG"):
        read_image(tmp_path / "image.png")


@pytest.mark.parametrize("shape", [(1, 1), (7, 30)])
def test_tiny_images_are_refused(tmp_path, shape):
    Image.fromarray(_noise(*shape)).save(tmp_path / "image.png")
    with pytest.raises(DataError, match="expected at least 8 on each side"):
        read_image(tmp_path / "image.png")


def _make_png(pixels: np.ndarray, *, depth: int, key: int, sbit: bytes | None = None) -> bytes:
    """Return a PNG of `depth` bits, grey [H, W] or RGB [H, W, 3], whose chunk tRNS says that `key` is transparent."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, *colours = pixels.shape
    bits = pixels[..., None] >> np.arange(depth)[::-1] & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    head = struct.pack(">IIBBBBB", width, height, depth, 2 if colours else 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), chunk(b"tRNS", struct.pack(">H", key) * (3 if colours else 1))]
    chunks += [] if sbit is None else [chunk(b"sBIT", sbit)]
    chunks += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("depth", "colours"), [(1, ()), (2, ()), (4, ()), (8, ()), (16, ()), (8, (3,)), (16, (3,))])
def test_the_transparent_value_of_a_png_becomes_white_at_every_depth_in_every_reader(tmp_path, depth, colours):
    key = 20_000 if depth == 16 else (1 << depth) // 3
    pixels = np.full((8, 16, *colours), (1 << depth) - 1)
    pixels[:4] = key
    if depth == 16:
        pixels[0, 0], pixels[0, 1] = key + 1, (key & 0xFF) << 8  # equal to the key in the upper 8 bits; to its lower 8
    contents = _make_png(pixels, depth=depth, key=key)
    (tmp_path / "image.png").write_bytes(contents)
    expected = np.full((8, 16, *(colours or (1,))), 255)
    if depth == 16:
        expected[0, 0], expected[0, 1] = key >> 8, key & 0xFF
    found = read_image(tmp_path / "image.png")
    assert np.array_equal(found, expected)
    as_rgb = to_channels(found, 3)
    assert np.array_equal(predict_media.read_image(contents), as_rgb)
    assert np.array_equal(np.concatenate(list(decode_picture("x", contents, Limits())[1])), as_rgb)
    with Image.open(io.BytesIO(images.normalise_for_tensorflow(contents, "x"))) as plain:
        assert np.array_equal(to_channels(images.decode_pixels(plain, "x"), 3), as_rgb)


@pytest.mark.parametrize("colours", [(), (3,)], ids=["grey", "colour"])
def test_the_transparent_value_is_compared_before_sbit_scales_the_pixels(tmp_path, colours):
    pixels = np.full((8, 8, *colours), 600)
    pixels[0, 0] = 312
    path = tmp_path / "image.png"
    path.write_bytes(_make_png(pixels, depth=16, key=312, sbit=bytes([10] * (3 if colours else 1))))
    assert read_image(path)[0, :2, 0].tolist() == [255, 150]


def _write_sbit(path, values: np.ndarray, bits: int) -> None:
    """Write a PNG of 16 bits with the chunk sBIT."""
    Image.fromarray(values).save(path)
    data = path.read_bytes()
    body = b"sBIT" + bytes([bits])
    path.write_bytes(data[:33] + struct.pack(">I", 1) + body + struct.pack(">I", zlib.crc32(body)) + data[33:])


_RAMP = np.linspace(0, 4095, 40 * 30).reshape(30, 40).astype(np.uint16)
_EXPECTED = (_RAMP >> 4).astype(np.uint8)


def test_twelve_bits_in_sixteen_are_scaled_by_the_tags_and_refused_without(tmp_path):
    Image.fromarray(_RAMP).save(tmp_path / "a.tif", tiffinfo={341: 4095})
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], _EXPECTED)
    Image.fromarray(_RAMP).save(tmp_path / "max.tif", tiffinfo={281: 4095})
    assert np.array_equal(read_image(tmp_path / "max.tif")[..., 0], _EXPECTED)
    _write_sbit(tmp_path / "a.png", _RAMP, 12)
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0], _EXPECTED)
    _write_sbit(tmp_path / "wide.png", _RAMP << 4, 12)  # as PNG has it: scaled to 16 bits
    assert np.array_equal(read_image(tmp_path / "wide.png")[..., 0], _EXPECTED)
    for name in ("b.tif", "b.png"):
        Image.fromarray(_RAMP).save(tmp_path / name)
        with pytest.raises(DataError, match=r"values from 0 to 4,095 .* SMaxSampleValue; PNG: sBIT"):
            read_image(tmp_path / name)


def test_a_pgm_names_its_largest_value(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 40 30 4095\n" + _RAMP.astype(">u2").tobytes())
    assert np.abs(read_image(tmp_path / "a.pgm")[..., 0].astype(int) - _EXPECTED).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colour_of_twelve_bits_in_sixteen_is_refused_and_of_sixteen_is_read(tmp_path, suffix):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(tmp_path / f"a{suffix}"), np.stack([_RAMP] * 3, axis=-1))
    with pytest.raises(DataError, match="would become dark"):
        read_image(tmp_path / f"a{suffix}")
    full = np.stack([_RAMP << 4, _RAMP, _RAMP << 3], axis=-1)
    cv2.imwrite(str(tmp_path / f"b{suffix}"), full)
    assert np.array_equal(read_image(tmp_path / f"b{suffix}"), (full[..., ::-1] >> 8).astype(np.uint8))


def test_floats_are_read_in_0_to_1_and_by_their_tag(tmp_path):
    values = np.linspace(0, 1, 1200).reshape(30, 40).astype(np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0], np.round(values * 255).astype(np.uint8))
    assert read_header(tmp_path / "a.tif") == (40, 30, True)
    for scaled in (values * 3, values - 0.5, np.full_like(values, np.nan)):
        Image.fromarray(scaled).save(tmp_path / "b.tif")
        with pytest.raises(DataError, match=r"floating-point|NaN or infinite"):
            read_image(tmp_path / "b.tif")


def _write_psd(path, pixels, depth=8):
    """Write a Photoshop file without layers; Pillow has no writer."""
    height, width = pixels.shape[:2]
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, depth, 3) + bytes(14)
    path.write_bytes(head + np.moveaxis(pixels, -1, 0).astype(">u2" if depth == 16 else "u1").tobytes())


def _write_format(path, pixels):
    suffix = path.suffix
    if suffix == ".psd":
        _write_psd(path, pixels)
    elif suffix == ".dcx":
        Image.fromarray(pixels).save(path, format="PCX")
        path.write_bytes(struct.pack("<III", 0x3ADE68B1, 12, 0) + path.read_bytes())
    elif suffix in (".ras", ".pam"):
        assert cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1]))
    elif suffix == ".pfm":
        assert cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1] / np.float32(255)))
    else:
        Image.fromarray(pixels).save(path, format={".jfif": "JPEG", ".rgb": "SGI"}.get(suffix))


# fmt: off
SUFFIXES = [
    ".tif", ".avif", ".jp2", ".tga", ".jfif", ".ico", ".webp", ".psd", ".sgi", ".rgb", ".ras", ".dds", ".dcx", ".pcx", ".qoi", ".im", ".pam",
    ".pfm", ".bmp", ".ppm",
]
# fmt: on


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_formats_of_pillow_and_opencv_are_read_with_and_without_a_suffix(tmp_path, suffix):
    pixels = np.repeat(np.repeat(_noise(4, 4, 3), 8, axis=0), 8, axis=1)
    path = tmp_path / f"a{suffix}"
    _write_format(path, pixels)
    found = read_image(path)
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - pixels).mean() < 30
    assert read_header(path) == (32, 32, False)
    assert find_rejection_reason(path) is None
    if suffix != ".tga":  # which has no first bytes to be known by
        bare = path.rename(tmp_path / "bare")
        assert find_rejection_reason(bare) is None
        assert np.array_equal(read_image(bare), found)


@pytest.mark.parametrize("suffix", [".xbm", ".msp"])
def test_formats_of_one_bit_are_read(tmp_path, suffix):
    Image.new("1", (16, 12), 1).save(tmp_path / f"a{suffix}")
    assert read_image(tmp_path / f"a{suffix}").shape == (12, 16, 1)


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("a.nef", b"II*\0", "a raw picture of a camera, which is not decoded"),
        ("a.DNG", b"MM\0*", "a raw picture of a camera"),
        ("a.exr", b"\x76\x2f\x31\x01", "a high-dynamic-range picture"),
        ("a.png", b"#?RADIANCE\n", "a high-dynamic-range picture"),
    ],
)
def test_what_would_be_read_as_something_else_is_named(tmp_path, name, start, message):
    """The first picture in most raw files is a thumbnail; high-dynamic-range values without tone mapping are far darker than a photograph."""
    (tmp_path / name).write_bytes(start + bytes(600))
    with pytest.raises(DataError, match=message):
        read_image(tmp_path / name)


def test_headers_of_uncompressed_formats_cannot_ask_for_more_than_the_file(tmp_path):
    (tmp_path / "a.pam").write_bytes(b"P7\nWIDTH 90000\nHEIGHT 90000\nDEPTH 3\nMAXVAL 255\nENDHDR\n" + bytes(100))
    with pytest.raises(DataError, match="90000 x 90000 pixels, and fewer bytes"):
        read_image(tmp_path / "a.pam")
    values = np.full((8, 8, 3), 3.0, np.float32)
    assert cv2.imwrite(str(tmp_path / "b.pfm"), values)
    with pytest.raises(DataError, match=r"floating-point pixels beyond 0\.\.1"):
        read_image(tmp_path / "b.pfm")


def test_photoshop_files_of_16_bits_are_refused(tmp_path):
    _write_psd(tmp_path / "a.psd", _noise(12, 12, 3).astype(np.uint16) * 257, depth=16)
    with pytest.raises(DataError, match="not an image that can be read"):
        read_image(tmp_path / "a.psd")


@pytest.mark.parametrize("name", ["a.heic", "b.HIF", "photo.jpg", "bare"])
def test_heic_is_read_with_its_package(tmp_path, name):
    pillow_heif = pytest.importorskip("pillow_heif")
    pixels = np.repeat(np.repeat(_noise(4, 6, 3), 16, axis=0), 16, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.register_heif_opener()
    Image.fromarray(pixels).save(tmp_path / name, format="HEIF", quality=-1, exif=exif.tobytes())
    found = read_image(tmp_path / name)
    assert np.abs(found.astype(int) - np.rot90(pixels, 3)).mean() < 10
    assert read_header(tmp_path / name) == (64, 96, False)
    assert find_rejection_reason(tmp_path / name) is None


@pytest.mark.parametrize("suffix", [".tif", ".avif", ".jpg", ".png", ".webp"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_every_format_is_turned_upright_once(tmp_path, suffix, orientation):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=exif)
    found = read_image(tmp_path / f"a{suffix}")
    turns = {3: 2, 6: 3, 8: 1}[orientation]
    assert found.shape == np.rot90(pixels, turns).shape
    assert np.abs(found.astype(int) - np.rot90(pixels, turns)).mean() < 5
    assert read_header(tmp_path / f"a{suffix}")[:2] == found.shape[1::-1]


def test_large_photographs_are_read(tmp_path):
    Image.new("L", (10_000, 9_500), 90).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (9_500, 10_000, 1)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [30_000, 10_000, 7_100])
def test_an_image_bomb_is_refused_from_its_header(tmp_path, side):
    _write_png_header(tmp_path / "image.png", side, side)
    for read in (read_header, read_image):
        with pytest.raises(DataError, match=r"at most 50,000,000 \(data.max_megapixels\)"):
            read(tmp_path / "image.png", max_pixels=50_000_000)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_image(tmp_path / "image.png")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0\xff*\0\0\0\0\0\x08", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0II*"])
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path, exif):
    pixels = _noise(10, 12, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), pixels)
    assert read_header(tmp_path / "a.png") == (12, 10, False)


def test_resize_takes_the_central_square():
    pixels = np.zeros((20, 60, 1), np.uint8)
    pixels[:, 20:40] = 200
    assert np.unique(resize_square(pixels, 10)).tolist() == [200]
    assert resize_square(_noise(9, 9, 3), 16).shape == (16, 16, 3)


def _pad_by_pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Extend an image by copies of its outermost rows and columns, one by one."""
    image = Image.fromarray(pixels)
    top, left = (height - image.height) // 2, (width - image.width) // 2
    canvas = Image.new(image.mode, (width, height))
    for y in range(height):
        for x in range(width):
            place = min(max(x - left, 0), image.width - 1), min(max(y - top, 0), image.height - 1)
            canvas.putpixel((x, y), image.getpixel(place))
    return np.asarray(canvas)


@pytest.mark.parametrize("shape", [(30, 20, 3), (20, 31, 3), (8, 64, 3), (64, 8, 3), (19, 32, 1)])
def test_images_of_another_aspect_ratio_are_padded_or_cropped(shape):
    pixels = _noise(*shape)
    plain = pixels[..., 0] if shape[-1] == 1 else pixels
    side = max(shape[:2])
    padded = Image.fromarray(_pad_by_pillow(plain, side, side)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(resize_square(pixels, 16, "pad").reshape(16, 16, -1), np.asarray(padded).reshape(16, 16, -1))
    side = min(shape[:2])
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    part = Image.fromarray(plain).crop((left, top, left + side, top + side)).resize((16, 16), Image.Resampling.BILINEAR)
    assert np.array_equal(resize_square(pixels, 16).reshape(16, 16, -1), np.asarray(part).reshape(16, 16, -1))


def test_what_is_not_resized_to_a_square_keeps_its_aspect_ratio_too():
    """To 12 x 24: of 30 x 20 the central 10 x 20, or 30 x 60 around it."""
    pixels = _noise(30, 20, 3)
    part = Image.fromarray(pixels[10:20]).resize((24, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(resize_to(pixels, (12, 24)), np.asarray(part))
    padded = Image.fromarray(_pad_by_pillow(pixels, 30, 60)).resize((24, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(resize_to(pixels, (12, 24), "pad"), np.asarray(padded))
    images = _noise(2, 30, 20, 3)
    assert np.array_equal(resize_all(images, (12, 24), "pad")[1], resize_to(images[1], (12, 24), "pad"))
    assert resize_all(images, (30, 20)) is images


def test_channels_follow_the_luma():
    grey = _noise(8, 8, 1)
    assert np.array_equal(to_channels(grey, 3), np.repeat(grey, 3, axis=-1))
    rgb = _noise(8, 8, 3)
    expected = rgb @ np.array([0.299, 0.587, 0.114])
    assert np.abs(to_channels(rgb, 1)[..., 0] - expected).max() <= 1


def draw_grey(seed: int, shape=(48, 48)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ramp = np.linspace(rng.integers(0, 120), rng.integers(130, 255), shape[1])
    return (ramp + rng.normal(0, rng.uniform(1, 30), shape)).round().clip(0, 255).astype(np.uint8)


def equalize_by_definition(grey: np.ndarray, clip_limit: float | None) -> np.ndarray:
    """Map each grey level to the share of pixels that are as dark, after its count is limited (None: not limited)."""
    counts = np.bincount(grey.ravel(), minlength=256)
    if clip_limit is None:
        first = counts[grey.min()]
        return ((np.cumsum(counts) - first) * (255 / (grey.size - first)))[grey]
    limit = max(1, int(clip_limit * grey.size / 256))
    excess = np.maximum(counts - limit, 0).sum()
    return (np.cumsum(np.minimum(counts, limit) + excess / 256) * (255 / grey.size))[grey]


@pytest.mark.parametrize("seed", range(6))
def test_histogram_spreads_the_grey_levels(seed):
    grey = draw_grey(seed)
    expected = equalize_by_definition(grey, None)
    assert np.abs(equalize(grey[..., None], "histogram")[..., 0] - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_clahe_equalises_tiles_with_limited_contrast(seed):
    """An image of equal tiles has the same table in each, which no interpolation changes."""
    tile = draw_grey(seed, (128, 128))
    found = equalize(np.tile(tile, (TILES, TILES))[..., None], "clahe")[..., 0]
    expected = np.tile(equalize_by_definition(tile, CLIP_LIMIT), (TILES, TILES))
    # The excess is handed out in whole counts, of which one is worth 1/64 grey level.
    assert np.abs(found - expected).max() < 1.5


@pytest.mark.parametrize("method", ["none", "histogram", "clahe"])
def test_flat_images_and_forms(method):
    flat = np.full((20, 20, 1), 77, np.uint8)
    assert equalize(flat, method).shape == (20, 20, 1)
    assert np.ptp(equalize(flat, method)) == 0
    assert equalize(draw_grey(0).repeat(3).reshape(48, 48, 3), method).dtype == np.uint8
    # A view of every second pixel, as crops may be, and sides that the tiles do not divide.
    wide = draw_grey(1, (50, 94))[:, ::2, None]
    assert np.array_equal(equalize(wide, method), equalize(wide.copy(), method))


def test_colour_keeps_its_chroma():
    rng = np.random.default_rng(0)
    image = (draw_grey(0)[..., None] // 2 + rng.integers(60, 70, (1, 1, 3))).astype(np.uint8)
    evened = equalize(image, "histogram").astype(int)
    inside = (evened > 0).all(axis=-1) & (evened < 255).all(axis=-1)
    assert inside.mean() > 0.5
    difference = evened - image
    assert np.all(difference[inside] == difference[inside][:, :1])


def test_another_method_is_refused():
    with pytest.raises(DataError, match="found 'gamma', expected one of none, histogram, clahe"):
        equalize(np.zeros((8, 8, 1), np.uint8), "gamma")


def test_without_opencv_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    image = np.zeros((8, 8, 1), np.uint8)
    assert equalize(image, "none") is image
    with pytest.raises(EnvironmentProblem, match=r"needs OpenCV .*pip install 'opencv-python-headless<5'"):
        equalize(image, "clahe")


@pytest.mark.parametrize("name", ["a.heic", "photo.jpg", "no_suffix"])
def test_heic_is_named_for_what_it_is_whatever_its_name(tmp_path, name, monkeypatch):
    monkeypatch.setattr(images, "can_read_heif", lambda: False)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(DataError, match=r"a HEIC picture, which needs a package: pip install pillow-heif"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_and_palettes_with_transparency(tmp_path, kind):
    frames = [Image.new("RGBA", (20, 20), (255, 0, 0, 255)), Image.new("RGBA", (20, 20), (0, 0, 255, 255))]
    frames[0].paste((0, 0, 0, 0), (4, 0, 10, 20))
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(tmp_path / "a", format=kind, save_all=True, append_images=frames[1:], **options)
    found = read_image(tmp_path / "a")
    assert found.shape == (20, 20, 3)
    assert found[5, 5].tolist() == [255, 255, 255]
    assert found[5, 15].tolist() == [255, 0, 0]


@pytest.mark.parametrize("name", ["a.png", "b.heic", "c"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"the file is empty\. Replace or delete it"):
        read_image(tmp_path / name)


def test_the_length_of_a_file_is_not_taken_for_a_depth(tmp_path):
    """Of a TIFF and a JPEG 2000 Pillow's decoder gets a place or a length, in which 16 may occur."""
    path = tmp_path / "a.tif"
    for side in range(8, 60):
        dark = Image.fromarray(np.full((side, side, 3), 5, np.uint8))
        dark.save(path)
        assert read_image(path).max() == 5
    dark.save(path, tiffinfo={281: (255, 255, 255)})
    assert read_image(path).max() == 5


def test_a_tiff_in_which_zero_is_white_is_read_so(tmp_path):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    assert read_image(tmp_path / "a.tif")[..., 0].ravel().tolist() == (255 - (values >> 8)).ravel().tolist()
