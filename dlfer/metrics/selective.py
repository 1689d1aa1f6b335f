"""What is gained where the classifier may decline to answer: the images it is least sure of are left out.

An image is answered if its confidence, the largest of its probabilities as the network gives them, is at
least the threshold. Images of the same confidence pass together, so that no figure depends on their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_effective_interval, compute_wilson_interval, widen_level
from dlfer.metrics.predictions import Predictions

MAX_POINTS = 101
"""Of the risk-coverage curve as it is stored: about one for each percent of the images."""


def compute_risk_coverage(confidences: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the share of images answered and the share of these that are wrong, for each threshold.

    Args:
        confidences: float [N].
        correct: bool [N].

    Returns:
        coverage (float64 [M], falling from 1), risk (float64 [M]) and threshold (float64 [M], rising): one
        for each distinct confidence.
    """
    thresholds, position = np.unique(np.asarray(confidences, dtype=np.float64), return_inverse=True)
    answered = _sum_from_above(np.bincount(position, minlength=len(thresholds)))
    wrong = _sum_from_above(np.bincount(position[~np.asarray(correct, dtype=bool)], minlength=len(thresholds)))
    return answered / len(position), wrong / answered, thresholds


def compute_aurc(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Return the area under the risk-coverage curve: the mean over images of the risk at their confidence.

    0 where all are right; the error rate where the confidence says nothing.

    Source: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks" (NeurIPS 2017); Geifman,
    Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation" (ICLR 2019).
    """
    coverage, risk, _ = compute_risk_coverage(confidences, correct)
    return float((risk * -np.diff(np.r_[coverage, 0.0])).sum())


def compute_aurc_interval(confidences: np.ndarray, correct: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return an interval of the area under the risk-coverage curve.

    Wilson's, with as many images as would give the area's variance, which is the infinitesimal jackknife's: the sum
    of the squared effects of the images' weights. The few wrong images, or the few right ones, decide it: their number
    is that of the degrees of freedom of Student's quantile. Where all are right or all are wrong it is Wilson's of the error
    rate, which the area is there.

    Args:
        confidences: float [N], N at least 1.
        correct: bool [N].
        level: the probability of covering.

    Source: Efron, J. R. Stat. Soc. B 54 (1992) 83.
    """
    # Sorted in full, so that rounding does not depend on the order of rows.
    wrong = ~np.asarray(correct, dtype=bool)
    order = np.lexsort((wrong, confidences))
    confidences, wrong = np.asarray(confidences)[order], wrong[order]
    n, fewest = len(wrong), int(min(wrong.sum(), (~wrong).sum()))
    if fewest == 0:
        return compute_wilson_interval(int(wrong.sum()), n, level)
    value = compute_aurc(confidences, ~wrong)
    variance = float((compute_aurc_effects(confidences, ~wrong) ** 2).sum()) * n / (n - 1)
    return compute_effective_interval(value, variance, n, widen_level(level, max(fewest - 1, 2)))


def compute_aurc_effects(confidences: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the derivative of the area under the risk-coverage curve by the weight of each image.

    Args:
        confidences: float [N].
        correct: bool [N].

    Returns:
        float64 [N], sums to 0. An image counts at its own confidence and in the risk at each lower one.
    """
    _, position = np.unique(np.asarray(confidences, dtype=np.float64), return_inverse=True)
    wrong = ~np.asarray(correct, dtype=bool)
    tied = np.bincount(position)
    answered = _sum_from_above(tied)
    risk = _sum_from_above(np.bincount(position[wrong], minlength=len(tied))) / answered
    of_wrong, of_all = np.cumsum(tied / answered), np.cumsum(tied * risk / answered)
    area = float((risk * tied).sum()) / len(wrong)
    return (risk[position] + wrong * of_wrong[position] - of_all[position] - area) / len(wrong)


def choose_threshold(predictions: Predictions, target_accuracy: float) -> float | None:
    """Return the lowest confidence from which on the answered images reach an accuracy.

    It is chosen to look good on these very images: give it those of validation, and judge it on others.

    Args:
        predictions: of the images to choose on.
        target_accuracy: fraction in 0..1.

    Returns:
        The threshold; 0 where all images together reach the accuracy; None where no part of them does.

    Raises:
        DataError: the accuracy is not in 0..1.
    """
    if not 0 <= target_accuracy <= 1:
        raise DataError(f"choose_threshold: found a target accuracy of {target_accuracy}, expected 0..1.")
    _, risk, thresholds = compute_risk_coverage(get_confidences(predictions), predictions.correct)
    reached = np.flatnonzero(1 - risk >= target_accuracy - 1e-12)
    if len(reached) == 0:
        return None
    return float(thresholds[reached[0]]) if reached[0] else 0.0


def compute_selective(predictions: Predictions, threshold: float | None = None) -> dict[str, Any]:
    """Return the risk-coverage curve of predictions, and what a threshold gives on them.

    Args:
        predictions: of the images to judge.
        threshold: chosen on other images, or None.

    Returns:
        {"aurc": figure, "curve": [{"coverage", "risk", "low", "high", "threshold"}] (coverage from 1
        downwards, at most 101 points; the interval is that of the risk at the threshold), "at_threshold":
        {"threshold", "coverage": figure, "accuracy": figure, "n"} or None}. A figure is {"value", "low", "high"} with
        Wilson's interval; NaN where no image is answered.
    """
    confidences, correct = get_confidences(predictions), predictions.correct
    coverage, risk, thresholds = compute_risk_coverage(confidences, correct)
    low, high = compute_aurc_interval(confidences, correct)
    curve = []
    for i in _thin_out(coverage):
        answered = round(coverage[i] * len(correct))
        bounds = _proportion(round(risk[i] * answered), answered)
        point = {"coverage": float(coverage[i]), "risk": float(risk[i]), "low": bounds["low"], "high": bounds["high"]}
        curve.append(point | {"threshold": float(thresholds[i])})
    return {
        "aurc": {"value": compute_aurc(confidences, correct), "low": low, "high": high},
        "curve": curve,
        "at_threshold": None if threshold is None else _apply_threshold(confidences, correct, threshold),
    }


def get_confidences(predictions: Predictions) -> np.ndarray:
    """Return the largest probability of each row (float64 [N])."""
    return predictions.probabilities.max(axis=1).astype(np.float64)


def _apply_threshold(confidences: np.ndarray, correct: np.ndarray, threshold: float) -> dict[str, Any]:
    answered = confidences >= threshold
    n = int(answered.sum())
    return {
        "threshold": float(threshold),
        "coverage": _proportion(n, len(answered)),
        "accuracy": _proportion(int((correct & answered).sum()), n),
        "n": n,
    }


def _proportion(successes: int, n: int) -> dict[str, float]:
    low, high = compute_wilson_interval(successes, n)
    return {"value": successes / n if n else float("nan"), "low": low, "high": high}


def _thin_out(coverage: np.ndarray) -> np.ndarray:
    """Return at most 101 indices: for each percent the last point that still covers so much, and the very last."""
    if len(coverage) <= MAX_POINTS:
        return np.arange(len(coverage))
    wanted = np.arange(100, 0, -1) / 100
    last_covering = len(coverage) - 1 - np.searchsorted(coverage[::-1], wanted - 1e-12)
    return np.unique(np.r_[last_covering, len(coverage) - 1])


def _sum_from_above(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[::-1])[::-1]
