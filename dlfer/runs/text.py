"""Names from outside (files, labels) as text that a medium can take: UTF-8, a terminal, csv, Markdown."""

from __future__ import annotations

import re
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""What a spreadsheet takes for the beginning of a formula, also in full width."""

_CELL_ESCAPES = {"\t": r"\t", "\n": r"\n", "\r": r"\r"}

_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u200b\u2060\ufeff]"
)
"""Control characters, ends of lines, halves of characters; what sets the direction of writing, by which a name can look
like another; spaces without a width, and the mark of byte order."""


def to_utf8(text: str) -> str:
    r"""Return text that UTF-8 can hold: each byte of a file's name that is not UTF-8 becomes \xNN.

    Example:
        >>> print(to_utf8(os.fsdecode(b"caf\xe9.png")))
        caf\xe9.png
    """
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape" if _is_bytes(text) else "backslashreplace").decode(
        "utf-8", "backslashreplace"
    )


def escape_text(text: str, *, keep: str = "") -> str:
    r"""Return text that shows what it holds and does nothing: control characters, also those that turn the direction of
    writing or are invisible, become \n, \x1b or \u202e; what is not UTF-8 becomes \xNN.

    Args:
        text: of any origin.
        keep: characters that stay, e.g. "\n" of a message of several lines.
    """
    return _HIDDEN.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), to_utf8(text))


def to_cell(value: Any) -> Any:
    """Return a value for a csv that people open in spreadsheets; numbers and None stay as they are.

    Text is escaped as by `escape_text`; where it begins like a formula (= + - @, a tab) a ' is put before it.
    """
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip(" ").startswith(_FORMULA) else "") + escape_text(value)


_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#+!|~&$])")


def to_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line: no links, no HTML, no columns of a table."""
    return _MARKDOWN.sub(r"\\\1", escape_text(text)).replace(r"\<", "&lt;").replace(r"\>", "&gt;")


def to_plain_markdown(text: str) -> str:
    """Return a sentence with names in it for Markdown, on one line: emphasis and code stay, links, HTML and columns do not."""
    return escape_text(text).replace("&", "&amp;").replace("<", "&lt;").replace("[", r"\[").replace("|", r"\|")


def count_noun(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or the plural.

    Args:
        number: how many there are.
        noun: in the singular; a final y becomes "ies", a final s or x gets "es", others "s".

    Example:
        >>> count_noun(1, "file"), count_noun(3589, "image"), count_noun(0, "class")
        ('1 file', '3,589 images', '0 classes')
    """
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith(("s", "x")) else f"{noun}s"
    return f"{number:,} {plural}"


def _is_bytes(text: str) -> bool:
    """Tell whether all lone surrogates stand for bytes, as in names of files."""
    return not any("\ud800" <= character <= "\udfff" and not "\udc80" <= character <= "\udcff" for character in text)


def _escape(character: str) -> str:
    number = ord(character)
    if character in _CELL_ESCAPES:
        return _CELL_ESCAPES[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
