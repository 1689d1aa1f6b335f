"""What is gained where the classifier may decline to answer: the images it is least sure of are left out.

An image is answered if its confidence, the largest of its probabilities as the network gives them, is at
least the threshold. Images of the same confidence pass together, so that no figure depends on their order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dlfer.errors import DataError
from dlfer.evaluate.intervals import compute_wilson_interval, iterate_row_weights
from dlfer.evaluate.predictions import Predictions

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


def compute_aurc_interval(
    confidences: np.ndarray, correct: np.ndarray, *, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the area under the risk-coverage curve.

    Rows are drawn with replacement. Where all are right or all are wrong every resample is the same; then
    Wilson's interval of the error rate, which the area is there, stands in.

    Args:
        confidences: float [N], N at least 1.
        correct: bool [N].
        resamples: number of draws.
        seed: of the draws.
        level: the probability of covering.
    """
    confidences, wrong = np.asarray(confidences, dtype=np.float64), ~np.asarray(correct, dtype=bool)
    n = len(wrong)
    if wrong.all() or not wrong.any():
        return compute_wilson_interval(int(wrong.sum()), n, level)
    # Sorted in full, so that the draws do not depend on the order of rows.
    order = np.lexsort((wrong, -confidences))
    confidences, wrong = confidences[order], wrong[order]
    # The last row of each group of ties: all of it is answered at once.
    ends = np.flatnonzero(np.r_[np.diff(confidences) != 0, True])
    values = []
    for _, weights in iterate_row_weights(n, resamples, np.random.default_rng(seed)):
        answered = np.cumsum(weights, axis=1)[:, ends].astype(np.float64)
        mistaken = np.cumsum(weights * wrong, axis=1)[:, ends]
        drawn = np.diff(answered, axis=1, prepend=0.0)
        values.append((drawn * mistaken / np.maximum(answered, 1.0)).sum(axis=1) / n)
    low, high = np.quantile(np.concatenate(values), (0.5 - level / 2, 0.5 + level / 2))
    return float(low), float(high)


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


def compute_selective(
    predictions: Predictions, threshold: float | None = None, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return the risk-coverage curve of predictions, and what a threshold gives on them.

    Args:
        predictions: of the images to judge.
        threshold: chosen on other images, or None.
        bootstrap, seed: resamples behind the interval of the area, and their seed.

    Returns:
        {"aurc": figure, "curve": [{"coverage", "risk", "low", "high", "threshold"}] (coverage from 1
        downwards, at most 101 points; the interval is that of the risk), "at_threshold": {"threshold", "coverage": figure, "accuracy": figure, "n"} or None}. A figure is
        {"value", "low", "high"} with Wilson's interval; NaN where no image is answered.
    """
    confidences, correct = get_confidences(predictions), predictions.correct
    coverage, risk, thresholds = compute_risk_coverage(confidences, correct)
    low, high = compute_aurc_interval(confidences, correct, resamples=bootstrap, seed=seed)
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
