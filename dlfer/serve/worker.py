"""The worker process that parses and decodes untrusted input: JSON, forms, tensors and pictures. It may be killed at any time.

`dlfer.serve.pool` starts it as `python -m dlfer.serve.worker LIMITS`. Each request on stdin and each reply on stdout is a line of JSON,
followed by byte strings whose sizes the line gives; pickles are never used. The processor time of each request and the memory
of the process are limited by the kernel. The process imports neither the web framework nor a model runtime.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image
from python_multipart.multipart import parse_options_header

from dlfer.data.files import can_read_heif, is_heif
from dlfer.data.images import decode_upright, open_undecoded, to_array, to_channels
from dlfer.errors import DataError
from dlfer.predict.media import check_size
from dlfer.serve.limits import BYTES_PER_PIXEL, Limits, Refusal

MAX_ITEMS, MAX_DEPTH, MAX_NUMBER = 4096, 16, 40
"""Limits of a JSON body: tokens, nesting, and characters of a number. An array of integers under a key `data` counts as one value."""
LONG_TEXT, MAX_LONG, MAX_REMAINDER = 2048, 64, 2**18
"""Minimum length in bytes of a string that is extracted, maximum number of such strings, maximum size in bytes of the rest."""
MAX_NAME = 200
_MAX_FIELDS, _FIELD_BYTES, _HEAD_BYTES = 8, 1024, 8192
_PPM_HEAD = 1024
_STRIP_BYTES = 2**22
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "PPM")
"""Pillow's names of the formats that a server decodes, besides HEIF if pillow-heif is installed; `dlfer predict` reads more, with
decoders whose cost is not bounded."""

Span = tuple[int, int]
Parts = Sequence[bytes | memoryview]
"""The byte strings of a request to a worker."""


def extract_large_parts(body: bytes, mark: str = "@") -> tuple[bytes, list[Span]]:
    """Return a JSON body without its large parts, and the spans of these in the body, without parsing it into objects.

    Long strings under a key `base64` or `data` are replaced by "@0", "@1" ..., and arrays of integers under a key `data` by
    ["@2"]. What remains is small and can be parsed at a bounded cost. The span of a string excludes its quotes.

    Args:
        body: of the request.
        mark: ASCII, in place of "@"; one that the client cannot know, or its own strings could be taken for placeholders.

    Raises:
        Refusal: 400 if it is nested too deeply, has too many values or a long string under another key, or is not valid JSON.
    """
    rest: list[bytes] = []
    spans: list[Span] = []
    place = depth = items = kept = 0
    key = token = b""
    is_data = False
    while place < len(body):
        found = _TOKEN.match(body, place)
        if found is None:
            if body[place:].strip(b" \t\r\n"):
                raise Refusal(
                    400,
                    f"The request body is not valid JSON: the string that starts at byte {place:,} is not terminated.",
                )
            break
        first, place = found.span(1)
        items += 1
        before, token = token, body[first : min(place, first + LONG_TEXT + 3)]
        if token == b"[":
            end = _find_numbers_end(body, first) if is_data else 0
            if end:
                token, place = f'["{mark}{len(spans)}"]'.encode(), end
                spans.append((first, end))
        if token in (b"[", b"{"):
            depth += 1
        elif token in (b"]", b"}"):
            depth -= 1
        elif token == b":":
            key = before
        elif token[:1] == b'"' and place - first > LONG_TEXT:
            if key not in (b'"base64"', b'"data"'):
                raise Refusal(
                    400,
                    f"JSON: the string that starts at byte {first:,} has {place - first - 2:,} bytes; expected at most "
                    f"{LONG_TEXT - 2:,}, except under base64 and data.",
                )
            token = f'"{mark}{len(spans)}"'.encode()
            spans.append((first + 1, place - 1))
        elif token[:1] != b'"' and len(token) > MAX_NUMBER:
            raise Refusal(
                400,
                f"The request body is not valid JSON: at byte {first:,} there is a literal of {len(token):,} characters or "
                f"more; expected a number of at most {MAX_NUMBER}, true, false or null.",
            )
        # A colon keeps the flag that the key before it set.
        is_data = token == b'"data"' or (is_data and token == b":")
        kept += len(token)
        if depth > MAX_DEPTH or items > 3 * MAX_ITEMS or len(spans) > MAX_LONG or kept > MAX_REMAINDER:
            raise Refusal(
                400,
                f"JSON: expected at most {MAX_DEPTH} levels of nesting, {MAX_ITEMS:,} values and {MAX_LONG} long strings; "
                "found more of one of them (an array of integers in data counts as one value).",
            )
        # Adjacent literals are invalid JSON; keep them apart, so that they do not merge into one valid literal.
        rest += [b" ", token] if not (before[:1] in _NO_LITERAL or token[:1] in _NO_LITERAL) else [token]
    return b"".join(rest), spans


def check_keys(rest: bytes) -> None:
    """Raise a Refusal (400) if an object in JSON without its large parts has a key twice; invalid JSON is left to the reader."""

    def check(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Refusal(400, f"JSON: the key {name[:60]!r} occurs twice in one object; expected each key once.")
            seen.add(name)

    with contextlib.suppress(ValueError):
        json.loads(rest.decode("utf-8"), object_pairs_hook=check)


_NO_LITERAL = b'"[]{},:'
_TOKEN = re.compile(rb'[ \t\r\n]*+("(?:[^"\\]++|\\.)*+"|[\[\]{},:]|[^ \t\r\n"\[\]{},:]++)', re.DOTALL)
_NUMBERS = re.compile(rb"\[[0-9, \t\r\n\[\]]*+")


def _find_numbers_end(body: bytes, first: int) -> int:
    """Return the end of the array of integers that starts at the byte `first`; 0 if it contains anything else."""
    end = _NUMBERS.match(body, first).end()
    end = body.rfind(b"]", first, end) + 1
    is_whole = end and body.count(b"[", first, end) == body.count(b"]", first, end)
    return end if is_whole and _AFTER.match(body, end) else 0


_AFTER = re.compile(rb"[ \t\r\n]*+[,}]")


def read_tensor(text: bytes, shape: Sequence[int]) -> np.ndarray:
    """Parse a JSON array of integers 0..255, flat or nested, into a uint8 array of the given shape.

    Raises:
        Refusal: 400 if a value is out of range, or if the number of values or the nesting does not fit the shape.
    """
    wrong = Refusal(
        400, f"images: expected {math.prod(shape):,} integers 0..255 for the shape {list(shape)}, flat or nested."
    )
    skeleton = text.translate(None, b"0123456789 \t\r\n")
    count = math.prod(shape)
    # Each number takes at least a digit and a comma; this is checked before anything is allocated.
    if len(text) < 2 * count or len(skeleton) > 8 * count + 8:
        raise wrong
    if skeleton != b"[" + b"," * (count - 1) + b"]" and skeleton != _make_skeleton(shape):
        raise wrong
    numbers = text.translate(None, b"[] \t\r\n")
    if _NO_NUMBER.search(text) or _NO_NUMBER_LEFT.search(numbers):
        raise wrong
    try:
        values = np.fromstring(numbers.decode("ascii"), dtype=np.int16, sep=",")
    except (ValueError, DeprecationWarning) as error:
        raise wrong from error
    if values.size != count or values.max() > 255:
        raise wrong
    return values.astype(np.uint8).reshape(shape)


_NO_NUMBER = re.compile(rb"[0-9][ \t\r\n]+[0-9]")
"""Two numbers without a comma in between."""
_NO_NUMBER_LEFT = re.compile(rb"[0-9]{4}|\b0[0-9]|,,|^,|,$")
"""Four digits, a leading zero, or a missing number."""


def _make_skeleton(shape: Sequence[int]) -> bytes:
    """Return the brackets and commas of a nested JSON array of the given shape."""
    drawn = b""
    for size in reversed(shape):
        drawn = b"[" + b",".join([drawn] * size) + b"]"
    return drawn


def split_form(
    body: bytes, content_type: str, *, files: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str, Span]]]:
    """Return the fields (name, value) and the files (name, file name, span) of a multipart body; contents are not copied.

    Args:
        body: of the request.
        content_type: its Content-Type header, with the boundary.
        files: maximum number of files.

    Raises:
        Refusal: 400 if it is malformed or has too many parts, 413 for a field that is too long.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not 0 < len(boundary) <= 256:
        raise Refusal(400, "multipart/form-data: the Content-Type header has no valid boundary.")
    mark = b"--" + boundary
    place = 0 if body.startswith(mark) else body.find(b"\r\n" + mark) + 2
    if place == 1:
        raise Refusal(400, "multipart/form-data: the boundary of the Content-Type header does not occur in the body.")
    texts: list[tuple[str, str]] = []
    found: list[tuple[str, str, Span]] = []
    place += len(mark)
    while body[place : place + 2] == b"\r\n":
        if len(texts) + len(found) >= files + _MAX_FIELDS:
            raise Refusal(400, f"multipart/form-data: found more than {files} files and {_MAX_FIELDS} fields.")
        head_end = body.find(b"\r\n\r\n", place, place + _HEAD_BYTES)
        end = body.find(b"\r\n" + mark, max(place, head_end + 2)) if head_end >= 0 else -1
        if end < 0:
            raise Refusal(400, "multipart/form-data: a part has no headers, more than 8 kB of headers, or no end.")
        _read_part(body, (place + 2, head_end), (head_end + 4, max(end, head_end + 4)), texts, found)
        place = end + 2 + len(mark)
    if body[place : place + 2] != b"--":
        raise Refusal(400, "multipart/form-data: the body does not end with the closing boundary.")
    if len(found) > files or len(texts) > _MAX_FIELDS:
        raise Refusal(400, f"multipart/form-data: found more than {files} files or {_MAX_FIELDS} fields.")
    return texts, found


