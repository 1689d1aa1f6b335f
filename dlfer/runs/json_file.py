"""JSON from a file, within limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 256 * 2**20


def read_json(path: Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """Return what a JSON file in UTF-8 holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `max_bytes` (256 MiB by default), is not JSON, or is nested too deeply.
    """
    with open(path, "rb") as file:
        contents = file.read(max_bytes + 1)
    if len(contents) > max_bytes:
        raise ValueError(f"found more than {max_bytes:,} bytes")
    return parse_json(contents)


def parse_json(contents: bytes | str) -> Any:
    """Return what JSON text says.

    Raises:
        ValueError: it is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(contents)
    except RecursionError:
        raise ValueError("nested too deeply") from None
