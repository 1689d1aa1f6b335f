"""The search space as engines need it: an ordered list of dimensions, parents before what hangs on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dlfer.config.keys import find_annotation, get_alternatives, split_key
from dlfer.config.schema import SearchConfig
from dlfer.config.space import list_ancestors
from dlfer.report.page import format_value

_GRID_POINTS = 10
_DIGITS = 6


@dataclass(frozen=True)
class Dimension:
    """One key of the space.

    Attributes:
        key: dotted.
        kind: "log", "between" or "choice".
        is_int: whether its values are whole numbers.
        low, high, step: of log and between; step None: continuous.
        choices: of choice.
        when: key -> values under which this one is searched; all must hold.
    """

    key: str
    kind: str
    is_int: bool = False
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    choices: tuple[Any, ...] = ()
    when: Mapping[str, list[Any]] = field(default_factory=dict)

    def tidy(self, value: float) -> Any:
        """Return a number of the range as it stands in a trial: whole, or of six digits, within the ends."""
        if self.is_int:
            return int(value)
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)

    def __str__(self) -> str:
        """Return the key and its range in words: "rate: 0.0001 to 0.005, log"."""
        if self.kind == "choice":
            text = f"{self.key}: {', '.join(format_value(choice) for choice in self.choices)}"
        else:
            text = f"{self.key}: {self.low:g} to {self.high:g}" + (", log" if self.kind == "log" else "")
            text += f", step {self.step:g}" if self.step is not None else ""
        conditions = [f"{key} is {' or '.join(map(format_value, values))}" for key, values in self.when.items()]
        return text + (f" (where {' and '.join(conditions)})" if conditions else "")

    def list_points(self) -> list[Any]:
        """Return the values that a grid takes: the choices, the steps, or ten points from end to end."""
        if self.kind == "choice":
            return list(self.choices)
        if self.step is not None or (self.is_int and self.kind == "between"):
            step = self.step or 1
            count = int((self.high - self.low) / step + 1e-9) + 1
            points = [self.low + index * step for index in range(count)]
        else:
            parts = [index / (_GRID_POINTS - 1) for index in range(_GRID_POINTS)]
            if self.kind == "log":
                points = [self.low * (self.high / self.low) ** part for part in parts]
            else:
                points = [self.low + (self.high - self.low) * part for part in parts]
        return list(dict.fromkeys(self.tidy(round(point) if self.is_int else point) for point in points))


def list_dimensions(search: SearchConfig) -> list[Dimension]:
    """Return the space in the file's order, but each key after those that its condition names."""
    ordered: list[str] = []
    for key in search.space:
        for name in [*reversed(list_ancestors(search.space, key)), key]:
            if name not in ordered:
                ordered.append(name)
    return [_read_dimension(key, search.space[key]) for key in ordered]


def is_active(dimension: Dimension, chosen: Mapping[str, Any]) -> bool:
    """Return whether a dimension is searched in a trial whose keys so far are `chosen`."""
    return all(parent in chosen and chosen[parent] in values for parent, values in dimension.when.items())


def _read_dimension(key: str, spec: Mapping[str, Any]) -> Dimension:
    when = spec.get("when", {})
    if "choice" in spec:
        return Dimension(key, "choice", choices=tuple(spec["choice"]), when=when)
    kind = "log" if "log" in spec else "between"
    low, high = spec[kind]
    alternatives = get_alternatives(find_annotation(split_key(key)))
    is_int = int in alternatives and float not in alternatives
    return Dimension(key, kind, is_int, low, high, spec.get("step"), when=when)
