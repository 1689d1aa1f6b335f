"""All figures of a set of predictions with their intervals, as they stand in metrics.json."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from dlfer.evaluate import intervals as iv
from dlfer.evaluate import metrics as mt
from dlfer.evaluate.predictions import Predictions

_AVERAGES = {
    "macro_f1": mt.compute_macro_f1,
    "macro_precision": lambda m: mt.compute_macro(mt.compute_precision(m), m),
    "macro_recall": lambda m: mt.compute_macro(mt.compute_recall(m), m),
    "macro_specificity": lambda m: mt.compute_macro(mt.compute_specificity(m), m),
    "weighted_f1": lambda m: mt.compute_weighted(mt.compute_f1(m), m),
    "weighted_precision": lambda m: mt.compute_weighted(mt.compute_precision(m), m),
    "weighted_recall": lambda m: mt.compute_weighted(mt.compute_recall(m), m),
}
"""Averages over classes; each is a function of confusion matrices [..., C, C]."""


def compute_scores(predictions: Predictions, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Return every figure of `predictions` with its 95 % interval, ready for JSON (NaN is None).

    Args:
        predictions: one part of the data.
        bootstrap: number of resamples behind the intervals of averages over classes.
        seed: of the resamples.

    Returns:
        {"n", "labels", "accuracy": {"value", "low", "high"}, the same for macro_f1, macro_precision,
        macro_recall, macro_specificity, macro_auc, weighted_f1, weighted_precision, weighted_recall and
        log_loss, "per_class": {label: {"n", "precision", "recall", "f1", "specificity", "auc",
        "intervals": {figure: [low, high]}}}, "confusion": [[...]] with rows as targets}. Figures are
        fractions; log_loss is in nats.

    Example:
        >>> compute_scores(read_predictions(run / "predictions" / "test.npz"))["accuracy"]["value"]
        0.7031
    """
    targets, probabilities = predictions.targets, predictions.probabilities
    confusion = mt.compute_confusion(targets, predictions.predicted, len(predictions.labels))
    hits = int(np.trace(confusion))
    bounds = iv.compute_bootstrap_intervals(confusion, _AVERAGES, resamples=bootstrap, seed=seed)
    aucs = mt.compute_aucs(targets, probabilities)
    auc_bounds, macro_auc_bounds = iv.compute_auc_intervals(targets, probabilities)
    losses = mt.compute_item_losses(targets, probabilities)
    loss_low, loss_high = iv.compute_mean_interval(losses, smallest=0.0)
    scores = {
        "n": len(predictions),
        "labels": list(predictions.labels),
        "accuracy": _figure(mt.compute_accuracy(confusion), iv.compute_wilson_interval(hits, len(predictions))),
        **{name: _figure(statistic(confusion), bounds[name]) for name, statistic in _AVERAGES.items()},
        "macro_auc": _figure(mt.compute_macro(aucs, confusion), macro_auc_bounds),
        "log_loss": _figure(losses.mean(), (loss_low, loss_high)),
        "per_class": _compute_per_class(confusion, predictions.labels, aucs, auc_bounds),
        "confusion": confusion.tolist(),
    }
    return _replace_nan(scores)


def compute_metrics_file(
    parts: Mapping[str, Predictions | None],
    *,
    protocol: str,
    banner: str | None,
    selected_on: str,
    twins: Mapping[str, int] | None = None,
    without_twins_ids: Collection[str] | None = None,
    bootstrap: int = 1000,
) -> dict[str, Any]:
    """Return the whole of metrics.json.

    Args:
        parts: "test", "validation" and "train" -> predictions; absent or None where there is none.
        protocol: "official", "resplit" or "paper".
        banner: a warning that every output of the run carries, or None.
        selected_on: in words, what the model was selected on.
        twins: {"exact", "near_or_mirrored"}: test images with a copy in train; None where not counted.
        without_twins_ids: ids of the test images without any copy in train, which are scored once more.
        bootstrap: number of resamples behind the intervals of averages over classes.
    """
    scores = {
        part: compute_scores(parts[part], bootstrap=bootstrap) if parts.get(part) is not None else None
        for part in ("test", "validation", "train")
    }
    test, without_twins = parts.get("test"), None
    if test is not None and without_twins_ids is not None:
        kept = np.isin(test.ids, np.array(sorted(without_twins_ids), dtype=np.str_))
        without_twins = compute_scores(test.take(kept), bootstrap=bootstrap) if kept.any() else None
    return {
        "protocol": protocol,
        "banner": banner,
        "selected_on": selected_on,
        "test": scores["test"],
        "test_without_twins": without_twins,
        "twins": dict(twins) if twins is not None else None,
        "validation": scores["validation"],
        "train": scores["train"],
    }


def _compute_per_class(
    confusion: np.ndarray, labels: tuple[str, ...], aucs: np.ndarray, auc_bounds: list[tuple[float, float]]
) -> dict[str, Any]:
    """Return label -> figures and intervals; where a figure is undefined, so is its interval."""
    values = {
        "precision": mt.compute_precision(confusion),
        "recall": mt.compute_recall(confusion),
        "f1": mt.compute_f1(confusion),
        "specificity": mt.compute_specificity(confusion),
        "auc": aucs,
    }
    support, predicted, total = mt.compute_support(confusion), confusion.sum(axis=0), int(confusion.sum())
    per_class = {}
    for c, label in enumerate(labels):
        hits = int(confusion[c, c])
        false_positives, negatives = int(predicted[c]) - hits, total - int(support[c])
        bounds = {
            "precision": iv.compute_wilson_interval(hits, predicted[c]),
            "recall": iv.compute_wilson_interval(hits, support[c]),
            "f1": iv.compute_f1_interval(hits, int(support[c]) - hits + false_positives),
            "specificity": iv.compute_wilson_interval(negatives - false_positives, negatives),
            "auc": auc_bounds[c],
        }
        undefined = (math.nan, math.nan)
        per_class[label] = {
            "n": int(support[c]),
            **{name: float(value[c]) for name, value in values.items()},
            "intervals": {
                name: list(undefined if math.isnan(values[name][c]) else pair) for name, pair in bounds.items()
            },
        }
    return per_class


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
