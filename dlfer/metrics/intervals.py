"""Closed-form confidence intervals of proportions, of means, and of all metrics of a confusion matrix.

Every nominal 95 % interval contains the true value in at least 93 % of simulated test sets; where it would not, no
interval is given but the reason (`benchmarks/coverage.py`; the table is in results/coverage/). Intervals of areas under
curves are in `curves`.

Images are assumed to be drawn independently, so the number of images of each class is random. Intervals per class are
Wilson's (given the number of images with this target or this prediction, the number of correct ones is binomial).
Averages combine the limits of the classes (MOVER). The others use Wilson's interval with the effective number of images
of their delta-method variance. A class that is the target of no image is excluded, as it is from the values.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from dlfer.metrics import classification as mt

Interval = tuple[float, float]

UNDEFINED: Interval = (float("nan"), float("nan"))


def compute_quantile(level: float) -> float:
    """Return z such that a standard normal variable is in -z..z with probability `level` (0.95: z = 1.96)."""
    return NormalDist().inv_cdf(0.5 + level / 2)


def find_limit(is_within: Callable[[float], bool], inside: float, outside: float) -> float:
    """Return the limit of an interval between a value inside it and a value outside it, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_within(middle) else (inside, middle)
    return inside


def widen_level(level: float, degrees: int) -> float:
    """Return the level whose normal quantile equals Student's quantile for `level` with `degrees` degrees of freedom.

    It lets an interval that takes a level account for the uncertainty of an estimated variance.
    """
    from scipy.special import ndtr, stdtrit

    return float(2 * ndtr(stdtrit(degrees, 0.5 + level / 2)) - 1)


def compute_wilson_interval(successes: float, n: float, level: float = 0.95) -> Interval:
    """Return Wilson's score interval of a proportion, with the modified limits of Brown, Cai and DasGupta.

    It has good coverage for small n and near 0 and 1, where value +- 1.96 standard errors does not. For one to three
    successes (one or two if n <= 50) Wilson's lower limit is too high: a true proportion of 0.18 / n is missed in 16 %
    of samples. There the limit is the rate at which a Poisson variable reaches as many with probability 1 - level,
    divided by n. The upper limit for as few failures is modified in the same way.

    Args:
        successes: 0..n.
        n: number of trials; 0 gives (NaN, NaN).
        level: the nominal coverage, e.g. 0.95.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209; Brown, Cai & DasGupta, Stat. Sci. 16 (2001) 101, section 4.1.1.
    """
    if n == 0:
        return UNDEFINED
    low, high = _compute_score_limits(successes / n, n, compute_quantile(level))
    failures, few = n - successes, 2 if n <= 50 else 3
    # The limits at the ends are exactly 0 and 1; rounding must not move them by 1e-17.
    low = 0.0 if successes == 0 else low
    high = 1.0 if failures == 0 else high
    if 0 < successes <= few:
        low = min(low, _compute_poisson_limit(successes, level) / n)
    if 0 < failures <= few:
        high = max(high, 1 - _compute_poisson_limit(failures, level) / n)
    return low, high


def compute_proportion(successes: int, n: int) -> dict[str, float]:
    """Return {"value", "low", "high"} of a proportion with Wilson's 95 % interval; all NaN for n = 0."""
    low, high = compute_wilson_interval(successes, n)
    return {"value": successes / n if n else float("nan"), "low": low, "high": high}


_ROUNDING = 1e-12


def compute_effective_interval(
    value: float, variance: float, n: float, level: float = 0.95, *, degrees: int | None = None
) -> Interval:
    """Return Wilson's interval of an estimate, using the number of trials that would give its variance.

    Args:
        value: the estimate, in 0..1.
        variance: of the estimate, e.g. by the delta method.
        n: number of trials to use if the variance is 0 or the value is 0 or 1.
        degrees: degrees of freedom of the variance, at least 1, for Student's quantile. None: the variance is treated
            as known, and the normal quantile is used.

    Source: Kish, Survey Sampling (1965), 8.2 (effective sample size); Franco et al., J. Surv. Stat. Methodol. 7
    (2019) 334, on Wilson's interval with it.
    """
    from scipy.special import stdtrit

    # A value that rounding made 1e-17 instead of 0 would give an effective number of trials that is just as small.
    if variance > 0 and _ROUNDING < value < 1 - _ROUNDING:
        n = value * (1 - value) / variance
    elif degrees is None:
        return compute_wilson_interval(value * n, n, level)
    quantile = compute_quantile(level) if degrees is None else float(stdtrit(degrees, 0.5 + level / 2))
    low, high = _compute_score_limits(value, n, quantile)
    return min(low, value), max(high, value)