def _read_part(
    body: bytes, head: Span, contents: Span, texts: list[tuple[str, str]], found: list[tuple[str, str, Span]]
) -> None:
    """Add a part of a form to the fields or to the files."""
    options: Mapping[bytes, bytes] = {}
    for line in body[slice(*head)].split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-disposition":
            kind, options = parse_options_header(value.strip())
            if kind.lower() != b"form-data":
                options = {}
    if b"name" not in options:
        raise Refusal(400, "multipart/form-data: a part has no name (Content-Disposition: form-data; name=...).")
    name = options[b"name"].decode("utf-8", "replace")
    if b"filename" in options:
        found.append((name[:MAX_NAME], options[b"filename"].decode("utf-8", "replace")[:MAX_NAME], contents))
    elif contents[1] - contents[0] > _FIELD_BYTES:
        raise Refusal(413, f"multipart/form-data: the field {name[:MAX_NAME]!r} is longer than {_FIELD_BYTES:,} bytes.")
    else:
        texts.append((name[:MAX_NAME], body[slice(*contents)].decode("utf-8", "replace")))


def decode_base64(text: bytes, name: str) -> bytes:
    """Return the bytes of a base64 string, in the variants that clients send.

    The string may be a data URL (of any case, also percent-encoded), use the URL-safe alphabet, contain white space and lack its
    padding. JSON escapes have not been resolved yet.

    Raises:
        Refusal: 400 if it is not valid base64.
    """
    try:
        if b"\\" in text:
            text = json.loads(b'"' + text + b'"', strict=False).encode()
        text = text.strip()
        if text[:5].lower() == b"data:":
            text = unquote_to_bytes(text.partition(b",")[2])
        text = text.translate(_ALPHABET, b" \t\r\n\f\v").rstrip(b"=")
        if not text:
            raise ValueError("it is empty")
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{name}: not valid base64 ({' '.join(str(error).split())[:80]}).") from error


