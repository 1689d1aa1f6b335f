"""All metrics of a set of predictions with their intervals, as they stand in metrics.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dlfer.metrics import classification as mt
from dlfer.metrics import intervals as iv
from dlfer.metrics.averages import compute_average_intervals, compute_class_intervals
from dlfer.metrics.calibration import compute_calibration, describe_temperature
from dlfer.metrics.curves import compute_auc_intervals, compute_average_precision_intervals
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.selective import choose_threshold, compute_selective
from dlfer.runs.metrics_record import Abstention, Metrics, SplitMetrics
from dlfer.runs.records import DuplicatesRecord, Temperature

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
"""Figures over all classes; each is a function of confusion matrices [..., C, C]."""

_OF_ONE_CLASS = "all targets, or all predictions, are one class, so that the value is 0 by convention"

REASONS = {
    "precision": "the class was never predicted, so that the value is 0 by convention",
    "mcc": _OF_ONE_CLASS,
    "cohen_kappa": _OF_ONE_CLASS,
    None: "the images do not differ from each other, so that they say nothing about others",
}
"""Why there is a value and no 95 % interval, by the name of the figure; None: any other."""


def compute_scores(
    predictions: Predictions, *, temperature: float | None = None, threshold: float | None = None
) -> SplitMetrics:
    """Return every metric of `predictions` with its 95 % interval; an undefined value is None.

    Intervals treat the images as drawn independently. Each covers at least 93 % in simulated test sets of 150 to
    3,589 images (`benchmarks/coverage.py`); an interval that does not is not given: low and high are None and
    "reason" says why.

    Args:
        predictions: one part of the data.
        temperature: fitted on validation; calibration is also given after it.
        threshold: of the confidence, chosen on validation; what it gives here is told.

    Returns:
        The metrics as fractions; mcc and cohen_kappa are in -1..1, log_loss is in nats. Balanced accuracy is macro
        recall under its other name, and weighted recall is accuracy: each has one interval. A metric with a value and
        without an interval has the reason.

    Example:
        >>> compute_scores(read_predictions(run / "predictions" / "test.npz")).accuracy.value
        0.7031
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    confusion = mt.compute_confusion(targets, predictions.predicted, len(predictions.labels))
    bounds = compute_average_intervals(confusion)
    aucs, precisions = mt.compute_aucs(targets, probabilities), mt.compute_average_precisions(targets, probabilities)
    auc_bounds, macro_auc_bounds = compute_auc_intervals(targets, probabilities)
    precision_bounds, macro_precision_bounds = compute_average_precision_intervals(targets, probabilities)
    losses = mt.compute_item_losses(targets, probabilities)
    areas = {"auc": (aucs, auc_bounds), "average_precision": (precisions, precision_bounds)}
    scores = {
        "n": len(predictions),
        "labels": list(predictions.labels),
        **{name: _figure(statistic(confusion), bounds[name]) for name, statistic in _AVERAGES.items()},
        "macro_auc": _figure(mt.compute_macro(aucs, confusion), macro_auc_bounds),
        "macro_average_precision": _figure(mt.compute_macro(precisions, confusion), macro_precision_bounds),
        "emotion_detection_rate": {
            **_figure(_compute_detection_rate(confusion), bounds["emotion_detection_rate"]),
            "num_detected": int(mt.compute_detected(confusion).sum()),
            "num_classes": int((mt.compute_support(confusion) > 0).sum()),
        },
        "log_loss": _figure(losses.mean(), iv.compute_skew_interval(losses)),
        "per_class": _compute_per_class(confusion, predictions.labels, areas),
        "confusion": confusion.tolist(),
        "calibration": compute_calibration(predictions, temperature),
        "selective": compute_selective(predictions, threshold),
    }
    return SplitMetrics.build(_give_reasons(_replace_nan(scores)))


