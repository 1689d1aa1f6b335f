"""All metrics of a set of predictions with their intervals, in the structure of metrics.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics import classification as mt
from dlfer.metrics import intervals as iv
from dlfer.metrics.confidence import (
    calibrate,
    choose_threshold,
    compute_calibration,
    compute_selective,
    describe_temperature,
)
from dlfer.metrics.curves import (
    compute_auc_intervals,
    compute_aucs,
    compute_average_precision_intervals,
    compute_average_precisions,
)
from dlfer.metrics.predictions import Predictions
from dlfer.runs.metrics_record import Abstention, Groups, Metrics, SplitMetrics
from dlfer.runs.records import to_json
from dlfer.runs.text import open_text, read_records

_AVERAGES = {
    "accuracy": mt.compute_accuracy,
    "macro_f1": mt.compute_macro_f1,
    "macro_precision": lambda m: mt.compute_macro(mt.compute_precision(m), m),
    "macro_recall": lambda m: mt.compute_macro(mt.compute_recall(m), m),
    "macro_specificity": lambda m: mt.compute_macro(mt.compute_specificity(m), m),
    "balanced_accuracy": lambda m: mt.compute_macro(mt.compute_recall(m), m),
    "mcc": mt.compute_mcc,
    "cohen_kappa": mt.compute_kappa,
    "weighted_f1": lambda m: mt.compute_weighted(mt.compute_f1(m), m),
    "weighted_precision": lambda m: mt.compute_weighted(mt.compute_precision(m), m),
    "weighted_recall": lambda m: mt.compute_weighted(mt.compute_recall(m), m),
    "one_vs_rest_accuracy": lambda m: mt.compute_one_vs_rest_accuracy(m).mean(axis=-1),
}
"""Name -> metric over all classes, as a function of confusion matrices [..., C, C]."""

_OF_ONE_CLASS = "all targets, or all predictions, are one class, so that the value is 0 by convention"

REASONS = {
    "precision": "the class was never predicted, so that the value is 0 by convention",
    "mcc": _OF_ONE_CLASS,
    "cohen_kappa": _OF_ONE_CLASS,
    None: "the images do not differ from each other, so that they say nothing about others",
}
"""Metric name -> why it has a value but no 95 % interval; the key None holds the reason for all other metrics."""


def compute_scores(
    predictions: Predictions,
    *,
    temperature: float | None = None,
    threshold: float | None = None,
    is_threshold_calibrated: bool = True,
) -> SplitMetrics:
    """Return every metric of `predictions` with its 95 % interval; an undefined value is None.

    The intervals assume that the images are drawn independently. Each one covers the true value in at least 93 % of
    simulated test sets of 150 to 3,589 images (`benchmarks/coverage.py`). An interval that would not is omitted: low
    and high are None, and "reason" says why.

    Args:
        temperature: fitted on validation; calibration is also computed after applying it.
        threshold: of the confidence, chosen on validation; coverage and accuracy at it are included.
        is_threshold_calibrated: whether the threshold is one of confidences after applying the temperature; selective
            prediction then is computed with these.

    Returns:
        The metrics as fractions, with averages over the labels that have images ("not_judged" lists the others); mcc
        and cohen_kappa are in -1..1, log_loss is in nats. Balanced accuracy equals macro recall and weighted recall
        equals accuracy, so each of these pairs shares one interval.

    Example:
        >>> compute_scores(read_predictions(run / "predictions" / "test.npz")).accuracy.value
        0.7031
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    confusion = mt.compute_confusion(targets, predictions.predicted, len(predictions.labels))
    bounds = iv.compute_average_intervals(confusion)
    aucs, precisions = compute_aucs(targets, probabilities), compute_average_precisions(targets, probabilities)
    auc_bounds, macro_auc_bounds = compute_auc_intervals(targets, probabilities)
    precision_bounds, macro_precision_bounds = compute_average_precision_intervals(targets, probabilities)
    num_detected = int(mt.compute_detected(confusion).sum())
    support = mt.compute_support(confusion)
    num_classes = int((support > 0).sum())
    absent = [label for label, count in zip(predictions.labels, support, strict=True) if not count]
    areas = {"auc": (aucs, auc_bounds), "average_precision": (precisions, precision_bounds)}
    scores = {
        "n": len(predictions),
        "labels": list(predictions.labels),
        **({"not_judged": absent} if absent else {}),
        **{name: _make_estimate(statistic(confusion), bounds[name]) for name, statistic in _AVERAGES.items()},
        "macro_auc": _make_estimate(mt.compute_macro(aucs, confusion), macro_auc_bounds),
        "macro_average_precision": _make_estimate(mt.compute_macro(precisions, confusion), macro_precision_bounds),
        "emotion_detection_rate": {
            **_make_estimate(num_detected / num_classes, bounds["emotion_detection_rate"]),
            "num_detected": num_detected,
            "num_classes": num_classes,
        },
        "log_loss": iv.compute_mean(mt.compute_item_losses(targets, probabilities)),
        "per_class": _compute_per_class(confusion, predictions.labels, areas),
        "confusion": confusion.tolist(),
        "calibration": compute_calibration(predictions, temperature),
        "selective": compute_selective(
            calibrate(predictions, temperature if is_threshold_calibrated else None), threshold
        ),
    }
    return SplitMetrics.build(_add_reasons(to_json(scores)))


