"""How values of a run are put into words, the same for pages, the terminal and logs."""

from __future__ import annotations

import math


def is_missing(value: float | None) -> bool:
    """Tell whether a value is undefined: null in JSON."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def format_duration(seconds: float | None, *, is_estimate: bool = False) -> str:
    """Write a time in its two largest units; an estimate, which is not so precise, in whole seconds, minutes or hours.

    Example:
        >>> [format_duration(seconds) for seconds in (4.25, 1085, 11220, None)]
        ['4.2 s', '18 min 05 s', '3 h 07 min', '–']
        >>> [format_duration(seconds, is_estimate=True) for seconds in (45.3, 1085, 11220)]
        ['45 s', '18 min', '3 h 07 min']
    """
    if is_missing(seconds):
        return "–"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    if minutes:
        return f"{minutes} min" if is_estimate else f"{minutes} min {int(seconds % 60):02d} s"
    return f"{seconds:.0f} s" if is_estimate else f"{seconds:.1f} s"