def compute_metrics_file(
    parts: Mapping[str, Predictions | None],
    *,
    protocol: str,
    banner: str | None,
    selected_on: str,
    duplicates: DuplicatesRecord | None = None,
    without_duplicates_ids: Collection[str] | None = None,
    target_accuracy: float = 0.8,
    temperature: Temperature | None = None,
    abstain: Abstention | None = None,
    test_opened: int | None = 0,
) -> Metrics:
    """Return the whole of metrics.json.

    Args:
        parts: "test", "validation" and "train" -> predictions; absent or None where there is none.
        protocol: "official", "resplit" or "paper".
        banner: a warning that every output of the run carries, or None.
        selected_on: in words, what the model was selected on.
        duplicates: counts of the judged images that have a duplicate in the data that made the model, as
            `dlfer.experiment.splits` gives them; None where they were not counted.
        without_duplicates_ids: ids of the judged images without any, which are scored once more: of test, else of
            validation.
        target_accuracy: fraction that the answered validation images are to reach by abstaining.
        temperature, abstain: what was found on validation earlier; where they are None and `parts` has validation
            they are found on it.
        test_opened: how often a test part was opened with this model, this time included; None: not known.
    """
    validation = parts.get("validation")
    if validation is not None:
        temperature = temperature or describe_temperature(validation, selected_on)
        abstain = abstain or _choose_abstention(validation, target_accuracy, selected_on)
    common = {
        "temperature": temperature.value if temperature else None,
        "threshold": abstain.threshold if abstain else None,
    }
    scores = {
        part: compute_scores(parts[part], **common) if parts.get(part) is not None else None
        for part in ("test", "validation", "train")
    }
    judged, without = "test" if parts.get("test") is not None else "validation", {}
    if parts.get(judged) is not None and without_duplicates_ids is not None:
        kept = np.isin(parts[judged].ids, np.array(sorted(without_duplicates_ids), dtype=np.str_))
        without[judged] = compute_scores(parts[judged].take(kept), **common) if kept.any() else None
    return Metrics(
        protocol=protocol,
        banner=banner,
        selected_on=selected_on,
        test=scores["test"],
        test_without_duplicates=without.get("test"),
        duplicates=duplicates,
        validation=scores["validation"],
        validation_without_duplicates=without.get("validation"),
        train=scores["train"],
        temperature=temperature,
        abstain=abstain,
        test_opened=test_opened,
        headline="single",
        views={},
        groups=None,
    )


def _choose_abstention(validation: Predictions, target_accuracy: float, chosen_on: str) -> Abstention | None:
    threshold = choose_threshold(validation, target_accuracy)
    if threshold is None:
        return None
    return Abstention(threshold=threshold, target_accuracy=target_accuracy, chosen_on=chosen_on, n=len(validation))


def _compute_detection_rate(confusion: np.ndarray) -> np.ndarray:
    """Return the share of the classes present whose most frequent prediction is right (a tie is not)."""
    return mt.compute_detected(confusion).sum(axis=-1) / (mt.compute_support(confusion) > 0).sum(axis=-1)


def _compute_per_class(
    confusion: np.ndarray, labels: tuple[str, ...], areas: Mapping[str, tuple[np.ndarray, list[tuple[float, float]]]]
) -> dict[str, Any]:
    """Return label -> figures and intervals; where a figure is undefined, so is its interval."""
    values = {
        "precision": mt.compute_precision(confusion),
        "recall": mt.compute_recall(confusion),
        "f1": mt.compute_f1(confusion),
        "specificity": mt.compute_specificity(confusion),
        "one_vs_rest_accuracy": mt.compute_one_vs_rest_accuracy(confusion),
        **{name: value for name, (value, _) in areas.items()},
    }
    bounds = {**compute_class_intervals(confusion), **{name: several for name, (_, several) in areas.items()}}
    support = mt.compute_support(confusion)
    return {
        label: {
            "n": int(support[c]),
            **{name: float(value[c]) for name, value in values.items()},
            "intervals": {name: list(several[c]) for name, several in bounds.items()},
        }
        for c, label in enumerate(labels)
    }


def _figure(value: float, bounds: tuple[float, float]) -> dict[str, float]:
    low, high = bounds
    return {"value": float(value), "low": float(low), "high": float(high)}


def _replace_nan(value: Any) -> Any:
    """Return `value` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _replace_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _give_reasons(scores: dict[str, Any]) -> dict[str, Any]:
    """Add "reason" to each figure that has a value and no interval, and "reasons" to classes with such figures."""
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
    """Yield (name, {"value", "low", "high"}) for each figure of a nested dictionary."""
    for name, item in scores.items():
        if isinstance(item, dict) and "low" in item:
            yield name, item
        elif isinstance(item, dict):
            yield from _iterate_figures(item)
