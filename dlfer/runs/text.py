"""Names from outside (files, labels) as text that a medium can take: UTF-8, a terminal, csv, Markdown, HTML of a notebook."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

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


_OTHER_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Halves of characters that do not stand for a byte of a file's name."""


def _is_bytes(text: str) -> bool:
    """Tell whether all lone surrogates stand for bytes, as in names of files."""
    return _OTHER_SURROGATE.search(text) is None


def _escape(character: str) -> str:
    number = ord(character)
    if character in _CELL_ESCAPES:
        return _CELL_ESCAPES[character]
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


_CELL = "padding:0.2em 0.7em;border-bottom:1px solid rgba(128,128,128,0.35);"
MOST_ROWS = 20
"""A table of more rows shows the first ones and says how many there are."""


class Interval(Protocol):
    """What has a value and maybe its 95 % interval: the records of `dlfer.runs.metrics_record`."""

    value: float | None
    low: float | None
    high: float | None


def format_interval(estimate: Interval | None) -> str:
    """Return a fraction as percent with its 95 % interval, e.g. "64.3 % (61.2 to 67.1)"; "–" where there is no value."""
    if estimate is None or estimate.value is None:
        return "–"
    text = f"{100 * estimate.value:.1f} %"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"


def shorten(estimate: Interval | None) -> tuple[float | None, ...]:
    """Return (value, low, high) with four digits, or the value alone without an interval, for the `repr` of a record."""
    if estimate is None or estimate.value is None:
        return (None,)
    ends = () if estimate.low is None or estimate.high is None else (estimate.low, estimate.high)
    return tuple(round(number, 4) for number in (estimate.value, *ends))


def format_html(
    title: str, rows: Sequence[Sequence[Any]], *, header: Sequence[str] = (), notes: Iterable[str | None] = ()
) -> str:
    """Return a table in HTML with a title above and notes below, all of it escaped.

    Args:
        title: one line.
        rows: of cells; numbers stand at the right, None is shown as "–".
        header: names of the columns; empty: none.
        notes: paragraphs; None and "" are left out.

    Example:
        >>> "&lt;b&gt;" in format_html("labels", [("<b>", 3)])
        True
    """
    heads = "".join(
        f'<th style="{_CELL}text-align:{_align(rows, i)}">{_escape_html(h)}</th>' for i, h in enumerate(header)
    )
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(_format_cell(cell) for cell in row)}</tr>" for row in rows[:MOST_ROWS])
    more = f"The first {MOST_ROWS} of {len(rows):,} rows." if len(rows) > MOST_ROWS else None
    below = "".join(f'<p style="margin:0.3em 0">{_escape_html(note)}</p>' for note in (more, *notes) if note)
    table = f'<table style="border-collapse:collapse">{head}<tbody>{body}</tbody></table>' if rows else ""
    return f"<div><p><b>{_escape_html(title)}</b></p>{table}{below}</div>"


def _escape_html(value: Any) -> str:
    return html.escape(escape_text(str(value), keep="\n"))


def _format_cell(value: Any) -> str:
    text = "–" if value is None else f"{value:,}" if _is_count(value) else str(value)
    return f'<td style="{_CELL}text-align:{"right" if _is_count(value) else "left"}">{_escape_html(text)}</td>'


def _align(rows: Sequence[Sequence[Any]], column: int) -> str:
    return "right" if rows and _is_count(rows[0][column]) else "left"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class ShownModel:
    """Gives a model a short `repr` and a table for notebooks, of what every model has, whatever computes it."""

    def __repr__(self) -> str:
        words = [f"{key}={value!r}" for key, value in self._describe() if key in ("name", "labels", "image_size")]
        return f"{type(self).__name__}({', '.join(words)})"

    def _repr_html_(self) -> str:
        smoke = "Trained by a smoke run: its predictions are meaningless." if self.about.smoke else None
        rows = [(key, ", ".join(value) if isinstance(value, tuple) else value) for key, value in self._describe()]
        return format_html(f"{type(self).__name__}", [row for row in rows if row[1] is not None], notes=[smoke])

    def _describe(self) -> list[tuple[str, Any]]:
        about, temperature = self.about, self.temperature_fit
        return [
            ("name", about.name or about.run or about.experiment),
            ("family", getattr(self, "family", None)),
            ("labels", tuple(self.labels)),
            ("image_size", int(self.image_size)),
            ("channels", int(self.channels)),
            ("temperature", None if temperature is None or temperature.value is None else f"{temperature.value:.3f}"),
            ("protocol", about.protocol),
        ]
