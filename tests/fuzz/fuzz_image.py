"""Pictures that others made: mutations of every type that is read, of its header, its chunks and its pixels."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from random import Random

import numpy as np
import pytest
from PIL import Image

from dlfer.data.images import read_header, read_image
from dlfer.predict.media import read_image as read_picture

MAX_PIXELS = 300_000
NUMBERS = (0, 1, 7, 8, 48, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


TEXTS = [zlib.compress(b"x" * size) for size in (10, 2_000_000, 70_000_000)]


def save(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def make_pictures() -> dict[str, bytes]:
    """Return a small picture of each type and mode."""
    rng = np.random.default_rng(0)
    smooth = np.add.outer(np.arange(32), np.arange(40)) * 3
    rgb = Image.fromarray(np.stack([smooth, 255 - smooth, rng.integers(0, 256, smooth.shape)], -1).astype(np.uint8))
    grey = rgb.convert("L")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a comment"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 30.0)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 50}
    ink = rgb.quantize(16)
    pictures = {
        "jpeg": save(rgb, "JPEG", exif=exif, comment=b"hello"),
        "jpeg_progressive": save(rgb, "JPEG", progressive=True, quality=90, subsampling=0, restart_marker_blocks=2),
        "jpeg_grey": save(grey, "JPEG", icc_profile=bytes(range(256)) * 4),
        "jpeg_cmyk": save(rgb.convert("CMYK"), "JPEG"),
        "mpo": save(rgb, "MPO", save_all=True, append_images=[rgb.rotate(180)]),
        "png": save(rgb, "PNG", exif=exif),
        "png_grey": save(grey, "PNG", icc_profile=b"profile", transparency=3),
        "png_alpha": save(rgb.convert("RGBA"), "PNG"),
        "png_grey_alpha": save(rgb.convert("LA"), "PNG"),
        "png_palette": save(ink, "PNG", transparency=bytes(range(16))),
        "png_bits": save(rgb.convert("1"), "PNG"),
        "png_16": save(Image.fromarray((smooth * 90).astype(np.uint16)), "PNG"),
        "apng": save(rgb, "PNG", **frames),
        "webp": save(rgb, "WEBP", exif=exif),
        "webp_lossless": save(rgb.convert("RGBA"), "WEBP", lossless=True),
        "webp_frames": save(rgb, "WEBP", **frames),
        "gif": save(ink, "GIF", transparency=2, comment=b"hello"),
        "gif_frames": save(rgb, "GIF", **frames),
        "bmp": save(rgb, "BMP"),
        "bmp_palette": save(ink, "BMP"),
        "bmp_bits": save(rgb.convert("1"), "BMP"),
        "ppm": save(rgb, "PPM"),
        "pgm": save(grey, "PPM"),
        "pgm_plain": b"P2 # drawn\n12 9 255\n" + b" ".join(b"%d" % (value % 256) for value in range(108)),
        "pbm_plain": b"P1\n16 9\n" + b"01" * 72,
        "pgm_16": b"P5 12 9 65535\n" + bytes(range(216)),
        "pfm": b"Pf 12 9 -1.0\n" + np.arange(108, dtype="<f4").tobytes(),
        "tiff": save(rgb, "TIFF", exif=exif),
        "ico": save(rgb, "ICO"),
    }
    return pictures


PICTURES = make_pictures()
NAMES = sorted(PICTURES)


def change_bytes(contents: bytearray, random: Random) -> bytearray:
    """Change, cut, repeat, move or put in some bytes, in the first ones as often as in all."""
    size = random.choice((len(contents), min(len(contents), 64)))
    place, far = random.randrange(size + 1), random.randrange(len(contents) + 1)
    match random.randrange(9):
        case 0 if place < len(contents):
            contents[place] ^= 1 << random.randrange(8)
        case 1:
            contents[place : place + 1] = bytes([random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))])
        case 2:
            del contents[far:]
        case 3:
            del contents[place : place + random.choice((1, 2, 4, 16))]
        case 4:
            contents[place:place] = contents[far : far + random.randrange(1, 64)]
        case 5:
            contents[place:place] = random.randbytes(random.randrange(1, 16))
        case 6:
            form = random.choice((">H", "<H", ">I", "<I"))
            number = random.choice(NUMBERS) & ((1 << 8 * struct.calcsize(form)) - 1)
            contents[place : place + struct.calcsize(form)] = struct.pack(form, number)
        case 7:
            donor = PICTURES[random.choice(NAMES)]
            cut = random.randrange(len(donor))
            contents[place:] = donor[cut:]
        case _:
            contents += contents[far:] + random.randbytes(5)
    return contents


def split_png(contents: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 8 <= len(contents):
        (size,) = struct.unpack(">I", contents[place : place + 4])
        chunks.append((contents[place + 4 : place + 8], contents[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def change_png(contents: bytes, random: Random) -> bytearray:
    """Change a chunk of a PNG and set its checksum right, so that the change is seen."""
    chunks = split_png(contents)
    if not chunks:
        return bytearray(contents)
    number = random.randrange(len(chunks))
    kind, body = chunks[number]
    match random.randrange(6):
        case 0:
            chunks.insert(random.randrange(len(chunks)), (kind, body))
        case 1:
            del chunks[number]
        case 2:
            text = random.choice(TEXTS)
            new = random.choice(
                ((b"zTXt", b"a\0\0" + text), (b"iCCP", b"a\0\0" + text), (b"iTXt", b"a\0\1\0\0\0" + text))
            )
            chunks.insert(1, new)
        case 3:
            chunks.insert(1, (b"eXIf", random.choice((b"II*\0\x08\0\0\0", b"MM\0*", b"")) + random.randbytes(30)))
        case 4:
            chunks[number] = (
                random.choice((b"IDAT", b"PLTE", b"tRNS", b"fcTL", b"acTL", b"fdAT", b"gAMA", b"pHYs")),
                body,
            )
        case _:
            chunks[number] = (kind, bytes(change_bytes(bytearray(body), random)))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, body in chunks:
        parts += [struct.pack(">I", len(body)), kind, body, struct.pack(">I", zlib.crc32(kind + body))]
    return bytearray(b"".join(parts))


def change_segment(contents: bytearray, random: Random) -> bytearray:
    """Change the body of a segment of a JPEG: tables, frame, EXIF."""
    places, place = [], 2
    while place + 4 <= len(contents) and contents[place] == 0xFF and contents[place + 1] != 0xDA:
        (size,) = struct.unpack(">H", contents[place + 2 : place + 4])
        places.append((place + 4, max(place + 4, place + 2 + size)))
        place += 2 + size
    if not places:
        return contents
    start, end = random.choice(places)
    body = change_bytes(contents[start:end], random)[:65000]
    contents[start - 2 : end] = struct.pack(">H", len(body) + 2) + body
    return contents


def damage(changes: list[Random]) -> bytes:
    contents = bytearray(PICTURES[changes[0].choice(NAMES)] if changes else PICTURES["jpeg"])
    for random in changes[1:]:
        if contents[:4] == b"\x89PNG" and random.randrange(3):
            contents = change_png(bytes(contents), random)
        elif contents[:2] == b"\xff\xd8" and random.randrange(2):
            contents = change_segment(contents, random)
        else:
            contents = change_bytes(contents, random)
    return bytes(contents)


@pytest.fixture(autouse=True)
def no_warnings():
    """Pillow warns of damaged EXIF data; that is no matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_pictures_of_strangers(try_many):
    def read(changes: list[Random]) -> bool:
        pixels = read_picture(damage(changes), max_pixels=MAX_PIXELS)
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= 8
        assert pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS
        return True

    assert try_many(read)["accepted"] > 0


def test_images_to_train_on(try_many, tmp_path):
    path = tmp_path / "image"

    def read(changes: list[Random]) -> bool:
        path.write_bytes(damage(changes))
        width, height, _ = read_header(path)
        if width * height > MAX_PIXELS:
            return False
        pixels = read_image(path)
        assert pixels.dtype == np.uint8
        assert pixels.shape[2] in (1, 3)
        assert sorted(pixels.shape[:2]) == sorted((height, width))
        return True

    assert try_many(read)["accepted"] > 0
