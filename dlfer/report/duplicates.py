"""What metrics.json says of duplicates, in sentences: how many judged images have one, and the accuracy without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.records import DuplicateCounts

DEFINITION = "A duplicate is an exact, near or horizontally flipped copy, or an augmented copy of the same image."


def find_without(metrics: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the scores of the judged split without duplicates; None where none were found or none were looked for."""
    for part in ("test", "validation"):
        scores = (metrics or {}).get(part)
        if scores:
            without = metrics.get(f"{part}_without_duplicates")
            return without if without and without["n"] < scores["n"] else None
    return None


def format_without(scores: Mapping[str, Any]) -> str:
    """Return the accuracy of `find_without` with its interval and n: "69.1 % (95 % 67.4 to 70.7, n = 3,201)"."""
    accuracy = scores["accuracy"]
    return f"{format_percent(accuracy['value'])} (95 % {format_interval(accuracy)}, n = {format_count(scores['n'])})"


def name_left_out(duplicates: Mapping[str, Any] | None) -> str:
    """Return in what splits the images that "without duplicates" leaves out have a duplicate."""
    return "training or validation" if (duplicates or {}).get("in_selection") else "training"


def describe_duplicates(metrics: Mapping[str, Any], *, name: str | None = None) -> str | None:
    """Return how many judged images have a duplicate, and where; None where that is not known.

    Args:
        metrics: metrics.json.
        name: of the judged split; None: test or validation.
    """
    found = metrics.get("duplicates")
    if not found or not found["n"]:
        return None
    in_train, in_selection, n = found["in_train"], found.get("in_selection"), found["n"]
    text = (
        f"{format_count(in_train['any'])} of {format_count(n)} {name or found['split']} images "
        f"({format_percent(in_train['any'] / n)}) have a duplicate in training{list_kinds(in_train)}"
    )
    if in_selection:
        text += (
            f"; {format_count(in_selection['any'])} have one in validation, which selected the model, and "
            f"{format_count(found['in_either']['any'])} in either"
        )
    if find_without(metrics):
        text += f'. "Without duplicates" leaves out those with one in {name_left_out(found)}'
    return f"{text}. {DEFINITION}"


def list_kinds(counts: DuplicateCounts) -> str:
    """Return the numbers of exact copies, and of augmented ones if there are any, in brackets; "" if not known."""
    kinds = []
    if counts.exact is not None and counts.any:
        kinds.append(f"{format_count(counts.exact)} an exact copy")
    if counts.augmented:
        kinds.append(f"{format_count(counts.augmented)} an augmented copy")
    return f" ({', '.join(kinds)})" if kinds else ""
