"""ROC and precision-recall curves of each class against the rest, the areas under them, and intervals of the areas.

The intervals are computed without resampling from each row's contribution to the variance of the area (DeLong's method
for the ROC, the infinitesimal jackknife for average precision). With few images of a class these variances are too
small and too uncertain; each function documents its correction for that, which was chosen by simulation.
"""

from __future__ import annotations

import numpy as np

from dlfer.metrics.intervals import (
    UNDEFINED,
    compute_effective_interval,
    compute_mover_interval,
    compute_quantile,
    find_limit,
    widen_level,
)


def compute_midranks(values: np.ndarray) -> np.ndarray:
    """Return the ranks of `values`, starting at 1; equal values get the mean of their ranks (float64 [N])."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse]


def compute_roc(is_target: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ROC curve of one class against the rest.

    Rows with the same score pass the threshold together, so a tie gives a sloped segment that does not depend on the
    order of rows.

    Args:
        is_target: bool [N].
        scores: float [N], larger if the row is more likely of the class.

    Returns:
        False positive rate, true positive rate (float64 [M + 1], from 0 to 1) and threshold at each point, the first
        infinite. All false positive rates are NaN without negative rows, all true positive rates without positive rows.
    """
    _, true_positives, passed, _ = count_ranked(is_target, scores)
    positives = int(np.sum(is_target))
    # A count of 0 is replaced by NaN, so that the rate is NaN as well.
    tpr = np.r_[0, true_positives] / (positives or np.nan)
    fpr = np.r_[0, passed - true_positives] / (len(scores) - positives or np.nan)
    return fpr, tpr, np.r_[np.inf, np.unique(scores)[::-1]]


