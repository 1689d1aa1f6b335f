"""The body of a request, as pictures; kept in memory from the first byte to the last."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dlfer.errors import DataError
from dlfer.predict.media import FORMATS, read_image
from dlfer.serve.limits import Limits, Refusal
from dlfer.serve.schemas import Picture64

_MOST_NAME = 200
_MOST_FIELDS, _FIELD_BYTES = 8, 1024
_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """A file that was sent.

    Attributes:
        name: as the client calls it.
        contents: undecoded.
    """

    name: str
    contents: bytes


class _MemoryParser(MultiPartParser):
    # Beyond this size a file is put on the disk; the limit of the body stands far below it.
    spool_max_size = 2**62


async def parse_form(
    body: bytes, headers: Headers, limits: Limits, expected: Sequence[str]
) -> tuple[list[Upload], dict[str, str]]:
    """Return the files of a multipart body and its texts by name; nothing of it is put on the disk.

    `expected` are the names of the texts; files, at least one, are called "file".

    Raises:
        Refusal: 400 where it is damaged, or has too many or other parts, 413 for a field that is too long.
    """

    async def stream() -> AsyncIterator[bytes]:
        yield body

    parser = _MemoryParser(
        headers, stream(), max_files=limits.pictures, max_fields=_MOST_FIELDS, max_part_size=_FIELD_BYTES
    )
    try:
        parsed = await parser.parse()
    except MultiPartException as error:
        status = 413 if error.message.startswith("Part exceeded") else 400
        raise Refusal(status, f"multipart/form-data: {error.message}") from error
    fields: dict[str, str] = {}
    uploads: list[Upload] = []
    unknown: set[str] = set()
    for name, value in parsed.multi_items():
        if isinstance(value, UploadFile):
            contents = await value.read()
            await value.close()
            uploads.append(Upload((value.filename or f"image {len(uploads) + 1}")[:_MOST_NAME], contents))
        elif name in fields:
            raise Refusal(400, f"multipart/form-data: the field {name[:_MOST_NAME]!r} stands there twice.")
        else:
            fields[name] = value
        if name not in (["file"] if isinstance(value, UploadFile) else expected):
            unknown.add(name[:60])
    if unknown or not uploads:
        found = ", ".join(sorted(unknown)) or "no file"
        raise Refusal(
            400, f"multipart/form-data: found {found}, expected files called file, and {', '.join(expected)}."
        )
    return uploads, fields


def parse_json(body: bytes, kind: type[_Body]) -> _Body:
    """Return a JSON body as a schema has it.

    Raises:
        Refusal: 400, with every problem.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise Refusal(400, describe_problems(error)) from error


def describe_problems(error: ValidationError) -> str:
    """Return what does not fit, in one line; never the values, which may be pictures."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    told = [f"{'.'.join(str(step)[:60] for step in one['loc']) or 'the body'}: {one['msg']}" for one in problems[:5]]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(told)[:1000] + more


def decode_base64(text: str, name: str) -> Upload:
    """Return the file that a text in base64 holds; a data: address is taken, too.

    Raises:
        Refusal: 400.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return Upload(name, base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{name}: not base64 ({error}).") from error


def count_pixels(uploads: Sequence[Upload], limits: Limits) -> int:
    """Return the pixels of all files together, by their headers; nothing is decoded.

    Raises:
        Refusal: 415 for what is no picture of a known type, 413 for too many pixels.
    """
    total = 0
    for upload in uploads:
        try:
            with Image.open(io.BytesIO(upload.contents), formats=FORMATS) as image:
                width, height = image.size
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _too_many_pixels(upload.name, f"more than {limits.pixels:,}", limits) from error
        except Exception as error:  # readers of damaged headers raise nearly anything
            raise Refusal(
                415, f"{upload.name}: not a picture that is read here; expected JPEG, PNG, WebP, BMP, GIF, PGM or PPM."
            ) from error
        total += width * height
        if total > limits.pixels:
            raise _too_many_pixels(upload.name, f"{width} x {height} = {width * height:,}", limits)
    return total


def decode_pictures(uploads: Sequence[Upload], limits: Limits) -> list[np.ndarray]:
    """Return the pictures as uint8 [H, W, 3], upright.

    Raises:
        Refusal: 400 for a damaged one.
    """
    try:
        return [
            read_image(upload.contents, name=upload.name, max_pixels=limits.pixels, max_bytes=limits.body_bytes)
            for upload in uploads
        ]
    except DataError as error:
        raise Refusal(400, str(error)) from error


def _too_many_pixels(name: str, found: str, limits: Limits) -> Refusal:
    return Refusal(
        413, f"{name}: found {found} pixels; a request may hold {limits.pixels:,} together. Shrink the picture."
    )


def decode_all(images: Sequence[Picture64]) -> list[Upload]:
    """Return the files of pictures in JSON."""
    return [decode_base64(image.base64, image.name or f"image {n}") for n, image in enumerate(images, start=1)]


def check_faces(faces: str | None) -> str | None:
    """Return "auto", "whole" or None, as it was given."""
    if faces not in (None, "auto", "whole"):
        raise Refusal(400, f"faces: found {faces[:60]!r}, expected auto or whole.")
    return faces


def read_face(text: str) -> int:
    """Return the number of a face."""
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise Refusal(400, f"face: found {text[:60]!r}, expected the number of a face, from 0.")
    return int(text)
