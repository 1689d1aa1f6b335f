"""Reading UBJSON strictly, so that damaged or forged trees are refused before XGBoost's own reader sees them.

XGBoost's reader ends the process with a segmentation fault at some broken files (seen with 3.2.0: a file of other
contents), and takes the numbers of nodes in a file at their word. Here every length is held against what is left
of the file, nothing is executed, and nesting has a limit.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

DEEPEST = 32
_NUMBERS = {"i": ">i1", "U": ">u1", "I": ">i2", "l": ">i4", "L": ">i8", "d": ">f4", "D": ">f8"}
_COUNTS = "iUIlL"


def parse_ubjson(contents: bytes) -> Any:
    """Return dicts, lists, strings, numbers, and numpy arrays for arrays of one kind of number.

    Raises:
        ValueError: it is not UBJSON (of the part of it that XGBoost writes), is cut short, or goes on after its end.
    """
    reader = _Reader(contents)
    try:
        value = reader.read_value(reader.take(1).decode("ascii"), 0)
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"no UBJSON at byte {reader.position}: {error}") from error
    if reader.position != len(contents):
        raise ValueError(f"UBJSON ends at byte {reader.position}, the file at {len(contents)}")
    return value


class _Reader:
    def __init__(self, contents: bytes) -> None:
        self.contents, self.position = contents, 0

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count < 0 or count > len(self.contents) - self.position:
            raise ValueError(f"cut short at byte {self.position}: {count} more bytes were announced")
        self.position += count
        return self.contents[self.position - count : self.position]

    def peek(self) -> str:
        """Return the next marker; it stays."""
        if self.position >= len(self.contents):
            raise ValueError(f"cut short at byte {self.position}")
        return chr(self.contents[self.position])

    def read_number(self, marker: str) -> int | float:
        """Return the number that a marker announces."""
        kind = np.dtype(_NUMBERS[marker])
        return np.frombuffer(self.take(kind.itemsize), kind)[0].item()

    def read_count(self) -> int:
        """Return a length: a marker of an integer, and the integer."""
        marker = self.take(1).decode("ascii")
        if marker not in _COUNTS:
            raise ValueError(f"byte {self.position - 1}: found {marker!r}, expected a length")
        return int(self.read_number(marker))

    def read_string(self) -> str:
        """Return a string without its marker."""
        return self.take(self.read_count()).decode("utf-8")

    def read_value(self, marker: str, depth: int) -> Any:
        """Return the value that a marker announces."""
        if depth > DEEPEST:
            raise ValueError(f"byte {self.position}: nested deeper than {DEEPEST}")
        if marker in _NUMBERS:
            return self.read_number(marker)
        if marker == "S":
            return self.read_string()
        if marker == "C":
            return self.take(1).decode("ascii")
        if marker in "ZTF":
            return {"Z": None, "T": True, "F": False}[marker]
        if marker == "{":
            return self.read_object(depth)
        if marker == "[":
            return self.read_array(depth)
        raise ValueError(f"byte {self.position - 1}: found the marker {marker!r}, which UBJSON does not have")

    def read_object(self, depth: int) -> dict[str, Any]:
        """Return a dict, up to its closing brace."""
        found: dict[str, Any] = {}
        while self.peek() != "}":
            key = self.read_string()
            if key in found:
                raise ValueError(f"byte {self.position}: the key {key!r} occurs twice")
            found[key] = self.read_value(self.take(1).decode("ascii"), depth + 1)
        self.take(1)
        return found

    def read_array(self, depth: int) -> list[Any] | np.ndarray:
        """Return a numpy array where the kind of number is announced, else a list."""
        kind = None
        if self.peek() == "$":
            self.take(1)
            kind = self.take(1).decode("ascii")
            if kind not in _NUMBERS or self.peek() != "#":
                raise ValueError(f"byte {self.position}: found an array of {kind!r}, expected one of numbers, counted")
        if self.peek() == "#":
            self.take(1)
            count = self.read_count()
            if kind is not None:
                dtype = np.dtype(_NUMBERS[kind])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype)
            if count > len(self.contents) - self.position:
                raise ValueError(f"byte {self.position}: {count} values were announced, the file is shorter")
            return [self.read_value(self.take(1).decode("ascii"), depth + 1) for _ in range(count)]
        values = []
        while self.peek() != "]":
            values.append(self.read_value(self.take(1).decode("ascii"), depth + 1))
        self.take(1)
        return values
