"""What a run records of duplicates, in sentences: how many judged images have one, and the accuracy without them."""

from __future__ import annotations

from dlfer.report.page import format_count, format_interval, format_percent
from dlfer.runs.metrics_record import Metrics, SplitMetrics
from dlfer.runs.records import DuplicateCounts, DuplicatesRecord

DEFINITION = "A duplicate is an exact, near or horizontally flipped copy, or an augmented copy of the same image."


def find_without(metrics: Metrics | None) -> SplitMetrics | None:
    """Return the metrics of the judged split without duplicates; None where none were found or none were looked for."""
    if metrics is None or metrics.judged is None or metrics.judged_without_duplicates is None:
        return None
    without = metrics.judged_without_duplicates
    return without if without.n < metrics.judged.n else None


def format_without(split: SplitMetrics) -> str:
    """Return the accuracy of `find_without` with its interval and n: "69.1 % (95 % 67.4 to 70.7, n = 3,201)"."""
    accuracy = split.accuracy
    return f"{format_percent(accuracy.value)} (95 % {format_interval(accuracy)}, n = {format_count(split.n)})"


def name_left_out(duplicates: DuplicatesRecord | None) -> str:
    """Return in which splits the images that "without duplicates" leaves out have a duplicate."""
    return "training or validation" if duplicates is not None and duplicates.in_selection else "training"


def describe_duplicates(metrics: Metrics, *, name: str | None = None) -> str | None:
    """Return how many judged images have a duplicate, and where; None where that is not known.

    Args:
        metrics: of the run.
        name: of the judged split; None: test or validation.
    """
    found = metrics.duplicates
    if found is None or not found.n or found.in_train is None:
        return None
    n, num_in_train = found.n, found.in_train.any
    text = (
        f"{format_count(num_in_train)} of {format_count(n)} {name or found.split} images "
        f"({format_percent(num_in_train / n)}) have a duplicate in training{list_kinds(found.in_train)}"
    )
    if found.in_selection is not None and found.in_either is not None:
        text += (
            f"; {format_count(found.in_selection.any)} have one in validation, which selected the model, and "
            f"{format_count(found.in_either.any)} in either"
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