def compute_auc(is_target: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve: the probability that a row of the class scores higher than one of the rest.

    Ties count one half (the Mann-Whitney statistic). NaN if all rows or none are of the class.
    """
    positives = int(np.sum(is_target))
    negatives = len(is_target) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_sum = compute_midranks(scores)[is_target].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def compute_aucs(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the area under the ROC curve of each class against the rest (float64 [C])."""
    return np.array([compute_auc(targets == c, probabilities[:, c]) for c in range(probabilities.shape[1])])


def compute_average_precision(is_target: np.ndarray, scores: np.ndarray) -> float:
    """Return the average precision: the mean of the precision at the score of each row of the class, not interpolated.

    Rows with the same score (float [N], larger if more likely of the class) pass the threshold together. NaN if no row
    is of the class.
    """
    found, true_positives, passed, _ = count_ranked(is_target, scores)
    positives = int(found.sum())
    return float((found * true_positives / passed).sum() / positives) if positives else float("nan")


def compute_average_precisions(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the average precision of each class against the rest (float64 [C]; NaN for a class without rows)."""
    classes = range(probabilities.shape[1])
    return np.array([compute_average_precision(targets == c, probabilities[:, c]) for c in classes])


def count_ranked(is_target: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count rows cumulatively by decreasing score; rows with the same score are counted together.

    Args:
        is_target: bool [N].
        scores: float [N].

    Returns:
        For each of the M distinct scores, from the highest: the number of rows of the class with this score, of rows of
        the class with at least this score, and of all rows with at least this score (int64 [M] each); then the index of
        each row's score among the M (int64 [N]).
    """
    values, position = np.unique(-np.asarray(scores, dtype=np.float64), return_inverse=True)
    found = np.bincount(position[is_target], minlength=len(values))
    passed = np.cumsum(np.bincount(position, minlength=len(values)))
    return found, np.cumsum(found), passed, position


FEW_ROWS = 100
"""With fewer rows of the class or of the rest than this, the interval of an AUC also includes Hanley and McNeil's."""

FEW_MISPLACED = 5
"""Likewise if the rows times the distance of the area from 0 or 1 are fewer: these few rows determine the variance."""


def compute_auc_intervals(
    targets: np.ndarray, probabilities: np.ndarray, level: float = 0.95
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return intervals of each class's area under the ROC curve and of the mean area.

    The variance is DeLong's, computed from the rank of each row among the rows of the other side. The variance of the
    mean sums each row's contributions over the classes, so it includes the correlation between classes. The interval is
    symmetric on the logit scale, which keeps it within 0..1.

    DeLong's variance is often too small, because a sample misses the few low-scoring rows that determine it: with 15
    rows of Disgust and an area of 0.98 the interval covers 85 %, with 900 rows and an area above 0.999 it covers 91 %.
    With fewer than 100 rows of the class or of the rest, or fewer than 5 effectively misplaced rows (rows times the
    distance of the area from 0 or 1), the interval is therefore extended to all areas that a test with Hanley and
    McNeil's variance does not reject. Only these are used if the area is exactly 0 or 1 or a side has a single row,
    where DeLong's variance vanishes. The mean has Student's quantile for the smallest class's rows (10 or more).

    Args:
        targets: int [N].
        probabilities: float [N, C].

    Returns:
        [(low, high) of each class], (low, high) of the macro average. NaN for a class whose area is undefined.

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
            intervals.append(UNDEFINED)
            continue
        area, share = _compute_auc_shares(is_target, probabilities[:, c])
        areas.append(area)
        shares += share
        intervals.append(_compute_auc_interval(area, share, (positives, len(targets) - positives), level))
    if not areas:
        return intervals, UNDEFINED
    macro, variance = float(np.mean(areas)), float(np.sum((shares / len(areas)) ** 2))
    if macro in (0.0, 1.0) or variance == 0.0:
        low, high = np.nanmean(np.array(intervals), axis=0)
        return intervals, (float(low), float(high))
    counts = np.bincount(targets, minlength=num_classes)
    fewest = int(counts[(counts > 0) & (counts < len(targets))].min())
    return intervals, _logit_interval(macro, variance, widen_level(level, max(fewest, 10) - 1))


def _compute_auc_interval(area: float, share: np.ndarray, counts: tuple[int, int], level: float) -> tuple[float, float]:
    """Return the interval of one class; `counts` are the numbers of rows of the class and of the rest."""
    fewest, of_delong = min(counts), None
    if fewest >= 2 and 0.0 < area < 1.0:
        of_delong = _logit_interval(area, float(np.sum(share**2)), level)
        if fewest >= FEW_ROWS and fewest * min(area, 1 - area) >= FEW_MISPLACED:
            return of_delong
    low, high = _invert_hanley_mcneil(area, counts, level)
    return (low, high) if of_delong is None else (min(low, of_delong[0]), max(high, of_delong[1]))


def _compute_auc_shares(is_target: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the area and each row's deviation (float64 [N]); the squared deviations sum to DeLong's variance."""
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
    """Return the smallest and largest true area that has the observed `area` within z of its standard errors."""
    z, even = compute_quantile(level), sum(counts) / 2 - 1

    def is_within(candidate: float) -> bool:
        spread = 1 + even * ((1 - candidate) / (2 - candidate) + candidate / (1 + candidate))
        return abs(candidate - area) <= z * np.sqrt(candidate * (1 - candidate) * spread / (counts[0] * counts[1]))

    return find_limit(is_within, area, 0.0), find_limit(is_within, area, 1.0)


def compute_average_precision_intervals(
    targets: np.ndarray, probabilities: np.ndarray, level: float = 0.95
) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Return intervals of each class's average precision and of the mean over the classes that have rows.

    The variance is that of the infinitesimal jackknife, the sum of the squared effects of the rows' weights, with the
    prevalence of the class treated as random. The interval of a class is Wilson's with the number of trials that would
    give this variance, but at most the number of rows of the class: with few rows the variance is too small, because it
    treats their observed ranks as those of the population. The interval of the mean combines the classes' limits with
    their correlations (MOVER). Average precision is biased upward, since each row of the class counts among the rows at
    or above its own score; this bias, which does not average out over the classes, is subtracted from the lower limits.

    Args:
        targets: int [N].
        probabilities: float [N, C].

    Returns:
        [(low, high) of each class], (low, high) of the macro average. NaN for a class without rows.

    Source: Efron, J. R. Stat. Soc. B 54 (1992) 83; Boyd, Eng & Page, "Area under the precision-recall
    curve: point estimates and confidence intervals" (ECML PKDD 2013), on the logit and binomial intervals.
    """
    num_classes = probabilities.shape[1]
    counts = np.bincount(targets, minlength=num_classes)
    intervals = [UNDEFINED] * num_classes
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
    """Return how much lower the average precision is if each row is excluded from the counts at its own score.

    A row that ranks alone at the top has no other row at or above its score, so its precision stays 1.
    """
    found, true_positives, passed, _ = count_ranked(is_target, scores)
    others = np.where(passed > 1, (true_positives - 1) / np.maximum(passed - 1, 1), 1.0)
    return float((found * np.maximum(true_positives / passed - others, 0)).sum() / found.sum())


def _compute_precision_effects(is_target: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the average precision and its derivative with respect to each row's weight (float64 [N], sums to 0).

    A row contributes at its own score, to the precision at each lower score, and to the number of rows of the class.
    """
    found, true_positives, passed, position = count_ranked(is_target, scores)
    precision = true_positives / passed
    of_positives = np.cumsum((found / passed)[::-1])[::-1]
    of_all = np.cumsum((found * precision / passed)[::-1])[::-1]
    positives = int(found.sum())
    value = float((found * precision).sum() / positives)
    return value, (is_target * ((precision + of_positives)[position] - value) - of_all[position]) / positives
