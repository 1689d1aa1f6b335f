"""Statistics of recipes that were trained with several seeds, with seeds and images as random effects.

A recipe is evaluated by S trainings, each on the same n images. Other trainings and other images would give other
accuracies, so an interval for the recipe must account for both. Whether a training is right on an image is modelled
with crossed random effects, y[s, i] = mean + seed[s] + image[i] + residual[s, i]. The variances are estimated from the
mean squares of the two-way layout. The variance of the seeds has only S - 1 degrees of freedom, so the quantile is
Student's instead of 1.96, with Satterthwaite's degrees of freedom for the sum of the variance components.

benchmarks/seed_tests.py measures the false positive rate and the coverage; its table is in results/statistics/.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_mean_interval, compute_quantile, compute_wilson_interval
from dlfer.runs.comparison_record import More, SeedsAndImages

POWER = 0.8
"""The power, the probability of detecting the assumed difference, for which further seeds and images are planned."""

MAX_SEEDS = 1000
"""Plans that need more seeds than this are not proposed."""

MAX_IMAGES = 10**9
"""Plans that need more images than this are not proposed."""


class TwoWay(NamedTuple):
    """The two-way layout of one recipe, seeds by images.

    Attributes:
        mean: accuracy over all seeds and images, in 0..1.
        per_seed: float64 [S], the accuracy of each training.
        per_image: float64 [n], the fraction of trainings that are right on each image.
        seed_variance: of `per_seed`, with S - 1 degrees of freedom, but at least its expectation without a seed effect,
            residual_variance / n: two trainings may have equal accuracies by chance.
        residual_variance: the mean square of the residual that neither the seed nor the image explains,
            with (S - 1)(n - 1) degrees of freedom.
    """

    mean: float
    per_seed: np.ndarray
    per_image: np.ndarray
    seed_variance: float
    residual_variance: float


class Comparison(NamedTuple):
    """The difference of two recipes and the components of its uncertainty; all values are fractions.

    Attributes:
        difference: mean accuracy of a - mean accuracy of b, in -1..1.
        centre: the midpoint of the interval, the difference multiplied by n / (n + 2).
        error: the standard error.
        df: Satterthwaite's degrees of freedom.
        seed_variances: of the accuracies over seeds, of each recipe.
        residual_variances: of each recipe.
        image_variance: of the image effects of the difference.
        num_seeds, num_images: S, the smaller one of both recipes, and n.
    """

    difference: float
    centre: float
    error: float
    df: float
    seed_variances: tuple[float, float]
    residual_variances: tuple[float, float]
    image_variance: float
    num_seeds: int
    num_images: int

    def compute_interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the interval (low, high) of the difference, in -1..1; it always contains the difference."""
        half = compute_t_quantile(self.df, level) * self.error
        low, high = min(self.centre - half, self.difference), max(self.centre + half, self.difference)
        return max(low, -1.0), min(high, 1.0)

    def compute_p_value(self) -> float:
        """Return the two-sided p value of the hypothesis that the recipes are equally accurate."""
        from scipy.special import stdtr

        return 1.0 if self.error == 0 else float(2 * stdtr(self.df, -abs(self.centre) / self.error))


def decompose(correct: np.ndarray) -> TwoWay:
    """Return the means and variance components of one recipe's two-way layout.

    Args:
        correct: bool or float [S, n] in 0..1, whether each training is right on each image; S at least 2.

    Source: Searle, Casella & McCulloch, Variance Components (1992), chapter 4.
    """
    correct = np.asarray(correct, dtype=np.float64)
    num_seeds, n = correct.shape
    per_seed, per_image, mean = correct.mean(axis=1), correct.mean(axis=0), float(correct.mean())
    total = float(((correct - mean) ** 2).sum())
    of_seeds, of_images = n * float(((per_seed - mean) ** 2).sum()), num_seeds * float(((per_image - mean) ** 2).sum())
    residual = max(total - of_seeds - of_images, 0.0) / ((num_seeds - 1) * max(n - 1, 1))
    return TwoWay(mean, per_seed, per_image, max(float(per_seed.var(ddof=1)), residual / n), residual)


