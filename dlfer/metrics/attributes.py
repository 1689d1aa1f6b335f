"""Whether a classifier is as good for everyone: accuracy and recall by the groups that a csv names."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions
from dlfer.runs.metrics_record import Groups

SMALLEST = 20
"""A figure on fewer images is flagged and takes no part in a gap: its interval is some 40 points wide."""

Attributes = Mapping[str, Mapping[str, str]]
"""Attribute -> image id -> value; an image without a value is not in it."""


def read_attributes(path: Path) -> dict[str, dict[str, str]]:
    """Read a csv with the columns id and one for each attribute, e.g. id,age,gender; empty cells are missing.

    Raises:
        DataError: no such file or no csv, another heading, a row of another length, or an id that repeats.
    """
    path = Path(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a csv with the columns id,attribute,...") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a csv in UTF-8 ({error}).") from error
    heading = [cell.strip() for cell in rows[0]] if rows else []
    names = heading[1:]
    if not names or heading[0] != "id" or len(set(heading)) < len(heading) or "" in names:
        raise DataError(
            f"{path} line 1: found the columns {','.join(heading)[:200]!r}, expected id and then one or more attributes "
            "with different names, e.g. id,age,gender."
        )
    attributes: dict[str, dict[str, str]] = {name: {} for name in names}
    lines: dict[str, int] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) != len(heading):
            raise DataError(f"{path} line {line}: found {len(row)} cells, expected {len(heading)} as in line 1.")
        name, *values = (cell.strip() for cell in row)
        if name in lines:
            raise DataError(
                f"{path} line {line}: the id {name[:80]!r} stands in line {lines[name]} already; expected one row per image."
            )
        lines[name] = line
        for attribute, value in zip(names, values, strict=True):
            if value:
                attributes[attribute][name] = value
    return attributes


def check_attributes(attributes: Attributes, ids: np.ndarray, *, file: str = "") -> None:
    """Raise DataError unless some attribute names one of the images (ids: str [N], at least one)."""
    known = set(ids.tolist())
    if any(known & values.keys() for values in attributes.values()):
        return
    other = next((name for values in attributes.values() for name in values), "none")
    raise DataError(
        f"{file or 'attributes'}: names none of the {len(ids)} images (there e.g. {other!r}, expected ids like "
        f"{str(ids[0])!r}). The ids must be those of the run's predictions."
    )


def compute_group_scores(predictions: Predictions, attributes: Attributes, *, file: str = "") -> Groups:
    """Return accuracy and recall of each group of each attribute, and how far the groups lie apart.

    Args:
        predictions: of one part of the data.
        attributes: as `read_attributes` gives them; it may name more images than those.
        file: where they came from, for the record.

    Returns:
        Accuracy and recall as fractions. A gap is the largest less the smallest, over the groups with 20 images or more
        (for recall: of that label). Its interval is Newcombe's for those two groups; they were picked by looking, so that
        it errs towards a larger gap.

    Raises:
        DataError: no attribute names any of the images.

    Source: Newcombe, Stat. Med. 17 (1998) 873, method 10; Dunn, J. Am. Stat. Assoc. 56 (1961) 52.
    """
    check_attributes(attributes, predictions.ids, file=file)
    known = set(predictions.ids.tolist())
    found = {
        name: _compute_attribute(predictions, values, num_unknown=len(values.keys() - known))
        for name, values in attributes.items()
    }
    return Groups.build({"file": file, "attributes": found})


def _compute_attribute(predictions: Predictions, values: Mapping[str, str], *, num_unknown: int) -> dict[str, Any]:
    of_images = np.array([values.get(name, "") for name in predictions.ids.tolist()], dtype=np.str_)
    groups = {
        str(value): _compute_group(predictions.take(of_images == value))
        for value in np.unique(of_images[of_images != ""])
    }
    recalls = {label: [group["recall"][label] for group in groups.values()] for label in predictions.labels}
    accuracies = [{**group["accuracy"], "n": group["n"]} for group in groups.values()]
    return {
        "groups": groups,
        "gaps": {
            "accuracy": _compute_gap(accuracies),
            "recall": {label: _compute_gap(figures) for label, figures in recalls.items()},
        },
        "num_missing": int((of_images == "").sum()),
        "num_unknown": num_unknown,
    }


def _compute_group(predictions: Predictions) -> dict[str, Any]:
    recall = {}
    for number, label in enumerate(predictions.labels):
        rows = predictions.targets == number
        recall[label] = {**_compute_proportion(predictions.correct[rows]), "n": int(rows.sum())} if rows.any() else None
    n = len(predictions)
    return {"n": n, "accuracy": _compute_proportion(predictions.correct), "recall": recall, "small": n < SMALLEST}


def _compute_proportion(correct: np.ndarray) -> dict[str, float]:
    low, high = compute_wilson_interval(int(correct.sum()), len(correct))
    return {"value": float(correct.mean()), "low": low, "high": high}


def _compute_gap(figures: list[dict[str, float] | None], level: float = 0.95) -> dict[str, float] | None:
    """Return the largest less the smallest of the figures that rest on enough images; None for fewer than two."""
    large = [figure for figure in figures if figure is not None and figure["n"] >= SMALLEST]
    if len(large) < 2:
        return None
    pairs = list(combinations(range(len(large)), 2))
    level = 1 - (1 - level) / len(pairs)
    limits = [compute_wilson_interval(figure["value"] * figure["n"], figure["n"], level) for figure in large]
    low, high = 0.0, 0.0
    for pair in pairs:
        for first, second in (pair, pair[::-1]):
            a, b = large[first]["value"], large[second]["value"]
            low = max(low, a - b - math.hypot(a - limits[first][0], limits[second][1] - b))
            high = max(high, a - b + math.hypot(limits[first][1] - a, b - limits[second][0]))
    values = [figure["value"] for figure in large]
    return {"value": max(values) - min(values), "low": low, "high": min(1.0, high)}
