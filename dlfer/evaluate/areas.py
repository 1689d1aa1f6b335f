"""How far areas under the ROC and the precision-recall curve may be from the truth.

Both intervals come from the share of each row in the area's variance (DeLong's for the ROC, the
infinitesimal jackknife for average precision), and are symmetric on the logit scale, which keeps them
within 0..1. No resampling: the same to first order as a bootstrap stratified by class, in one sort.
"""

from __future__ import annotations

import numpy as np

from dlfer.evaluate.intervals import compute_quantile, compute_wilson_interval
from dlfer.evaluate.metrics import compute_midranks, count_ranked


def compute_auc_intervals(
    targets: np.ndarray, probabilities: np.ndarray, level: float = 0.95
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return intervals of each class's area under the ROC curve and of their mean.

    The variance is DeLong's, from the placement of each row among the rows of the other side; that of
    the mean uses each row's summed share in all classes, so that the correlation of the classes counts.
    The interval is symmetric on the logit scale, which keeps it within 0..1. At an area of exactly 0 or
    1, or with a single row on one side, DeLong's variance vanishes; then the bounds are those areas that
    a test with Hanley and McNeil's variance does not reject.

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
        counts = positives, len(targets) - positives
        degenerate = min(counts) < 2 or area in (0.0, 1.0)
        intervals.append(
            _invert_hanley_mcneil(area, counts, level)
            if degenerate
            else _logit_interval(area, float(np.sum(share**2)), level)
        )
    if not areas:
        return intervals, (float("nan"), float("nan"))
    macro, variance = float(np.mean(areas)), float(np.sum((shares / len(areas)) ** 2))
    if macro in (0.0, 1.0) or variance == 0.0:
        low, high = np.nanmean(np.array(intervals), axis=0)
        return intervals, (float(low), float(high))
    return intervals, _logit_interval(macro, variance, level)


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

    The variance is the infinitesimal jackknife's, stratified by class: the squared effect of each row's
    weight, about the mean of its class. A bootstrap has the same variance to first order and would sort
    1,000 resamples for each class. Where that variance vanishes (a perfect ranking), or a class has one
    row only, the interval is Wilson's with the number of the class's rows as trials.

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
    shares, values, intervals = np.zeros(len(targets)), [], []
    for c in range(num_classes):
        if counts[c] == 0:
            intervals.append((float("nan"), float("nan")))
            continue
        value, effect = _compute_precision_effects(targets == c, probabilities[:, c])
        share = _centre_by_class(effect, targets, counts)
        variance = float(np.sum(share**2))
        values.append(value)
        shares += share
        degenerate = counts[c] < 2 or not _has_spread(value, variance)
        intervals.append(
            compute_wilson_interval(value * counts[c], counts[c], level)
            if degenerate
            else _logit_interval(value, variance, level)
        )
    macro, variance = float(np.mean(values)), float(np.sum((shares / len(values)) ** 2))
    if not _has_spread(macro, variance) or counts[counts > 0].min() < 2:
        low, high = np.nanmean(np.array(intervals), axis=0)
        return intervals, (float(low), float(high))
    return intervals, _logit_interval(macro, variance, level)


def _compute_precision_effects(is_target: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the average precision and its derivative by the weight of each row (float64 [N]).

    A row counts at its own threshold, and in the precision at each lower one.
    """
    found, true_positives, passed, position = count_ranked(is_target, scores)
    precision = true_positives / passed
    of_positives = np.cumsum((found / passed)[::-1])[::-1]
    of_all = np.cumsum((found * precision / passed)[::-1])[::-1]
    positives = int(found.sum())
    effect = (is_target * (precision + of_positives)[position] - of_all[position]) / positives
    return float((found * precision).sum() / positives), effect


def _centre_by_class(effect: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return each row's deviation from its class's mean, scaled so that squares sum to an unbiased variance."""
    means = np.bincount(targets, weights=effect, minlength=len(counts)) / np.maximum(counts, 1)
    return (effect - means[targets]) * np.sqrt(counts / np.maximum(counts - 1, 1))[targets]


def _has_spread(value: float, variance: float) -> bool:
    return 0.0 < value < 1.0 - 1e-12 and variance > 1e-18