def compare_recipes(correct_a: np.ndarray, correct_b: np.ndarray) -> Comparison:
    """Compare two recipes, each trained with several seeds and evaluated on the same images.

    The seeds of the two recipes are treated as independent samples (Welch), although the same seed gives both the same
    order of images; if this makes their trainings similar, the test is conservative. The images are the same, so only
    the differences of their effects count. Two pseudo-images, one that only a and one that only b gets right, keep the
    variance above zero when few images differ (Bonett and Price).

    Args:
        correct_a: bool or float [S, n], S at least 2.
        correct_b: likewise for the other recipe, with the same images in the same order; S may differ.

    Source: Welch, Biometrika 34 (1947) 28; Satterthwaite, Biometrics Bull. 2 (1946) 110; for crossed random effects
    Clark, J. Verbal Learn. Verbal Behav. 12 (1973) 335; Bonett & Price, J. Educ. Behav. Stat. 37 (2012) 479.
    """
    a, b = decompose(correct_a), decompose(correct_b)
    counts = len(a.per_seed), len(b.per_seed)
    n = len(a.per_image)
    of_seeds = [side.seed_variance / count for side, count in zip((a, b), counts, strict=True)]
    of_residual = [side.residual_variance / count for side, count in zip((a, b), counts, strict=True)]
    differences = a.per_image - b.per_image
    centre = float(differences.sum()) / (n + 2)
    image_square = (float((differences**2).sum()) + 2) / (n + 2) - centre**2
    df_images = max(n - 1, 1)
    error, df = combine_variances(
        [(variance, count - 1) for variance, count in zip(of_seeds, counts, strict=True)],
        added=(image_square / (n + 2), df_images),
        subtracted=(sum(of_residual) / n, df_images * (min(counts) - 1)),
    )
    return Comparison(
        difference=a.mean - b.mean,
        centre=centre,
        error=error,
        df=df,
        seed_variances=(a.seed_variance, b.seed_variance),
        residual_variances=(a.residual_variance, b.residual_variance),
        image_variance=max(image_square - sum(of_residual), 0.0),
        num_seeds=min(counts),
        num_images=n,
    )


def combine_variances(
    seeds: Sequence[tuple[float, float]], *, added: tuple[float, float], subtracted: tuple[float, float]
) -> tuple[float, float]:
    """Return the standard error of a mean over seeds and images, and its degrees of freedom.

    The variance over images and the variance over seeds both include the residual, so it is subtracted once; the
    remaining variance of the images is at least zero.

    Args:
        seeds: (variance, degrees of freedom) of each recipe's mean over seeds.
        added: (variance, degrees of freedom) of the mean over images.
        subtracted: (variance, degrees of freedom) of the residual that `added` includes.

    Returns:
        The standard error, and Satterthwaite's degrees of freedom, at least the smallest number of those in `seeds`.
    """
    images = max(added[0] - subtracted[0], 0.0)
    variance = sum(value for value, _ in seeds) + images
    spread = sum(value**2 / df for value, df in seeds)
    if images > 0:
        spread += added[0] ** 2 / added[1] + subtracted[0] ** 2 / subtracted[1]
    smallest = min(df for _, df in seeds)
    df = variance**2 / spread if spread > 0 else smallest
    return math.sqrt(variance), max(df, smallest)


