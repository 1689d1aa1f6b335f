"""What k folds say: of the k models that were trained, of the recipe, and of the difference of two recipes.

In cross-validation each image is judged once, by the model that did not see it. Two questions have two answers:

- How accurate are these k models on new images? The pooled accuracy has the uncertainty of n images, since a central limit
  theorem holds around the mean accuracy of the k models, although their training images overlap (Bayle et al., NeurIPS 33
  (2020) 16339). Images of one group (duplicates, or a subject) vary together, so that the interval counts groups.
- How accurate is the recipe, trained on other images of the same number? The variance of the k accuracies does not show what
  the overlap of the training images hides, and no unbiased estimator of that exists (Bengio & Grandvalet, J. Mach. Learn.
  Res. 5 (2004) 1089). Nadeau and Bengio's correction takes the correlation of two folds as the share of the images that
  are in a fold, 1 / k, which adds 1 / (k - 1) to 1 / k. They derived it for test sets that overlap as well; the folds do
  not, so that it is applied to what trainings vary, and the uncertainty of the n images is added without it.

benchmarks/crossval_coverage.py measures the coverage of both and the false alarms of the test, beside those of the plain
correction and of others; its table is in results/statistics/.
"""

from __future__ import annotations

import math

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_effective_interval, compute_wilson_interval, widen_level
from dlfer.metrics.seeds import compute_t_quantile
from dlfer.runs.comparison_record import PairedTest
from dlfer.runs.metrics_record import Estimate

CORRECTED_T = "t test over folds with Nadeau and Bengio's correction"

ONE_GROUP = "all images are in one group of duplicates or of a subject"
ONE_FOLD = "one fold has finished, which does not show how folds vary"


def compute_trained_accuracy(correct: np.ndarray, groups: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Return the accuracy of the trained models, with its interval over the groups of images.

    Wilson's interval with the effective number of images, by the variance between groups, and Student's quantile for the number
    of groups. Where each group is one image, it is Wilson's interval itself.

    Args:
        correct: bool [n], whether the model that judged an image is right.
        groups: int [n], the same number for images that vary together.
        level: the probability of covering.

    Source: Korn & Graubard, Surv. Methodol. 24 (1998) 193; Franco et al., J. Surv. Stat. Methodol. 7 (2019) 334.
    """
    correct = np.asarray(correct, np.float64)
    value, n, num_groups = float(correct.mean()), len(correct), len(np.unique(groups))
    if num_groups == n:
        low, high = compute_wilson_interval(float(correct.sum()), n, level)
    elif num_groups < 2:
        return Estimate(value=value, reason=ONE_GROUP)
    else:
        low, high = compute_effective_interval(
            value, _compute_cluster_variance(correct, groups), num_groups, widen_level(level, num_groups - 1)
        )
    return Estimate(value=value, low=low, high=high)


def compute_recipe_accuracy(
    correct: np.ndarray, groups: np.ndarray, folds: np.ndarray, *, num_folds: int, level: float = 0.95
) -> Estimate:
    """Return the accuracy of the recipe on training sets of this size, with its interval over images and trainings.

    Args:
        correct: bool [n], whether the model that judged an image is right.
        groups: int [n], the same number for images that vary together.
        folds: int [n], the fold that each image is in; of the `num_folds` folds some may be absent.
        num_folds: the number into which all images were divided.
        level: the probability of covering.

    Source: Nadeau & Bengio, Mach. Learn. 52 (2003) 239.
    """
    correct = np.asarray(correct, np.float64)
    value, present = float(correct.mean()), np.unique(folds)
    if len(present) < 2:
        return Estimate(value=value, reason=ONE_FOLD)
    error = _compute_corrected_error(correct, groups, folds, num_folds=num_folds)
    half = compute_t_quantile(len(present) - 1, level) * error
    low, high = max(value - half, 0.0), min(value + half, 1.0)
    trained = compute_trained_accuracy(correct, groups, level=level)
    if trained.low is not None:  # where every image is right or wrong, no variance shows
        low, high = min(low, trained.low), max(high, trained.high)
    return Estimate(value=value, low=low, high=high)


def compare_folds(
    correct: tuple[np.ndarray, np.ndarray],
    groups: np.ndarray,
    folds: np.ndarray,
    *,
    num_folds: int,
    names: tuple[str, str],
    level: float = 0.95,
) -> PairedTest:
    """Compare two recipes by the folds that both were judged on: a t test with the error of `compute_recipe_accuracy`.

    Args:
        correct: of each recipe bool [n], whether the model that judged an image is right; the same images in the same order.
        groups, folds, num_folds: as `compute_recipe_accuracy` takes them.
        names: what the two recipes are called.
        level: the probability that the interval covers the true difference.

    Raises:
        DataError: fewer than two folds.

    Source: Nadeau & Bengio, Mach. Learn. 52 (2003) 239; for folds: Bouckaert & Frank, PAKDD 2004, LNCS 3056, 3.
    """
    from scipy.special import stdtr

    a, b = (np.asarray(side, np.float64) for side in correct)
    present = np.unique(folds)
    if len(present) < 2:
        raise DataError(f"compare_folds: found {len(present)} fold that both have, expected two or more.")
    difference, df = float((a - b).mean()), len(present) - 1
    # Two pseudo-images, one right in a alone and one in b alone, keep the variance of few discordant images from zero.
    error = _compute_corrected_error(a - b, groups, folds, num_folds=num_folds, pseudo=2)
    half = compute_t_quantile(df, level) * error
    low, high = max(difference - half, -1.0), min(difference + half, 1.0)
    per_fold = [100 * float((a - b)[folds == fold].mean()) for fold in present]
    return PairedTest(
        names=list(names),
        scope="recipes",
        n=len(a),
        accuracy_a=float(a.mean()),
        accuracy_b=float(b.mean()),
        difference=Estimate(value=100 * difference, low=100 * low, high=100 * high),
        differences=per_fold,
        num_folds=len(present),
        sd_over_folds=float(np.std(per_fold, ddof=1)),
        test=CORRECTED_T,
        df=df,
        p_value=float(2 * stdtr(df, -abs(difference) / error)),
        is_significant=bool(low > 0 or high < 0),
        level=level,
    )


def _compute_corrected_error(
    values: np.ndarray, groups: np.ndarray, folds: np.ndarray, *, num_folds: int, pseudo: int = 0
) -> float:
    """Return the standard error of the mean of `values` (float [n]) over images and trainings.

    What trainings vary is the variance of the folds' means less what their images make of it, and at least zero.
    """
    present = np.unique(folds)
    means = np.array([values[folds == fold].mean() for fold in present])
    of_images = _compute_cluster_variance(values, groups, pseudo=pseudo)
    of_training = max(float(means.var(ddof=1)) - len(present) * of_images, 0.0)
    return math.sqrt(of_images + (1 / len(present) + 1 / (num_folds - 1)) * of_training)


def _compute_cluster_variance(values: np.ndarray, groups: np.ndarray, *, pseudo: int = 0) -> float:
    """Return the variance of the mean of `values` (float [n] in -1..1) that the draw of groups of images makes.

    It is at least that of independent images; `pseudo` images of the value 1 or -1 are added to the squares.
    """
    n, centred = len(values), values - values.mean()
    independent = (float((centred**2).sum()) + pseudo) / (n + pseudo) / (n + pseudo)
    _, dense = np.unique(groups, return_inverse=True)
    sums = np.bincount(dense, weights=centred)
    if len(sums) < 2:
        return independent
    clustered = len(sums) / (len(sums) - 1) * float((sums**2).sum()) / n**2
    return max(clustered, independent)