def compute_metrics_file(
    splits: Mapping[str, Predictions | None],
    about: Metrics,
    *,
    without_duplicates_ids: Collection[str] | None = None,
    target_accuracy: float = 0.8,
) -> Metrics:
    """Return the complete contents of metrics.json.

    Args:
        splits: "test", "validation" and "train" -> predictions; a split without predictions is absent or None.
        about: supplies protocol, banner, selected_on, is_selected, duplicates and test_opened, as well as temperature
            and abstain if they were fitted on validation earlier. If one of these two is None and `splits` has
            validation, it is fitted there.
        without_duplicates_ids: ids of the evaluated images (test, else validation) that have no duplicate in the data
            that trained or selected the model; these images are also scored separately.
        target_accuracy: the accuracy, as a fraction, that abstention is to reach on the answered validation images.
    """
    validation, temperature, abstain = splits.get("validation"), about.temperature, about.abstain
    if validation is not None:
        temperature = temperature or describe_temperature(validation, about.selected_on)
        abstain = abstain or _choose_abstention(validation, target_accuracy, about.selected_on, temperature.value)
    fitted = {
        "temperature": temperature.value if temperature else None,
        "threshold": abstain.threshold if abstain else None,
        "is_threshold_calibrated": abstain is None or abstain.temperature is not None,
    }
    scores = {
        split: compute_scores(splits[split], **fitted) if splits.get(split) is not None else None
        for split in ("test", "validation", "train")
    }
    judged, without = "test" if splits.get("test") is not None else "validation", {}
    if splits.get(judged) is not None and without_duplicates_ids is not None:
        kept = np.isin(splits[judged].ids, np.array(sorted(without_duplicates_ids), dtype=np.str_))
        without[judged] = compute_scores(splits[judged].take(kept), **fitted) if kept.any() else None
    return Metrics(
        protocol=about.protocol,
        banner=about.banner,
        selected_on=about.selected_on,
        is_selected=about.is_selected,
        test=scores["test"],
        test_without_duplicates=without.get("test"),
        duplicates=about.duplicates,
        validation=scores["validation"],
        validation_without_duplicates=without.get("validation"),
        train=scores["train"],
        temperature=temperature,
        abstain=abstain,
        test_opened=about.test_opened,
        headline="single",
        views={},
        groups=None,
    )


def _choose_abstention(
    validation: Predictions, target_accuracy: float, chosen_on: str, temperature: float
) -> Abstention | None:
    """Return the threshold of calibrated confidences, which are those that predictions come with."""
    threshold = choose_threshold(calibrate(validation, temperature), target_accuracy)
    if threshold is None:
        return None
    return Abstention(
        threshold=threshold,
        target_accuracy=target_accuracy,
        chosen_on=chosen_on,
        n=len(validation),
        temperature=temperature,
    )


def _compute_per_class(
    confusion: np.ndarray, labels: tuple[str, ...], areas: Mapping[str, tuple[np.ndarray, list[tuple[float, float]]]]
) -> dict[str, Any]:
    """Return label -> n, metrics and intervals; the interval of an undefined metric is undefined as well."""
    values = {
        "precision": mt.compute_precision(confusion),
        "recall": mt.compute_recall(confusion),
        "f1": mt.compute_f1(confusion),
        "specificity": mt.compute_specificity(confusion),
        "one_vs_rest_accuracy": mt.compute_one_vs_rest_accuracy(confusion),
        **{name: value for name, (value, _) in areas.items()},
    }
    bounds = {**iv.compute_class_intervals(confusion), **{name: several for name, (_, several) in areas.items()}}
    support = mt.compute_support(confusion)
    return {
        label: {
            "n": int(support[c]),
            **{name: float(value[c]) for name, value in values.items()},
            "intervals": {name: list(several[c]) for name, several in bounds.items()},
        }
        for c, label in enumerate(labels)
    }


def _make_estimate(value: float, bounds: tuple[float, float]) -> dict[str, float]:
    low, high = bounds
    return {"value": float(value), "low": float(low), "high": float(high)}


