"""Intervals of what a confusion matrix gives: per class, averaged over classes, MCC, kappa and detected classes.

All are closed forms for images that are drawn independently, so that the number of images of each class is random.
Per class they are Wilson's (given the number of images with this target or this prediction, the right ones are
binomial), averages combine the limits of the classes (MOVER), and the others have Wilson's interval with the
effective number of images of their delta-method variance. A class that is the target of no image is left out, as in
the values: without it the images are a sample of the population without this class.
"""

from __future__ import annotations

import numpy as np

from dlfer.metrics import classification as mt
from dlfer.metrics.intervals import (
    compute_effective_interval,
    compute_f1_interval,
    compute_mover_interval,
    compute_wilson_interval,
)

Interval = tuple[float, float]

UNDEFINED: Interval = (float("nan"), float("nan"))

PER_CLASS = ("precision", "recall", "f1", "specificity", "one_vs_rest_accuracy")


def compute_class_intervals(confusion: np.ndarray, level: float = 0.95) -> dict[str, list[Interval]]:
    """Return metric -> interval of each class, for the metrics of PER_CLASS.

    Args:
        confusion: int [C, C], rows are targets, columns are predictions.
        level: the probability of covering.

    Returns:
        (NaN, NaN) where the metric is undefined, and for the precision of a class that was never predicted.
    """
    support, predicted, total = mt.compute_support(confusion), confusion.sum(axis=0), int(confusion.sum())
    intervals: dict[str, list[Interval]] = {name: [] for name in PER_CLASS}
    for c in range(len(confusion)):
        hits, n = int(confusion[c, c]), int(support[c])
        false_positives, negatives = int(predicted[c]) - hits, total - n
        errors = n - hits + false_positives
        own = {
            "precision": compute_wilson_interval(hits, int(predicted[c]), level) if n else UNDEFINED,
            "recall": compute_wilson_interval(hits, n, level),
            "f1": compute_f1_interval(hits, errors, level) if n else UNDEFINED,
            "specificity": compute_wilson_interval(negatives - false_positives, negatives, level),
            "one_vs_rest_accuracy": compute_wilson_interval(total - errors, total, level),
        }
        for name, interval in own.items():
            intervals[name].append(interval)
    return intervals


def compute_average_intervals(confusion: np.ndarray, level: float = 0.95) -> dict[str, Interval]:
    """Return metric -> interval, for each metric over all classes that depends on the confusion matrix alone.

    Args:
        confusion: int [C, C], rows are targets, columns are predictions; at least one image.
        level: the probability of covering.

    Returns:
        Intervals of accuracy, weighted_recall (the same), macro_recall, balanced_accuracy (the same),
        macro_precision, macro_specificity, macro_f1, weighted_precision, weighted_f1, one_vs_rest_accuracy, mcc,
        cohen_kappa and emotion_detection_rate; (NaN, NaN) where there is none: MCC and kappa where all targets or all
        predictions are one class, specificity where all targets are.
    """
    total, hits = int(confusion.sum()), int(np.trace(confusion))
    accuracy = compute_wilson_interval(hits, total, level)
    per_class = compute_class_intervals(confusion, level)
    macros = {name: _compute_macro(name, confusion, per_class[name]) for name in ("recall", "precision", "f1")}
    macros["specificity"] = _compute_macro_specificity(confusion, level)
    if len(confusion) == 2 and (mt.compute_support(confusion) > 0).all():
        macros["specificity"] = macros["recall"]  # which it is: each class's is the recall of the other
    one_vs_rest = tuple(max(0.0, 1 - 2 * (1 - limit) / len(confusion)) for limit in accuracy)
    return {
        "accuracy": accuracy,
        "weighted_recall": accuracy,
        "one_vs_rest_accuracy": one_vs_rest,
        "balanced_accuracy": macros["recall"],
        **{f"macro_{name}": interval for name, interval in macros.items()},
        "weighted_precision": _compute_weighted("precision", confusion, level),
        "weighted_f1": _compute_weighted("f1", confusion, level),
        **_compute_agreement(confusion, level),
        "emotion_detection_rate": compute_detection_interval(confusion, level),
    }


def compute_detection_interval(confusion: np.ndarray, level: float = 0.95) -> Interval:
    """Return an interval of the share of classes whose most frequent prediction is right.

    A class counts as certainly detected where its own label is significantly more frequent than each other one
    among its images, and as certainly not detected where some other label is significantly more frequent than its
    own (exact sign tests, Bonferroni's correction over classes and labels). The limits count the classes that are
    certainly detected, and those that are not certainly undetected; they err on the wide side.

    Args:
        confusion: int [C, C], rows are targets, columns are predictions.
        level: the probability of covering.
    """
    from scipy.special import bdtrc

    present = np.flatnonzero(mt.compute_support(confusion))
    alpha = (1 - level) / 2 / len(present)
    detected = undetected = 0
    for c in present:
        hits, others = confusion[c, c], np.delete(confusion[c], c)
        # The probability that at least so many of both are the one, each with chance 1/2.
        more, fewer = bdtrc(hits - 1, hits + others, 0.5), bdtrc(others - 1, hits + others, 0.5)
        detected += bool((more <= alpha).all()) if len(others) else bool(hits)
        undetected += bool((fewer <= alpha / max(len(others), 1)).any())
    return detected / len(present), (len(present) - undetected) / len(present)


_RATIOS = {
    # metric -> what is counted and out of what, as weights of the cells [C, C, C] of each class's confusion
    "recall": lambda own, target, given: (own, target),
    "precision": lambda own, target, given: (own, given),
    "specificity": lambda own, target, given: ((1 - target) * (1 - given), 1 - target),
    "f1": lambda own, target, given: (2 * own, target + given),
}

