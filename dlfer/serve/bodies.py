"""The body of a request, by the type that it has, and what is asked for in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from dlfer.serve.inputs import Form, Upload, decode_base64, get_content_type, parse_form, parse_json
from dlfer.serve.limits import Refusal, read_body
from dlfer.serve.schemas import Picture64
from dlfer.serve.service import Service

_Asked = TypeVar("_Asked", bound=BaseModel)


class Body:
    """The body of a request in memory, which is given back at the end."""

    def __init__(self, request: Request, service: Service) -> None:
        self._request = request
        self._service = service
        self._taken = 0
        self.is_form = get_content_type(request) == "multipart/form-data"

    async def __aenter__(self) -> Body:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._service.bytes.give_back(self._taken)

    async def _read(self) -> bytes:
        body, self._taken = await read_body(self._request, self._service.limits, self._service.bytes)
        return body

    async def read_form(self, file_field: str, *, fields: Sequence[str]) -> Form:
        """Return a multipart body that has nothing but files called `file_field`, at least one, and `fields`."""
        form = await parse_form(await self._read(), self._request.headers, self._service.limits)
        unknown = {name for name, _ in form.files} - {file_field} | set(form.fields) - set(fields)
        if unknown or not form.files:
            found = ", ".join(sorted(name[:60] for name in unknown)) or "no file"
            raise Refusal(
                400, f"multipart/form-data: found {found}, expected files called {file_field}, and {', '.join(fields)}."
            )
        return form

    async def read_json(self, kind: type[_Asked]) -> _Asked:
        """Return a JSON body as a schema has it."""
        if get_content_type(self._request) != "application/json":
            raise Refusal(415, "The body is neither multipart/form-data (where that is taken) nor application/json.")
        body = await self._read()
        return await self._service.run(lambda: parse_json(body, kind))


def decode_all(images: Sequence[Picture64]) -> list[Upload]:
    """Return the files of pictures in JSON."""
    named = name_uploads([Upload(image.name, b"") for image in images])
    return [decode_base64(image.base64, upload.name) for image, upload in zip(images, named, strict=True)]


def name_uploads(uploads: Sequence[Upload]) -> list[Upload]:
    """Return files that all have a name."""
    return [
        upload if upload.name else Upload(f"image {number}", upload.contents)
        for number, upload in enumerate(uploads, start=1)
    ]


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
