"""Intervals of the areas under the ROC and the precision-recall curve.

Both come from the contribution of each row to the area's variance (DeLong's for the ROC, the infinitesimal jackknife
for average precision), without resampling. With few images of a class these variances are too small and too
uncertain; what is done then was chosen by simulation and is written at each function.
"""

from __future__ import annotations

import numpy as np

from dlfer.metrics.classification import compute_midranks, count_ranked
from dlfer.metrics.intervals import (
    compute_effective_interval,
    compute_mover_interval,
    compute_quantile,
    widen_level,
)

FEW_ROWS = 100
"""Below as many rows of the class, or of the rest, the interval of an AUC also contains Hanley and McNeil's."""

FEW_MISPLACED = 5
"""The same where rows times the distance of the area from 0 or 1 are fewer: these rows decide the variance."""


def compute_auc_intervals(
    targets: np.ndarray, probabilities: np.ndarray, level: float = 0.95
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return intervals of each class's area under the ROC curve and of their mean.

    The variance is DeLong's, from the placement of each row among the rows of the other side; that of
    the mean uses each row's summed share in all classes, so that the correlation of the classes counts.
    The interval is symmetric on the logit scale, which keeps it within 0..1.

    DeLong's variance misses the few rows with a low score that decide it: with 15 rows of Disgust and an area of 0.98
    its interval covers 85 %, with 900 rows and an area above 0.999 91 %. Below 100 rows on a side, and where fewer than
    5 rows are misplaced in effect (rows times the distance of the area from 0 or 1), the interval is therefore extended
    to those areas that a test with Hanley and McNeil's variance does not reject, which are all of it at an area of
    exactly 0 or 1 and with a single row on a side, where DeLong's variance vanishes. The mean has Student's quantile for
    the number of rows of the smallest class (10 or more).

    Args:
        targets: int [N].
        probabilities: float [N, C].
        level: the probability of covering.

    Returns:
        [(low, high) of each class], (low, high) of the macro average. NaN where a class has no area.

    Source: DeLong, DeLong & Clarke-Pearson, Biometrics 44 (1988) 837; Sun & Xu, IEEE Signal Process.
    Lett. 21 (2014) 1389; Pepe, The Statistical Evaluation of Medical Tests (2003), 5.2; Newcombe,
    Stat. Med. 25 (2006) 559, method 5.
    """
    num_classes = probabilities.shape[1]
    shares, areas, intervals = np.zeros(len(targets)), [], []
    for c in range(num_classes):
        is_target = targets == c
        positives = int(is_target.sum())
        if positives == 0 or positives == len(targets):
            intervals.append((float("nan"), float("nan")))
            continue
        area, share = _compute_auc_shares(is_target, probabilities[:, c])
        areas.append(area)
        shares += share
        intervals.append(_compute_auc_interval(area, share, (positives, len(targets) - positives), level))
    if not areas:
        return intervals, (float("nan"), float("nan"))
    macro, variance = float(np.mean(areas)), float(np.sum((shares / len(areas)) ** 2))
    if macro in (0.0, 1.0) or variance == 0.0:
        low, high = np.nanmean(np.array(intervals), axis=0)
        return intervals, (float(low), float(high))
    counts = np.bincount(targets, minlength=num_classes)
    fewest = int(counts[(counts > 0) & (counts < len(targets))].min())
    return intervals, _logit_interval(macro, variance, widen_level(level, max(fewest, 10) - 1))


def _compute_auc_interval(area: float, share: np.ndarray, counts: tuple[int, int], level: float) -> tuple[float, float]:
    """Return the interval of one class (counts: rows of the class and of the rest)."""
    fewest, of_delong = min(counts), None
    if fewest >= 2 and 0.0 < area < 1.0:
        of_delong = _logit_interval(area, float(np.sum(share**2)), level)
        if fewest >= FEW_ROWS and fewest * min(area, 1 - area) >= FEW_MISPLACED:
            return of_delong
    low, high = _invert_hanley_mcneil(area, counts, level)
    return (low, high) if of_delong is None else (min(low, of_delong[0]), max(high, of_delong[1]))


def _compute_auc_shares(is_target: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the area and each row's deviation whose squares sum to DeLong's variance of it (float64 [N])."""
    positives = int(is_target.sum())
    negatives = len(is_target) - positives
    ranks = compute_midranks(scores)
    among_positives = (ranks[is_target] - compute_midranks(scores[is_target])) / negatives
    among_negatives = 1 - (ranks[~is_target] - compute_midranks(scores[~is_target])) / positives
    area = float(among_positives.mean())
    share = np.empty(len(scores))
    share[is_target] = (among_positives - area) / np.sqrt(positives * max(positives - 1, 1))
    share[~is_target] = (among_negatives - area) / np.sqrt(negatives * max(negatives - 1, 1))
    return area, share


def _logit_interval(value: float, variance: float, level: float) -> tuple[float, float]:
    logit = np.log(value / (1 - value))
    half = compute_quantile(level) * np.sqrt(variance) / (value * (1 - value))
    return float(1 / (1 + np.exp(half - logit))), float(1 / (1 + np.exp(-half - logit)))


def _invert_hanley_mcneil(area: float, counts: tuple[int, int], level: float) -> tuple[float, float]:
    """Return the smallest and largest area from which `area` is within z standard errors."""
    z, even = compute_quantile(level), sum(counts) / 2 - 1

    def is_within(candidate: float) -> bool:
        spread = 1 + even * ((1 - candidate) / (2 - candidate) + candidate / (1 + candidate))
        return abs(candidate - area) <= z * np.sqrt(candidate * (1 - candidate) * spread / (counts[0] * counts[1]))

    def bisect(outside: float) -> float:
        inside = area
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
        return inside

    return bisect(0.0), bisect(1.0)


def compute_average_precision_intervals(
    targets: np.ndarray, probabilities: np.ndarray, level: float = 0.95
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return intervals of each class's average precision and of their mean over the classes that have rows.

    The variance is the infinitesimal jackknife's, the sum of the squared effects of the rows' weights; the share of
    the class among the images is random, too. The interval of a class is Wilson's with as many trials as would give
    this variance, but with no more than the class has rows: with few rows the variance is too small, because the
    ranks at which they were found are taken for the ranks of all. That of the mean combines the classes' limits with
    the correlations of the classes (MOVER). The estimate is too high, since each row of the class counts among those
    at or above its own score, by an amount that adds up over the classes. Lower limits are therefore lowered by what
    this count adds.

    Args:
        targets: int [N].
        probabilities: float [N, C].
        level: the probability of covering.

    Returns:
        [(low, high) of each class], (low, high) of the macro average. NaN where a class has no rows.

    Source: Efron, J. R. Stat. Soc. B 54 (1992) 83; Boyd, Eng & Page, "Area under the precision-recall
    curve: point estimates and confidence intervals" (ECML PKDD 2013), on the logit and binomial intervals.
    """
    num_classes = probabilities.shape[1]
    counts = np.bincount(targets, minlength=num_classes)
    intervals = [(float("nan"), float("nan"))] * num_classes
    present = np.flatnonzero(counts)
    values, biases, limits, effects = [], [], np.zeros((len(present), 2)), np.zeros((len(present), len(targets)))
    for row, c in enumerate(present):
        value, effects[row] = _compute_precision_effects(targets == c, probabilities[:, c])
        largest = value * (1 - value) / counts[c]
        variance = max(float(np.sum(effects[row] ** 2)), largest)
        limits[row] = compute_effective_interval(min(value, 1.0), variance, int(counts[c]), level)
        values.append(value)
        biases.append(_compute_precision_bias(targets == c, probabilities[:, c]))
    covariances = effects @ effects.T
    spreads = np.sqrt(np.diag(covariances))
    scale = np.outer(spreads, spreads)
    correlations = np.divide(covariances, scale, out=np.zeros_like(scale), where=scale > 0)
    np.fill_diagonal(correlations, 1.0)
    for row, c in enumerate(present):
        intervals[c] = max(float(limits[row, 0]) - biases[row], 0.0), float(limits[row, 1])
    weights = np.full(len(present), 1 / len(present))
    low, high = compute_mover_interval(np.array(values), limits, weights, correlations)
    return intervals, (max(low - float(np.mean(biases)), 0.0), min(high, 1.0))


def _compute_precision_bias(is_target: np.ndarray, scores: np.ndarray) -> float:
    """Return how much lower the average precision is if no row counts at its own threshold.

    The topmost row has no other at its threshold, and keeps its own.
    """
    found, true_positives, passed, _ = count_ranked(is_target, scores)
    others = np.where(passed > 1, (true_positives - 1) / np.maximum(passed - 1, 1), 1.0)
    return float((found * np.maximum(true_positives / passed - others, 0)).sum() / found.sum())


def _compute_precision_effects(is_target: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the average precision and its derivative by the weight of each row (float64 [N], sums to 0).

    A row counts at its own threshold, in the precision at each lower one, and among the rows of the class.
    """
    found, true_positives, passed, position = count_ranked(is_target, scores)
    precision = true_positives / passed
    of_positives = np.cumsum((found / passed)[::-1])[::-1]
    of_all = np.cumsum((found * precision / passed)[::-1])[::-1]
    positives = int(found.sum())
    value = float((found * precision).sum() / positives)
    return value, (is_target * ((precision + of_positives)[position] - value) - of_all[position]) / positives