_VALUES = {
    "recall": mt.compute_recall,
    "precision": mt.compute_precision,
    "specificity": mt.compute_specificity,
    "f1": mt.compute_f1,
}


def _compute_ratio_effects(name: str, confusion: np.ndarray) -> np.ndarray:
    """Return the derivative of each class's metric by each cell of the confusion matrix (float64 [C, C, C]).

    The metrics are ratios of sums of cells, A / B, so that the derivative is (a - A / B b) / B. It is 0 where B is.
    """
    number = np.arange(len(confusion))
    target = np.broadcast_to((number[:, None] == number)[:, :, None], (len(number),) * 3).astype(np.float64)
    given = target.swapaxes(1, 2)
    counted, of_all = _RATIOS[name](target * given, target, given)
    above, below = (np.einsum("cij,ij->c", weights, confusion) for weights in (counted, of_all))
    ratio = np.divide(above, below, out=np.zeros(len(number)), where=below > 0)
    return (counted - ratio[:, None, None] * of_all) / np.where(below > 0, below, np.inf)[:, None, None]


def _compute_macro(name: str, confusion: np.ndarray, intervals: list[Interval]) -> Interval:
    """Combine the limits of the classes that have rows, with the correlations that the delta method gives.

    Recalls are uncorrelated (given the number of images of each class), and so are precisions. F1 is not: an error
    counts in two classes.
    """
    values, limits = _VALUES[name](confusion), np.array(intervals)
    counted = (mt.compute_support(confusion) > 0) & ~np.isnan(values)
    if not counted.any():
        return UNDEFINED
    # The precision of a class that was never predicted counts as 0, and may be anything.
    limits = np.where(np.isnan(limits), [0.0, 1.0], limits)[counted]
    effects = _compute_ratio_effects(name, confusion)[counted]
    covariances = np.einsum("ij,cij,dij->cd", confusion, effects, effects)
    spreads = np.sqrt(np.diag(covariances))
    scale = np.outer(spreads, spreads)
    correlations = np.divide(covariances, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(correlations, 1.0)
    weights = np.full(len(limits), 1 / len(limits))
    low, high = compute_mover_interval(values[counted], limits, weights, correlations)
    return max(low, 0.0), min(high, 1.0)


def _compute_macro_specificity(confusion: np.ndarray, level: float) -> Interval:
    """Return Wilson's interval with the effective number of images.

    The classes share their few errors, so that their limits combined do not cover (91 % at an accuracy of 95 %).
    """
    values = mt.compute_specificity(confusion)
    counted = (mt.compute_support(confusion) > 0) & ~np.isnan(values)
    if not counted.any():
        return UNDEFINED
    n, effects = int(confusion.sum()), _compute_ratio_effects("specificity", confusion)[counted].mean(axis=0)
    return compute_effective_interval(
        float(values[counted].mean()), _compute_variance(n * effects, confusion), n, level
    )


def _compute_weighted(name: str, confusion: np.ndarray, level: float) -> Interval:
    values, support = np.nan_to_num(_VALUES[name](confusion)), mt.compute_support(confusion)
    value = float(mt.compute_weighted(_VALUES[name](confusion), confusion))
    # By the weights, which are random, and by the metric of each class.
    effects = values[:, None] - value + np.einsum("c,cij->ij", support, _compute_ratio_effects(name, confusion))
    return compute_effective_interval(value, _compute_variance(effects, confusion), int(confusion.sum()), level)


def _compute_agreement(confusion: np.ndarray, level: float) -> dict[str, Interval]:
    """Return the intervals of MCC and kappa.

    1 - (1 - m) (1 - chance) is the accuracy with kappa as m, and close to it with MCC. It has Wilson's interval with
    its effective number of images, and the limits are carried back, so that they hold where no image is wrong, too.
    """
    shares = confusion / confusion.sum()
    target, given, right = shares.sum(axis=1), shares.sum(axis=0), float(np.trace(shares))
    chance, squares, others = float(target @ given), float(target @ target), float(given @ given)
    if max(squares, others) >= 1 - 1e-12:
        return {"mcc": UNDEFINED, "cohen_kappa": UNDEFINED}
    of_right = np.eye(len(shares)) - right
    of_chance = given[:, None] + target[None, :] - 2 * chance
    spread = np.sqrt((1 - squares) * (1 - others))
    mcc = (right - chance) / spread
    of_spread = (target[:, None] - squares) / (1 - squares) + (given[None, :] - others) / (1 - others)
    found = {
        "mcc": (mcc, (of_right - of_chance) / spread + mcc * of_spread),
        "cohen_kappa": (
            (right - chance) / (1 - chance),
            of_right / (1 - chance) - (1 - right) / (1 - chance) ** 2 * of_chance,
        ),
    }
    intervals = {}
    for name, (value, effects) in found.items():
        variance = _compute_variance(effects, confusion) * (1 - chance) ** 2
        as_accuracy = float(np.clip(1 - (1 - value) * (1 - chance), 0.0, 1.0))
        limits = compute_effective_interval(as_accuracy, variance, int(confusion.sum()), level)
        low, high = (1 - (1 - limit) / (1 - chance) for limit in limits)
        intervals[name] = max(-1.0, min(low, value)), min(1.0, max(high, value))
    return intervals


def _compute_variance(effects: np.ndarray, confusion: np.ndarray) -> float:
    """Return the variance of a metric from what an image of each cell adds to n times the metric (mean 0)."""
    n = int(confusion.sum())
    return float((confusion * effects**2).sum()) / n / max(n - 1, 1)
