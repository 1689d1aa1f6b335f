"""How far a figure may be from the truth, given that it was measured on n images only.

Proportions have Wilson's interval, F1 the same by its link with the Jaccard index, and figures of the
confusion matrix a bootstrap stratified by class. Areas under curves are in `areas`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from statistics import NormalDist

import numpy as np

_CELLS_AT_ONCE = 4_000_000
"""Cells (of confusion matrices, of rows' counts) held by a bootstrap at a time: 16 to 32 MB for any data."""


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
    multinomial, so the matrices themselves are drawn. That is scipy.stats.bootstrap(method="percentile")
    on each class's rows, in distribution, and hundreds of times as fast: it draws C numbers for a class
    instead of one for each image, and all figures share the draws.
    Where each class has one prediction for all its images (all are right, or one class is given to all),
    every resample is the same, which says nothing about other images. Then the rows' shares are drawn
    from their posterior instead, Dirichlet with a prior of one image a class; it errs on the wide side.

    Args:
        confusion: int64 [C, C], rows are targets.
        statistics: name -> function of int64 [R, C, C] that returns float64 [R].
        resamples: R, the number of draws.
        seed: of the draws.
        level: the probability of covering.

    Returns:
        name -> (low, high); NaN where the figure is undefined.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), 13; the prior: Perks, J. Inst.
    Actuaries 73 (1947) 285.
    """
    num_classes = len(confusion)
    counts = confusion.sum(axis=1)
    chances = np.where(counts[:, None] > 0, confusion / np.maximum(counts, 1)[:, None], 1 / num_classes)
    is_constant = bool(((confusion > 0).sum(axis=1) <= 1).all())
    generator = np.random.default_rng(seed)
    chunk = max(1, _CELLS_AT_ONCE // num_classes**2)
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for start in range(0, resamples, chunk):
        shape = (min(chunk, resamples - start), num_classes)
        if is_constant:
            shares = generator.gamma(confusion + 1 / num_classes, size=(*shape, num_classes))
            matrices = counts[:, None] * shares / shares.sum(axis=-1, keepdims=True)
        else:
            matrices = generator.multinomial(counts, chances, size=shape)
        for name, statistic in statistics.items():
            drawn[name].append(statistic(matrices))
    tails = (0.5 - level / 2, 0.5 + level / 2)
    bounds = {name: np.quantile(np.concatenate(values), tails) for name, values in drawn.items()}
    if is_constant:  # a posterior beside an end of the scale does not hold the end itself
        bounds = {
            name: (np.minimum(low, value), np.maximum(high, value))
            for name, (low, high) in bounds.items()
            for value in [statistics[name](confusion)]
        }
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


def compute_mean_interval(values: np.ndarray, level: float = 0.95, *, smallest: float = -np.inf) -> tuple[float, float]:
    """Return the normal interval of the mean of `values` (float [N]), cut at `smallest`; NaN for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = compute_quantile(level) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return max(float(np.mean(values) - half), smallest), float(np.mean(values) + half)


def iterate_row_weights(n: int, resamples: int, generator: np.random.Generator) -> Iterator[tuple[int, np.ndarray]]:
    """Yield bootstrap resamples of n rows as how often each row was drawn.

    Yields:
        (number of the first resample, float32 [R, n] of counts whose rows sum to n), in pieces of at most
        16 MB, `resamples` in all.
    """
    chunk = max(1, _CELLS_AT_ONCE // n)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(0, n, size=(size, n), dtype=np.int32)
        drawn += np.arange(0, size * n, n, dtype=np.int32)[:, None]
        yield start, np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float32)