def _add_reasons(scores: dict[str, Any]) -> dict[str, Any]:
    """Add "reason" to each metric that has a value but no interval, and "reasons" to classes with such metrics."""
    for name, figure in _iterate_figures(scores):
        if figure["value"] is not None and figure["low"] is None:
            figure["reason"] = REASONS.get(name, REASONS[None])
    for figures in scores["per_class"].values():
        reasons = {
            name: REASONS.get(name, REASONS[None])
            for name, (low, _) in figures["intervals"].items()
            if figures[name] is not None and low is None
        }
        if reasons:
            figures["reasons"] = reasons
    return scores


def _iterate_figures(scores: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, {"value", "low", "high"}) for each metric of a nested dictionary."""
    for name, item in scores.items():
        if isinstance(item, dict) and "low" in item:
            yield name, item
        elif isinstance(item, dict):
            yield from _iterate_figures(item)


MIN_GROUP_SIZE = 20
"""A metric on fewer images is flagged and not used for a gap, since its interval is about 40 percentage points wide."""

Attributes = Mapping[str, Mapping[str, str]]
"""Attribute -> image id -> value; images without a value are absent."""

_ATTRIBUTE_COLUMNS = "id and then one or more attributes with different names, e.g. id,age,gender"


def read_attributes(path: Path, *, expected: str = _ATTRIBUTE_COLUMNS) -> dict[str, dict[str, str]]:
    """Read a csv with a column id and one column per attribute, e.g. id,age,gender; empty cells are missing values.

    Args:
        expected: a description of the columns for error messages.

    Raises:
        DataError: the file is absent or not a csv, has a wrong header or a row of another length, or repeats an id.
    """
    path = Path(path)
    try:
        with open_text(path) as file:
            rows = list(read_records(file))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected a csv with the columns {expected}.") from None
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: not a csv ({error}).") from error
    heading = [cell.strip() for cell in rows[0][1]] if rows else []
    names = heading[1:]
    if not names or heading[0].casefold() != "id" or len(set(heading)) < len(heading) or "" in names:
        raise DataError(f"{path} line 1: found the columns {','.join(heading)[:200]!r}, expected {expected}.")
    attributes: dict[str, dict[str, str]] = {name: {} for name in names}
    lines: dict[str, int] = {}
    for line, row in rows[1:]:
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
    """Raise DataError unless an attribute has a value for at least one of the images (ids: str [N], N >= 1)."""
    known = set(ids.tolist())
    if any(known & values.keys() for values in attributes.values()):
        return
    other = next((name for values in attributes.values() for name in values), "none")
    raise DataError(
        f"{file or 'attributes'}: names none of the {len(ids)} images (there e.g. {other!r}, expected ids like "
        f"{str(ids[0])!r}). The ids must be those of the run's predictions."
    )


def compute_group_scores(predictions: Predictions, attributes: Attributes, *, file: str = "") -> Groups:
    """Return accuracy and recall of each group of each attribute, and the gaps between the groups.

    Args:
        attributes: as returned by `read_attributes`; it may also contain other images.
        file: the file that the attributes were read from, for the record.

    Returns:
        Accuracy and recall as fractions. A gap is the largest value minus the smallest, over the groups with 20 images
        or more (for recall: of that label). Its limits are the largest lower and the largest upper limit of Newcombe's
        intervals over all pairs of groups, with Bonferroni's correction, since the data picked the two groups.

    Raises:
        DataError: no attribute has a value for any of the images.

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
        hits, n = int(predictions.correct[rows].sum()), int(rows.sum())
        recall[label] = {**iv.compute_proportion(hits, n), "n": n} if n else None
    n = len(predictions)
    accuracy = iv.compute_proportion(int(predictions.correct.sum()), n)
    return {"n": n, "accuracy": accuracy, "recall": recall, "small": n < MIN_GROUP_SIZE}


def _compute_gap(figures: list[dict[str, float] | None], level: float = 0.95) -> dict[str, float] | None:
    """Return the gap between the largest and smallest value of groups with enough images; None for fewer than two."""
    large = [figure for figure in figures if figure is not None and figure["n"] >= MIN_GROUP_SIZE]
    if len(large) < 2:
        return None
    pairs = list(combinations(range(len(large)), 2))
    level = 1 - (1 - level) / len(pairs)
    limits = [iv.compute_wilson_interval(figure["value"] * figure["n"], figure["n"], level) for figure in large]
    low, high = 0.0, 0.0
    for pair in pairs:
        for first, second in (pair, pair[::-1]):
            a, b = large[first]["value"], large[second]["value"]
            low = max(low, a - b - math.hypot(a - limits[first][0], limits[second][1] - b))
            high = max(high, a - b + math.hypot(limits[first][1] - a, b - limits[second][0]))
    values = [figure["value"] for figure in large]
    return {"value": max(values) - min(values), "low": low, "high": min(1.0, high)}