_ALPHABET = bytes.maketrans(b"-_", b"+/")


def measure_pictures(files: Sequence[tuple[str, bytes]], limits: Limits) -> tuple[int, int]:
    """Return the total pixels of all files, and the bytes of memory that decoding them takes, from their headers alone.

    Raises:
        Refusal: 415 for a file that is not a picture of a supported format, 413 for too many pixels or too much memory.
    """
    pixels = result = most = 0
    for name, contents in files:
        with _open(name, contents) as image:
            size = image.width * image.height
            each = _count_bytes(image)
            allowed = min(limits.pixels, limits.decode_bytes // each)
            pixels += size
            if pixels > limits.pixels or size > allowed:
                raise Refusal(
                    413,
                    f"{name}: found {image.width} x {image.height} = {size:,} pixels; a request may hold "
                    f"{limits.pixels:,} together, and a picture of this kind {allowed:,}. Shrink the picture.",
                )
            result, most = result + 3 * size, max(most, (each - 3) * size)
    if result + most > limits.decode_bytes:
        # The budget could never provide this much, and every later request would wait behind this one.
        raise Refusal(
            413,
            f"pictures: decoding the {len(files)} files takes {result + most:,} bytes of memory, and a request may take "
            f"{limits.decode_bytes:,}. Send fewer at a time, or shrink them.",
        )
    return pixels, result + most


def _open(name: str, contents: bytes) -> Image.Image:
    formats = FORMATS
    if is_heif(contents[:600]):
        if not can_read_heif():
            raise Refusal(
                415,
                f"{name}: a HEIC picture, which needs a package on the server: pip install pillow-heif. Or send a JPEG.",
            )
        formats = ("HEIF",)
    try:
        if contents[:1] == b"P" and contents[1:2].isdigit() and not _PPM.match(contents[:_PPM_HEAD]):
            raise ValueError("no header, or a very long one")
        return open_undecoded(io.BytesIO(contents), formats)
    except Exception as error:  # Pillow raises almost any exception for damaged headers
        raise Refusal(
            415, f"{name}: not a picture in a supported format; expected JPEG, PNG, WebP, BMP, GIF, PBM, PGM or PPM."
        ) from error


_GAP = rb"(?:[ \t\r\n\f\v]|#[^\r\n]*+[\r\n])++"
_PPM = re.compile(rb"P[1-6](?:" + _GAP + rb"[0-9]{1,10}){2}")
"""The header of a PPM up to its size. Pillow reads comments byte by byte, which takes seconds for one of 19 MB."""


def _count_bytes(image: Image.Image) -> int:
    """Return the measured maximum of bytes per pixel for decoding, including the decoder's memory and the result."""
    rawmode = str(image.tile[0][3]) if image.tile else ""
    if image.format == "HEIF":
        return (3 if image.info["bit_depth"] > 8 else 2) * BYTES_PER_PIXEL
    if image.format == "WEBP" or image.mode[:1] in "IF":
        return 2 * BYTES_PER_PIXEL
    if "16" in rawmode:  # 16 bits per channel, which OpenCV decodes a second time
        return 3 * BYTES_PER_PIXEL
    return 12 if image.info.get("progressive") else BYTES_PER_PIXEL


def decode_picture(name: str, contents: bytes, limits: Limits) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """Return (height, width) of an upright picture, and an iterator over its rows, uint8 [n, W, 3] each.

    Raises:
        Refusal: 400 if the file is damaged.
    """
    image = _open(name, contents)
    try:
        check_size(image.size, name, limits.pixels)
        image = decode_upright(image, name)
        width, height = image.size
        rows = max(1, _STRIP_BYTES // (3 * width))
        to_array(image.crop((0, 0, width, 1)))
    except DataError as error:
        raise Refusal(400, str(error)) from error
    except Exception as error:  # decoders raise almost any exception for damaged files
        raise Refusal(400, f"{name}: the picture cannot be decoded ({type(error).__name__}); save it again.") from error
    return (height, width), (
        to_channels(to_array(image.crop((0, first, width, min(height, first + rows)))), 3)
        for first in range(0, height, rows)
    )


def answer(task: str, given: dict[str, Any], parts: Parts, limits: Limits) -> tuple[Any, Sequence[int], Iterator[Any]]:
    """Return the reply to a request: a JSON value, the sizes of the byte strings that follow it, and these strings."""
    if task == "json":
        rest, spans = extract_large_parts(parts[0], given["mark"])
        check_keys(rest)
        return spans, [len(rest)], iter([rest])
    if task == "tensor":
        tensor = read_tensor(parts[0], given["shape"])
        return None, [tensor.nbytes], iter([tensor])
    if task == "form":
        return split_form(parts[0], given["content_type"], files=limits.pictures), [], iter([])
    files = [
        (name, decode_base64(part, name) if is_base64 else part)
        for (name, is_base64), part in zip(given["files"], parts, strict=True)
    ]
    if task == "measure":
        return measure_pictures(files, limits), [], iter([])
    size, rows = decode_picture(*files[0], limits)
    return size, [3 * math.prod(size)], rows


def read_frame(stream: BinaryIO) -> tuple[dict[str, Any], list[bytes]] | None:
    """Return a line of JSON and the byte strings that follow it; None at the end of the stream."""
    line = stream.readline()
    if not line:
        return None
    head = json.loads(line)
    return head, [stream.read(size) for size in head["sizes"]]


def main() -> None:
    """Process requests until stdin ends."""
    limits = Limits(**json.loads(sys.argv[1]))
    stdin, stdout = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # what a library prints must not mix with replies
    _limit_process(limits)
    Image.preinit()
    while (frame := read_frame(stdin)) is not None:
        signal.setitimer(signal.ITIMER_PROF, limits.read_seconds)
        head, parts = frame
        del frame
        try:
            value, sizes, payload = answer(head["task"], head["given"], parts, limits)
        except Refusal as error:
            value, sizes, payload = {"status": error.status, "error": str(error)}, [], iter([])
        except MemoryError:
            value, sizes, payload = (
                {"status": 413, "error": "Reading the request takes more memory than the limit allows."},
                [],
                iter([]),
            )
        stdout.write(json.dumps({"value": value, "sizes": list(sizes)}).encode() + b"\n")
        for part in payload:
            stdout.write(part)
        stdout.flush()
        del parts, payload
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_process(limits: Limits) -> None:
    """Limit the memory of this process to what one request may take, and prevent it from writing files."""
    try:
        import resource
    except ImportError:  # Windows does not have this module
        return
    # Memory for the imported modules, a body with its copies, and a picture.
    most = 2**28 + 4 * limits.body_bytes + limits.decode_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


if __name__ == "__main__":
    main()
