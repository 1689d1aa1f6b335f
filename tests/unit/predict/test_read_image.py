"""Pictures of every known type and orientation read alike; bombs, damage and other types refused."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from dlfer.errors import DataError
from dlfer.predict.media import read_image

RED_CORNER = np.zeros((20, 30, 3), np.uint8)
RED_CORNER[:10, :10, 0] = 255


def encode(pixels: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(stream, kind, **options)
    return stream.getvalue()


def make_png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "PPM", "WEBP", "JPEG"])
def test_every_type_gives_the_same_rgb(kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    pixels = read_image(encode(RED_CORNER, kind, **options))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (20, 30, 3)
    assert np.abs(pixels.astype(int) - RED_CORNER).max() <= (30 if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_as_pillow_applies_it(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    contents = encode(RED_CORNER, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(contents))))
    assert np.array_equal(read_image(contents), expected)
    assert expected.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))


def test_damaged_exif_leaves_the_picture_as_it_is():
    contents = encode(RED_CORNER, "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 20)
    assert read_image(contents).shape == (20, 30, 3)


def test_grey_palette_16_bits_and_transparency():
    grey = np.tile(np.arange(0, 240, 12, dtype=np.uint8), (20, 1))
    assert np.array_equal(read_image(encode(grey, "PNG")), np.repeat(grey[..., None], 3, axis=-1))
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 17)
    assert np.array_equal(read_image(encode(deep, "PNG"))[..., 0], grey)
    clear = np.zeros((20, 30, 4), np.uint8)
    clear[:, 15:] = (0, 0, 255, 255)
    pixels = read_image(encode(clear, "PNG"))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 29].tolist() == [0, 0, 255]


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((20, 20), value, np.uint8)) for value in (10, 200)]
    assert (read_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:])) == 10).all()


@pytest.mark.parametrize("side", [(20_000, 10_000), (50_000, 50_000)])
def test_a_bomb_is_refused_by_its_header(side):
    with pytest.raises(DataError, match="pixels"):
        read_image(make_png_header(*side))


def test_limits_name_and_paths(tmp_path):
    contents = encode(RED_CORNER, "PNG")
    with pytest.raises(DataError, match=r"upload 3: found 30 x 20 = 600 pixels, expected at most 599"):
        read_image(contents, name="upload 3", max_pixels=599)
    with pytest.raises(DataError, match="bytes"):
        read_image(contents, max_bytes=len(contents) - 1)
    path = tmp_path / "face.jpg"
    path.write_bytes(contents)  # a PNG by another name
    assert read_image(path, max_bytes=len(contents)).shape == (20, 30, 3)
    for source, problem in (
        (tmp_path / "absent.png", "there is no such file"),
        (tmp_path, "not a file"),
        ("a\0b.png", "cannot be read"),
        (b"", "empty"),
        (b"just text\n", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (encode(RED_CORNER, "TIFF"), "not a picture"),
        (encode(np.zeros((7, 30), np.uint8), "PNG"), "at least 8"),
        (contents[: len(contents) // 2], "cannot be decoded|not a picture"),
    ):
        with pytest.raises(DataError, match=problem) as caught:
            read_image(source)
        # What is wrong is said in words, not by classes or addresses in memory.
        assert not re.search(r"\w+Error\b|0x[0-9a-f]{6}", str(caught.value))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_that_is_cut_short_is_said_to_be(tmp_path, form):
    contents = encode(np.random.default_rng(0).integers(0, 256, (99, 99, 3)).astype(np.uint8), form)
    (tmp_path / "a.jpg").write_bytes(contents[: len(contents) // 2])
    with pytest.raises(DataError, match=r"a\.jpg: the picture cannot be decoded \(.*truncated"):
        read_image(tmp_path / "a.jpg")
