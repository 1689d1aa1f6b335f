"""How far a figure may be from the truth, given that it was measured on n images only.

Proportions have Wilson's interval, F1 the same by its link with the Jaccard index, areas under the ROC
curve DeLong's on the logit scale, and averages over classes a bootstrap stratified by class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist

import numpy as np

from dlfer.evaluate.metrics import compute_midranks

_CELLS_AT_ONCE = 4_000_000
"""Confusion cells held by the bootstrap at a time: 32 MB, whatever the number of classes."""


def compute_quantile(level: float) -> float:
    """Return z such that a standard normal lies within -z..z with probability `level` (0.95: 1.96)."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def compute_wilson_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    It covers well for small n and near 0 and 1, where value +- 1.96 standard errors does not.

    Args:
        successes: 0..n.
        n: number of trials; 0 gives (NaN, NaN).
        level: the probability of covering, e.g. 0.95.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209; Brown, Cai & DasGupta, Stat. Sci. 16 (2001) 101.
    """
    if n == 0:
        return float("nan"), float("nan")
    z2 = compute_quantile(level) ** 2
    proportion = successes / n
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (proportion * (1 - proportion) + z2 / (4 * n)) / n) / (1 + z2 / n)
    # At the ends the bound is exactly 0 or 1; rounding must not put it 1e-17 beside the value.
    low = 0.0 if successes == 0 else max(0.0, float(centre - half))
    high = 1.0 if successes == n else min(1.0, float(centre + half))
    return low, high


def compute_f1_interval(hits: int, misses: int, level: float = 0.95) -> tuple[float, float]:
    """Return an interval of one class's F1 from its counts.

    TP / (TP + FP + FN) is a proportion J, and F1 = 2 J / (1 + J) rises with it, so Wilson's bounds of J
    turn into bounds of F1.

    Args:
        hits: TP.
        misses: FP + FN.
        level: the probability of covering.

    Source: Lam, Gopal & Qian, "Confidence Intervals for the F1 Score" (2023), the indirect Wilson method.
    """
    low, high = compute_wilson_interval(hits, hits + misses, level)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def compute_bootstrap_intervals(
    confusion: np.ndarray,
    statistics: Mapping[str, Callable[[np.ndarray], np.ndarray]],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of figures that depend on the confusion matrix alone.

    Drawing rows with replacement within each class makes that class's row of the confusion matrix
    multinomial, so the matrices themselves are drawn: the same distribution, no loop over images.
    Where no image is wrong, every resample is the same and the interval has no width.

    Args:
        confusion: int64 [C, C], rows are targets.
        statistics: name -> function of int64 [R, C, C] that returns float64 [R].
        resamples: R, the number of draws.
        seed: of the draws.
        level: the probability of covering.

    Returns:
        name -> (low, high); NaN where the figure is undefined.
    """
    num_classes = len(confusion)
    counts = confusion.sum(axis=1)
    chances = np.where(counts[:, None] > 0, confusion / np.maximum(counts, 1)[:, None], 1 / num_classes)
    generator = np.random.default_rng(seed)
    chunk = max(1, _CELLS_AT_ONCE // num_classes**2)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), num_classes)
        matrices = generator.multinomial(counts, chances, size=shape)
        for name, statistic in statistics.items():
            drawn[name].append(statistic(matrices))
    tails = (0.5 - level / 2, 0.5 + level / 2)
    bounds = {name: np.quantile(np.concatenate(values), tails) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def compute_mean_interval(values: np.ndarray, level: float = 0.95, *, smallest: float = -np.inf) -> tuple[float, float]:
    """Return the normal interval of the mean of `values` (float [N]), cut at `smallest`; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = compute_quantile(level) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return max(float(np.mean(values) - half), smallest), float(np.mean(values) + half)


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