def compute_t_quantile(df: float, level: float = 0.95) -> float:
    """Return t such that a Student's t variable with `df` degrees of freedom is in -t..t with probability `level`."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + level / 2))


class SeedSummary(NamedTuple):
    """The accuracy of a recipe over several seeds; all accuracies are in 0..1.

    Attributes:
        num_seeds, n: numbers of trainings and of images.
        value: mean accuracy over seeds.
        per_seed: the accuracy of each training.
        sd_over_seeds: their standard deviation; None for one seed.
        items: interval (low, high) for these trainings on other images.
        items_and_seeds: interval (low, high) for the recipe with other seeds on other images; None for one seed.
    """

    num_seeds: int
    n: int
    value: float
    per_seed: list[float]
    sd_over_seeds: float | None
    items: tuple[float, float]
    items_and_seeds: tuple[float, float] | None


def compute_seed_summary(correct: np.ndarray, *, level: float = 0.95) -> SeedSummary:
    """Return the accuracy of a recipe that was trained with several seeds and evaluated on the same images.

    Args:
        correct: bool [S, n], or float in 0..1: whether the training with each seed is right on each image.

    Returns:
        The summary. `items` is Wilson's interval for one seed, or if the fraction of correct trainings is the same for
        all images. `items_and_seeds` is wide for two or three seeds, because they estimate the variance poorly.

    Raises:
        DataError: `correct` is not two-dimensional, or is empty.
    """
    correct = np.asarray(correct, dtype=np.float64)
    if correct.ndim != 2 or correct.size == 0:
        raise DataError(f"seed summary: found an array of shape {correct.shape}, expected [seeds, images], not empty.")
    num_seeds, n = correct.shape
    per_seed, per_image = correct.mean(axis=1), correct.mean(axis=0)
    value = float(per_seed.mean())
    if num_seeds == 1 or n == 1 or np.ptp(per_image) == 0:
        items = compute_wilson_interval(float(per_image.sum()), n, level)
    else:
        low, high = compute_mean_interval(per_image, level, smallest=0.0)
        items = low, min(high, 1.0)
    if num_seeds == 1:
        return SeedSummary(num_seeds, n, value, per_seed.tolist(), None, items, None)
    both = items if n == 1 else _compute_recipe_interval(correct, items, level)
    return SeedSummary(num_seeds, n, value, per_seed.tolist(), float(per_seed.std(ddof=1)), items, both)


def _compute_recipe_interval(correct: np.ndarray, items: tuple[float, float], level: float) -> tuple[float, float]:
    """Return the interval over seeds and images, or `items` if the variance over both is 0.

    The quantile is the mean of Student's for the seeds and the normal one for the images, weighted by the variances
    (Cochran). With only one variance of few degrees of freedom Satterthwaite's formula is too optimistic: it covers 87
    to 93 % for two seeds, this one 94 % and more.

    Source: Cochran, Biometrics 20 (1964) 191.
    """
    layout = decompose(correct)
    num_seeds, n = correct.shape
    of_seeds = layout.seed_variance / num_seeds
    of_images = float(layout.per_image.var(ddof=1)) / n - layout.residual_variance / (num_seeds * n)
    of_images = max(of_images, 0.0)
    variance = of_seeds + of_images
    if variance == 0:
        return items
    quantiles = compute_t_quantile(num_seeds - 1, level), compute_quantile(level)
    quantile = (quantiles[0] * of_seeds + quantiles[1] * of_images) / variance
    half = quantile * math.sqrt(variance)
    return max(layout.mean - half, 0.0), min(layout.mean + half, 1.0)


def plan_more(comparison: Comparison, *, level: float = 0.95) -> More:
    """Return how many seeds, images or both are needed to detect a difference as large as the observed one.

    The result is an order of magnitude: it assumes that the observed difference and the observed variances of seeds,
    images and residual are the true ones, and few seeds estimate these poorly. For a difference that is not significant
    each plan is larger than the present experiment. `both` is set only if neither seeds nor
    images alone are enough; all three are None for a difference of zero.
    """
    seeds = images = both = None
    if comparison.centre != 0:
        s, n = comparison.num_seeds, comparison.num_images
        low, high = comparison.compute_interval(level)
        added = int(low <= 0 <= high)
        seeds = _find_smallest(lambda number: _compute_power(comparison, number, n, level), s + added, MAX_SEEDS)
        images = _find_smallest(lambda number: _compute_power(comparison, s, number, level), n + added, MAX_IMAGES)
        both = _plan_both(comparison, level) if seeds is None and images is None else None
    return More(power=POWER, seeds=seeds, images=images, both=both)


def _plan_both(comparison: Comparison, level: float) -> SeedsAndImages | None:
    """Return 1.25 times the seeds that would be enough with any number of images, and the images needed with these."""
    s, n = comparison.num_seeds, comparison.num_images
    least = _find_smallest(lambda number: _compute_power(comparison, number, MAX_IMAGES, level), s, MAX_SEEDS)
    if least is None:
        return None
    seeds = min(math.ceil(1.25 * least), MAX_SEEDS)
    images = _find_smallest(lambda number: _compute_power(comparison, seeds, number, level), n, MAX_IMAGES)
    return None if images is None else SeedsAndImages(seeds=seeds, images=images)


def _compute_power(comparison: Comparison, num_seeds: int, num_images: int, level: float) -> float:
    """Return the power of the test with other numbers of seeds and images, by the noncentral t distribution."""
    from scipy.special import nctdtr, ndtr

    # The observed variances of the seeds include the residual of the present images; replace it by that of num_images.
    of_seeds = [
        max(seeds - residual / comparison.num_images, 0.0) + residual / num_images
        for seeds, residual in zip(comparison.seed_variances, comparison.residual_variances, strict=True)
    ]
    residual, df_images = sum(comparison.residual_variances) / num_seeds, max(num_images - 1, 1)
    error, df = combine_variances(
        [(variance / num_seeds, num_seeds - 1) for variance in of_seeds],
        added=((comparison.image_variance + residual) / num_images, df_images),
        subtracted=(residual / num_images, df_images * (num_seeds - 1)),
    )
    if error == 0:
        return 1.0
    centrality = abs(comparison.difference) / error
    quantile = compute_t_quantile(df, level)
    if df > 10_000 or centrality > 30:  # use the normal limit here, since the noncentral t is slow to compute
        return float(ndtr(centrality - quantile))
    return float(1 - nctdtr(df, centrality, quantile))


def _find_smallest(compute_power: Callable[[int], float], least: int, most: int) -> int | None:
    """Return the smallest number from `least` to `most` that reaches the power, or None if `most` does not."""
    if compute_power(most) < POWER:
        return None
    return least + bisect_left(range(least, most), POWER, key=compute_power)
