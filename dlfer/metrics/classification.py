"""Classification metrics in pure numpy.

Two conventions hold everywhere. A class that was never predicted has precision 0, and therefore F1 0. A class that is
the target of no row has no precision, recall or F1: they are NaN, and macro and weighted averages exclude the class, so
that classes without rows do not lower them.

Functions of a confusion matrix take [..., C, C] and operate on the last two axes, so one call handles many matrices.
"""

from __future__ import annotations

import numpy as np

SMALLEST_PROBABILITY = float(np.finfo(np.float32).eps)
"""Lower clip of probabilities in the log loss, 1.19e-7 (the float32 epsilon), so that a certain error costs 15.9."""


def compute_confusion(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often each class was predicted for each target.

    targets and predicted are int [N] in 0..C-1; the result is int64 [C, C] with a row per target, a column per
    prediction.
    """
    cells = np.asarray(targets, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def compute_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the fraction of rows whose prediction equals the target (float64 [...]; NaN without rows)."""
    return _divide(_hits(confusion).sum(axis=-1), confusion.sum(axis=(-2, -1)), np.nan)


def compute_precision(confusion: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of rows predicted as the class that belong to it.

    Returns:
        float64 [..., C]; 0 for a class that was never predicted, NaN for a class that is the target of no row.
    """
    precision = _divide(_hits(confusion), confusion.sum(axis=-2), 0.0)
    return np.where(compute_support(confusion) > 0, precision, np.nan)


def compute_recall(confusion: np.ndarray) -> np.ndarray:
    """Return, for each class, the fraction of its rows predicted as the class (float64 [..., C]; NaN without rows)."""
    return _divide(_hits(confusion), compute_support(confusion), np.nan)


def compute_f1(confusion: np.ndarray) -> np.ndarray:
    """Return F1, 2 TP / (2 TP + FP + FN), of each class (float64 [..., C]; NaN for a class without rows)."""
    support = compute_support(confusion)
    f1 = _divide(2 * _hits(confusion), support + confusion.sum(axis=-2), np.nan)
    return np.where(support > 0, f1, np.nan)


def compute_specificity(confusion: np.ndarray) -> np.ndarray:
    """Return the true negative rate of each class against the rest.

    float64 [..., C] in [0, 1]; NaN for a class that is the target of every row.
    """
    negatives = confusion.sum(axis=(-2, -1))[..., None] - compute_support(confusion)
    false_positives = confusion.sum(axis=-2) - _hits(confusion)
    return _divide(negatives - false_positives, negatives, np.nan)


def compute_support(confusion: np.ndarray) -> np.ndarray:
    """Return the number of rows of each class (int64 [..., C])."""
    return confusion.sum(axis=-1)


def compute_macro(values: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """Return the unweighted mean of a metric (float64 [..., C]) over the classes.

    Only classes that have rows and whose metric is defined are included; NaN if there are none (float64 [...]).
    """
    counted = (compute_support(confusion) > 0) & ~np.isnan(values)
    return _divide(np.where(counted, values, 0.0).sum(axis=-1), counted.sum(axis=-1), np.nan)


def compute_weighted(values: np.ndarray, confusion: np.ndarray) -> np.ndarray:
    """Return the mean of a metric over the classes, weighted by their numbers of rows (float64 [...])."""
    weights = np.where(np.isnan(values), 0, compute_support(confusion))
    return _divide((np.where(weights > 0, values, 0.0) * weights).sum(axis=-1), weights.sum(axis=-1), np.nan)


def compute_macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Return the unweighted mean of F1 over the classes (float64 [...])."""
    return compute_macro(compute_f1(confusion), confusion)


def compute_mcc(confusion: np.ndarray) -> np.ndarray:
    """Return the multiclass Matthews correlation coefficient of targets and predictions.

    float64 [...] in -1..1; 0 if all targets or all predictions are one class; NaN without rows.

    Source: Gorodkin, Comput. Biol. Chem. 28 (2004) 367.
    """
    n, agreement, by_chance, support, predicted = _count_margins(confusion)
    # The margins are floats, since this product is of the order of n^4 and could overflow int64.
    spread = (n**2 - (support**2).sum(axis=-1)) * (n**2 - (predicted**2).sum(axis=-1))
    return np.where(n > 0, _divide(n * agreement - by_chance, np.sqrt(spread), 0.0), np.nan)


def compute_kappa(confusion: np.ndarray) -> np.ndarray:
    """Return Cohen's kappa: the agreement beyond that expected from the class frequencies alone.

    float64 [...] in -1..1; NaN if all targets and all predictions are one and the same class, or without rows.

    Source: Cohen, Educ. Psychol. Meas. 20 (1960) 37.
    """
    n, agreement, by_chance, _, _ = _count_margins(confusion)
    return _divide(n * agreement - by_chance, n**2 - by_chance, np.nan)


def compute_one_vs_rest_accuracy(confusion: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class against the rest, (TP + TN) / N.

    It is far above the multiclass accuracy, because true negatives count: seven classes at an accuracy of 70 % have a
    mean of 1 - 2 (1 - 0.7) / 7 = 91.4 %. Publications that report it as accuracy are not comparable with others.
    float64 [..., C] in 0..1; also defined for a class without rows; NaN if there are no rows at all.
    """
    n = confusion.sum(axis=(-2, -1))[..., None]
    return _divide(n - compute_support(confusion) - confusion.sum(axis=-2) + 2 * _hits(confusion), n, np.nan)


def compute_detected(confusion: np.ndarray) -> np.ndarray:
    """Return whether the most frequent prediction for a class is that class (bool [..., C]).

    A class counts as detected only if it is predicted more often than every other class, so ties and classes without
    rows do not count. The fraction of detected classes among those present is the "emotion detection rate" of some
    publications; with seven classes it can take only eight values.
    """
    others = np.where(np.eye(confusion.shape[-1], dtype=bool), -1, confusion)
    return _hits(confusion) > np.maximum(others.max(axis=-1), 0)


def compute_item_losses(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return -ln of the probability of each row's target (float64 [N] in 0..15.9); their mean is the log loss."""
    chosen = probabilities[np.arange(len(targets)), targets].astype(np.float64)
    return -np.log(np.clip(chosen, SMALLEST_PROBABILITY, 1 - SMALLEST_PROBABILITY))


def _count_margins(confusion: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return float64 n, hits and sum of support x predicted (each [...]), then support and predicted ([..., C])."""
    support = compute_support(confusion).astype(np.float64)
    predicted = confusion.sum(axis=-2).astype(np.float64)
    return support.sum(axis=-1), _hits(confusion).sum(axis=-1), (support * predicted).sum(axis=-1), support, predicted


def _hits(confusion: np.ndarray) -> np.ndarray:
    return np.diagonal(confusion, axis1=-2, axis2=-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray, otherwise: float) -> np.ndarray:
    """Divide elementwise, returning `otherwise` where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, dtype=np.float64), denominator)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, otherwise), where=denominator != 0)
