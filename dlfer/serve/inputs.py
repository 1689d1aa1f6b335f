"""Reading and validating request bodies, which are kept in memory and never written to disk."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError

from dlfer.serve.limits import Budget, Limits, Refusal
from dlfer.serve.pool import Pool
from dlfer.serve.schemas import Picture64

_Asked = TypeVar("_Asked", bound=BaseModel)


@dataclass(frozen=True)
class Upload:
    """An uploaded file.

    Attributes:
        name: given by the client.
        contents: its bytes, or their base64 encoding.
        is_base64: whether `contents` is base64.
    """

    name: str
    contents: bytes | memoryview
    is_base64: bool = False


async def read_body(request: Request, limits: Limits, budget: Budget) -> tuple[bytes, int]:
    """Return the body of a request, and the amount taken from the budget, which the caller gives back.

    Raises:
        Refusal: 413 if it is too large: before anything is read if Content-Length says so, else as soon as the limit is
            exceeded; 408 if it does not arrive in time; 503 if all bodies together exceed the budget.
    """
    told = request.headers.get("content-length")
    if told is not None and told.isdecimal() and int(told) > limits.body_bytes:
        raise _too_large(limits)
    parts, size, taken = [], 0, 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                if not budget.take(len(part)):
                    raise Refusal(
                        503,
                        "The request bodies in progress take all memory reserved for them; try again later.",
                        retry_after=1,
                    )
                taken += len(part)
                parts.append(part)
    except BaseException as error:
        budget.give_back(taken)
        if isinstance(error, TimeoutError):
            raise Refusal(408, f"The body of the request did not arrive within {limits.seconds:g} seconds.") from error
        raise
    return b"".join(parts), taken


def _too_large(limits: Limits) -> Refusal:
    return Refusal(413, f"The body of the request is larger than {limits.body_bytes:,} bytes; shrink the pictures.")


class Parts:
    """The large parts extracted from a JSON body, see `dlfer.serve.worker.set_apart`."""

    def __init__(self, body: bytes, spans: Sequence[tuple[int, int]]) -> None:
        self._body, self._spans = memoryview(body), spans

    def find(self, text: Any) -> memoryview | None:
        """Return the part that a placeholder refers to; None if the string is not a placeholder."""
        number = text[1:] if isinstance(text, str) and text.startswith("@") else ""
        if not (number.isascii() and number.isdecimal() and len(number) < 4 and int(number) < len(self._spans)):
            return None
        return self._body[slice(*self._spans[int(number)])]

    def find_all(self, images: Sequence[Picture64]) -> list[Upload]:
        """Return the pictures of a JSON body as files."""
        return [
            Upload(image.name or f"image {number}", self.find(image.base64) or image.base64.encode(), is_base64=True)
            for number, image in enumerate(images, start=1)
        ]


async def read_json(body: bytes, kind: type[_Asked], pool: Pool) -> tuple[_Asked, Parts]:
    """Return a JSON body validated against a schema, and its large parts.

    Raises:
        Refusal: 400, with the first five problems.
    """
    spans, (rest,) = await pool.ask("json", [body])
    try:
        return kind.model_validate_json(bytes(rest)), Parts(body, spans)
    except ValidationError as error:
        raise Refusal(400, describe_problems(error)) from error


async def read_form(
    body: bytes, content_type: str, expected: Sequence[str], pool: Pool
) -> tuple[list[Upload], dict[str, str]]:
    """Return the files of a multipart body, and its fields by name.

    Args:
        body: of the request.
        content_type: its Content-Type header.
        expected: the names of the allowed fields; files, at least one, are called "file".
        pool: the workers that parse it.

    Raises:
        Refusal: 400 if it is malformed or has too many or unknown parts, 413 for a field that is too long.
    """
    (texts, files), _ = await pool.ask("form", [body], content_type=content_type)
    fields: dict[str, str] = {}
    for name, value in texts:
        if name in fields:
            raise Refusal(400, f"multipart/form-data: the field {name!r} occurs twice.")
        fields[name] = value
    unknown = {name[:60] for name in fields if name not in expected} | {
        name[:60] for name, _, _ in files if name != "file"
    }
    if unknown or not files:
        found = ", ".join(sorted(unknown)) or "no file"
        raise Refusal(
            400, f"multipart/form-data: found {found}, expected files called file, and {', '.join(expected)}."
        )
    whole = memoryview(body)
    return [
        Upload(name or f"image {number}", whole[slice(*span)]) for number, (_, name, span) in enumerate(files, start=1)
    ], fields


def describe_problems(error: ValidationError) -> str:
    """Return the problems in one line; never the values, which may be pictures."""
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    told = [
        f"{'.'.join(str(step)[:60] for step in one['loc']) or 'request body'}: {one['msg']}" for one in problems[:5]
    ]
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return "; ".join(told)[:1000] + more


def _tell_files(uploads: Sequence[Upload]) -> dict[str, Any]:
    return {"files": [(upload.name, upload.is_base64) for upload in uploads]}


async def measure_pictures(uploads: Sequence[Upload], pool: Pool) -> tuple[int, int]:
    """Return the total pixels of all files, and the bytes of memory that decoding them takes, from their headers.

    Raises:
        Refusal: 400 for invalid base64, 415 for a file that is not a picture, 413 for one that is too large.
    """
    value, _ = await pool.ask("measure", [upload.contents for upload in uploads], **_tell_files(uploads))
    return tuple(value)


async def decode_picture(upload: Upload, pool: Pool) -> np.ndarray:
    """Return a picture as uint8 [H, W, 3], upright.

    Raises:
        Refusal: 400 if the file is damaged.
    """
    size, (pixels,) = await pool.ask("decode", [upload.contents], **_tell_files([upload]))
    return np.frombuffer(pixels, np.uint8).reshape(*size, 3)


def check_faces(faces: str | None) -> str | None:
    """Return "auto", "whole" or None, as it was given."""
    if faces not in (None, "auto", "whole"):
        raise Refusal(400, f"faces: found {faces[:60]!r}, expected auto or whole.")
    return faces


def read_crops_flag(text: str | None) -> bool:
    """Return whether the field `crops` of a form is "true"; left out it is false."""
    if text not in (None, "true", "false"):
        raise Refusal(400, f"crops: found {text[:60]!r}, expected true or false.")
    return text == "true"


def read_face(text: str) -> int:
    """Return the number of a face."""
    if not text.isascii() or not text.isdecimal() or len(text) > 6:
        raise Refusal(400, f"face: found {text[:60]!r}, expected the number of a face, from 0.")
    return int(text)