def _compute_score_limits(proportion: float, n: float, quantile: float) -> Interval:
    z2 = quantile**2
    centre = (proportion + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (proportion * (1 - proportion) + z2 / (4 * n)) / n) / (1 + z2 / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _compute_poisson_limit(count: float, level: float) -> float:
    """Return the rate at which a Poisson variable reaches `count` with probability 1 - level."""
    from scipy.special import gammaincinv

    return float(gammaincinv(count, 1 - level))


def compute_f1_interval(hits: int, misses: int, level: float = 0.95) -> Interval:
    """Return an interval of one class's F1 from its numbers of hits (TP) and misses (FP + FN).

    J = TP / (TP + FP + FN) is a proportion, and F1 = 2 J / (1 + J) increases with it, so Wilson's limits of J transform
    into limits of F1.

    Source: Lam, Gopal & Qian, "Confidence Intervals for the F1 Score" (2023), the indirect Wilson method.
    """
    low, high = compute_wilson_interval(hits, hits + misses, level)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def compute_mover_interval(
    values: np.ndarray, limits: np.ndarray, weights: np.ndarray, correlations: np.ndarray
) -> Interval:
    """Return the interval of a weighted sum of estimates from the intervals of the estimates.

    The weighted distances from the estimates to their limits are combined like standard errors, with the correlations
    of the estimates (method of variance estimates recovery, MOVER). Unlike a normal approximation, the result preserves
    the asymmetry of the intervals, and their width where an estimated variance is 0.

    Args:
        values: float [K], the estimates.
        limits: float [K, 2], lower and upper limit of each.
        weights: float [K], at least 0.
        correlations: float [K, K], of the estimates.

    Source: Zou, Huang & Zhang, Comput. Stat. Data Anal. 53 (2009) 1080; Zou & Donner, Stat. Med. 27 (2008) 1693.
    """
    total = float(weights @ values)
    below, above = weights * (values - limits[:, 0]), weights * (limits[:, 1] - values)
    low, high = (float(np.sqrt(max(side @ correlations @ side, 0.0))) for side in (below, above))
    return total - low, total + high


def compute_mean(values: np.ndarray) -> dict[str, float]:
    """Return {"value", "low", "high"} of the mean of losses (float [N], at least 0), by `compute_skew_interval`."""
    low, high = compute_skew_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def compute_mean_interval(values: np.ndarray, level: float = 0.95, *, smallest: float = -np.inf) -> Interval:
    """Return Student's interval of the mean of `values` (float [N]), with low at least `smallest`; NaN if N < 2."""
    if len(values) < 2:
        return UNDEFINED
    from scipy.special import stdtrit

    half = float(stdtrit(len(values) - 1, 0.5 + level / 2)) * float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return max(float(np.mean(values) - half), smallest), float(np.mean(values) + half)


def compute_skew_interval(values: np.ndarray, level: float = 0.95) -> Interval:
    """Return an interval of the mean of non-negative values with a long-tailed distribution, such as losses.

    It is Student's interval on the scale of Hall's cubic transformation, which removes the skewness of the mean. For
    the log loss at an accuracy of 95 % and 150 images, the untransformed interval covers 88 %, this one 96 %.

    Args:
        values: float [N], at least 0.

    Returns:
        (low, high) around the mean, with low at least 0; NaN for fewer than two values or if all values are equal,
        since the variance is then unknown.

    Source: Hall, J. R. Stat. Soc. B 54 (1992) 221.
    """
    n = len(values)
    if n < 2 or np.ptp(values) == 0:
        return UNDEFINED
    from scipy.special import stdtrit

    mean, spread = float(np.mean(values)), float(np.std(values))
    error, quantile = spread / np.sqrt(n - 1), float(stdtrit(n - 1, 0.5 + level / 2))
    skewness = float(np.mean(((values - mean) / spread) ** 3)) / np.sqrt(n)

    def invert(w: float) -> float:
        return 3 / skewness * (np.cbrt(1 + skewness * (w - skewness / 6)) - 1) if abs(skewness) > 1e-6 else w

    low, high = mean - error * invert(quantile), mean - error * invert(-quantile)
    return max(0.0, min(float(low), mean)), max(float(high), mean)


PER_CLASS = ("precision", "recall", "f1", "specificity", "one_vs_rest_accuracy")


def compute_class_intervals(confusion: np.ndarray, level: float = 0.95) -> dict[str, list[Interval]]:
    """Return metric -> interval of each class, for the metrics in PER_CLASS, from a confusion matrix (int [C, C]).

    The interval is (NaN, NaN) if the metric is undefined, and for the precision of a class that was never predicted.
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
    """Return metric -> interval, for each metric over all classes of a confusion matrix (int [C, C]).

    These are accuracy, weighted_recall (the same), macro_recall, balanced_accuracy (the same), macro_precision,
    macro_specificity, macro_f1, weighted_precision, weighted_f1, one_vs_rest_accuracy, mcc, cohen_kappa and
    emotion_detection_rate. MCC and kappa have (NaN, NaN) if all targets or all predictions are one class, specificity
    if all targets are one class.
    """
    total, hits = int(confusion.sum()), int(np.trace(confusion))
    accuracy = compute_wilson_interval(hits, total, level)
    per_class = compute_class_intervals(confusion, level)
    macros = {name: _compute_macro(name, confusion, per_class[name]) for name in ("recall", "precision", "f1")}
    macros["specificity"] = _compute_macro_specificity(confusion, level)
    if len(confusion) == 2 and (mt.compute_support(confusion) > 0).all():
        macros["specificity"] = macros["recall"]  # the specificity of each class is the recall of the other
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
    """Return an interval of the fraction of classes whose most frequent prediction is correct.

    A class is significantly detected if its own label is predicted significantly more often for its images than every
    other label, and significantly undetected if some other label is predicted significantly more often than its own
    (exact sign tests, Bonferroni's correction over classes and, for undetected, labels). The lower limit counts classes
    that are significantly detected, the upper one those not significantly undetected; the interval is conservative.
    """
    from scipy.special import bdtrc

    present = np.flatnonzero(mt.compute_support(confusion))
    alpha = (1 - level) / 2 / len(present)
    detected = undetected = 0
    for c in present:
        hits, others = confusion[c, c], np.delete(confusion[c], c)
        # One-sided sign tests: binomial tail probabilities of the two counts if both labels are equally likely.
        more, fewer = bdtrc(hits - 1, hits + others, 0.5), bdtrc(others - 1, hits + others, 0.5)
        detected += bool((more <= alpha).all()) if len(others) else bool(hits)
        undetected += bool((fewer <= alpha / max(len(others), 1)).any())
    return detected / len(present), (len(present) - undetected) / len(present)


_RATIOS = {
    # metric -> (numerator, denominator), as weights of the cells of the confusion matrix for each class, [C, C, C]
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
    """Return the derivative of each class's metric with respect to each cell of the matrix (float64 [C, C, C]).

    The metrics are ratios A / B of sums of cells, so the derivative is (a - A / B b) / B; it is 0 if B is 0.
    """
    number = np.arange(len(confusion))
    target = np.broadcast_to((number[:, None] == number)[:, :, None], (len(number),) * 3).astype(np.float64)
    given = target.swapaxes(1, 2)
    counted, of_all = _RATIOS[name](target * given, target, given)
    above, below = (np.einsum("cij,ij->c", weights, confusion) for weights in (counted, of_all))
    ratio = np.divide(above, below, out=np.zeros(len(number)), where=below > 0)
    return (counted - ratio[:, None, None] * of_all) / np.where(below > 0, below, np.inf)[:, None, None]


def _compute_macro(name: str, confusion: np.ndarray, intervals: list[Interval]) -> Interval:
    """Combine the limits of the classes that have rows, with correlations by the delta method.

    Recalls are uncorrelated given the number of images of each class, and so are precisions. The F1 values are
    correlated, since each error counts in two classes.
    """
    values, limits = _VALUES[name](confusion), np.array(intervals)
    counted = (mt.compute_support(confusion) > 0) & ~np.isnan(values)
    if not counted.any():
        return UNDEFINED
    # The precision of a class that was never predicted counts as 0, but its true value may be anything in 0..1.
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
    """Return Wilson's interval of macro specificity with the effective number of images.

    The classes share the same few errors, so combining their limits covers too little (91 % at an accuracy of 95 %).
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
    # The first part is the effect on the weights, which are random, the second that on the metric of each class.
    effects = values[:, None] - value + np.einsum("c,cij->ij", support, _compute_ratio_effects(name, confusion))
    return compute_effective_interval(value, _compute_variance(effects, confusion), int(confusion.sum()), level)


def _compute_agreement(confusion: np.ndarray, level: float) -> dict[str, Interval]:
    """Return the intervals of MCC and kappa.

    1 - (1 - m) (1 - chance) equals the accuracy if m is kappa, and is close to it if m is MCC. Wilson's interval of
    this quantity, with its effective number of images, is transformed back, so it is valid even if no image is wrong.
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
    """Return the variance of a metric from the effect of an image in each cell on n times the metric (mean 0)."""
    n = int(confusion.sum())
    return float((confusion * effects**2).sum()) / n / max(n - 1, 1)
