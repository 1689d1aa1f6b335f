"""How runs, records and models look in a notebook: HTML tables without colours of their own, so that dark themes suit them, too.

Everything that is shown is escaped, for labels and names come from files and folders.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from dlfer.runs.text import escape_text

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
    heads = "".join(f'<th style="{_CELL}text-align:{_align(rows, i)}">{_escape(h)}</th>' for i, h in enumerate(header))
    head = f"<thead><tr>{heads}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{''.join(_format_cell(cell) for cell in row)}</tr>" for row in rows[:MOST_ROWS])
    more = f"The first {MOST_ROWS} of {len(rows):,} rows." if len(rows) > MOST_ROWS else None
    below = "".join(f'<p style="margin:0.3em 0">{_escape(note)}</p>' for note in (more, *notes) if note)
    table = f'<table style="border-collapse:collapse">{head}<tbody>{body}</tbody></table>' if rows else ""
    return f"<div><p><b>{_escape(title)}</b></p>{table}{below}</div>"


def _escape(value: Any) -> str:
    return html.escape(escape_text(str(value), keep="\n"))


def _format_cell(value: Any) -> str:
    text = "–" if value is None else f"{value:,}" if _is_count(value) else str(value)
    return f'<td style="{_CELL}text-align:{"right" if _is_count(value) else "left"}">{_escape(text)}</td>'


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
