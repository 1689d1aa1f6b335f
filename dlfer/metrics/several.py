"""Significance tests for two or more classifiers on the same images, and for the k models of a cross-validation.

Cochran's Q tests whether any classifiers differ and McNemar's test which pairs do; Holm's correction keeps the
probability of any false positive among all pairs at 5 %.

In cross-validation each image is predicted once, by the model not trained on it. This answers two questions:

- How accurate are these k models on new images? The pooled accuracy has the uncertainty of n images, since a central limit
  theorem holds around the mean accuracy of the k models, although their training images overlap (Bayle et al., NeurIPS 33
  (2020) 16339). Images of one group (duplicates, or a subject) are correlated, so the interval counts groups.
- How accurate is the recipe, trained on another sample of the same size? The overlap of the training images correlates
  the k accuracies, which their variance does not show, and no unbiased estimator of this exists (Bengio & Grandvalet,
  J. Mach. Learn. Res. 5 (2004) 1089). Nadeau and Bengio's correction assumes that the correlation of two folds is the
  fraction of the images in a fold, 1 / k, which adds 1 / (k - 1) to 1 / k. They derived it for test sets that overlap
  as well; folds do not, so only the variance between trainings is corrected, and that of the n images added as it is.

benchmarks/crossval_coverage.py measures the coverage of both intervals and the false positive rate of the test, as well
as those of the original correction and of other methods; its table is in results/statistics/.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_effective_interval, compute_wilson_interval
from dlfer.metrics.paired import compare_paired, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_scores
from dlfer.metrics.seeds import compute_t_quantile
from dlfer.runs.comparison_record import CochranQ, ComparedRun, ModelComparison, PairedTest
from dlfer.runs.metrics_record import Estimate, McNemar, ModelPair, ViewMetrics


def match_predictions(several: Sequence[Predictions], names: Sequence[str]) -> list[Predictions]:
    """Return the rows common to all predictions, sorted by id, with the labels in the order of the first.

    Args:
        several: predictions of different classifiers; the orders of rows and labels may differ.
        names: the name of each in messages.

    Raises:
        DataError: the sets of labels differ, no id is common to all, or an image has different targets.
    """
    first = several[0]
    for other, name in zip(several[1:], names[1:], strict=True):
        if set(other.labels) != set(first.labels):
            raise DataError(
                f"{name}: found the labels {', '.join(other.labels)}, expected those of {names[0]}: "
                f"{', '.join(first.labels)}. Compare models of one set of labels."
            )
    common = first.ids
    for other, name in zip(several[1:], names[1:], strict=True):
        common = np.intersect1d(common, other.ids)
        if not len(common):
            raise DataError(
                f"{name}: found no id in common with {', '.join(names[: names.index(name)])} "
                f"(here e.g. {str(other.ids[0])!r}, there {str(first.ids[0])!r}); expected predictions of the same "
                "images. Evaluate the models on one split."
            )
    matched = [_select(predictions, common, first.labels) for predictions in several]
    for other, name in zip(matched[1:], names[1:], strict=True):
        wrong = np.flatnonzero(other.targets != matched[0].targets)
        if len(wrong):
            row = wrong[0]
            raise DataError(
                f"{name}: {len(wrong)} of {len(other)} images have another target than in {names[0]}, e.g. "
                f"{str(other.ids[row])!r}: {first.labels[other.targets[row]]}, there "
                f"{first.labels[matched[0].targets[row]]}. Evaluate the models on one version of the data."
            )
    return matched


def compare_several(several: Sequence[Predictions], names: Sequence[str], *, level: float = 0.95) -> ModelComparison:
    """Compare the accuracies of two or more classifiers on the images that all of them predicted.

    Args:
        several: the predictions of each.
        names: the name of each, without repetitions.
        level: the nominal coverage of the intervals, and 1 - the probability of any false positive among the pairs.

    Returns:
        The runs, Cochran's Q (None for two), and every pair; accuracies and differences as fractions.

    Raises:
        DataError: there are fewer than two, a name is repeated, or the predictions cannot be matched.
    """
    if len(several) < 2 or len(set(names)) != len(several):
        raise DataError(f"comparison: found {len(several)} predictions named {', '.join(names)}; expected two or more.")
    matched = match_predictions(several, list(names))
    correct = np.stack([predictions.correct for predictions in matched])
    n = correct.shape[1]
    runs = []
    for name, predictions, row in zip(names, several, correct, strict=True):
        low, high = compute_wilson_interval(int(row.sum()), n, level)
        accuracy = Estimate(value=float(row.mean()), low=low, high=high)
        own = len(predictions)
        runs.append(ComparedRun(name=name, n=n, num_images=own, left_out=own - n, accuracy=accuracy))
    return ModelComparison(
        runs=runs,
        n_common=n,
        cochran_q=compute_cochran_q(correct) if len(several) > 2 else None,
        pairs=_compare_pairs(matched, names, level),
    )


def compute_cochran_q(correct: np.ndarray) -> CochranQ:
    """Return Cochran's Q test of whether k >= 2 classifiers, right on images as in bool [k, N], are equally accurate.

    If all classifiers are right on the same images, the statistic is 0 and p is 1.

    Source: Cochran, Biometrika 37 (1950) 256.
    """
    correct = np.asarray(correct, dtype=np.int64)
    k = len(correct)
    of_classifiers, of_images = correct.sum(axis=1), correct.sum(axis=0)
    total = int(of_images.sum())
    spread = k * total - int((of_images**2).sum())
    if spread == 0:
        return CochranQ(statistic=0.0, p=1.0, df=k - 1)
    from scipy.special import chdtrc

    statistic = (k - 1) * (k * int((of_classifiers**2).sum()) - total**2) / spread
    return CochranQ(statistic=float(statistic), p=float(chdtrc(k - 1, statistic)), df=k - 1)


def compute_holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values with Holm's correction for multiple tests, which controls the family-wise error rate.

    Source: Holm, Scand. J. Stat. 6 (1979) 65.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return corrected.tolist()


def compute_difference(a: Predictions, b: Predictions, *, level: float = 0.95) -> Estimate:
    """Return accuracy of a - accuracy of b on the same images, in -1..1, with its interval.

    Raises:
        DataError: the two have different images.
    """
    return _to_fractions(compare_paired(a, b, level=level).difference)


def _compare_pairs(matched: Sequence[Predictions], names: Sequence[str], level: float) -> list[ModelPair]:
    results = [
        compare_paired(matched[i], matched[j], names=(names[i], names[j]), level=level)
        for i, j in combinations(range(len(matched)), 2)
    ]
    pairs = []
    for result, p_holm in zip(results, compute_holm([result.p_value for result in results]), strict=True):
        is_significant = result.is_significant and p_holm < 1 - level
        result = result.model_copy(
            update={"p_holm": p_holm, "num_pairs": len(results), "is_significant": is_significant}
        )
        pairs.append(
            ModelPair(
                a=result.names[0],
                b=result.names[1],
                difference=_to_fractions(result.difference),
                unit="fraction",
                mcnemar=McNemar(b=result.a_only, c=result.b_only, p=result.p_value, method=result.test),
                p_holm=p_holm,
                required_n=result.required_n,
                is_significant=is_significant,
                sentence=describe_difference(result),
            )
        )
    return pairs


def _select(predictions: Predictions, ids: np.ndarray, labels: tuple[str, ...]) -> Predictions:
    """Return the predictions of `ids` in that order, with the classes in the order of `labels`."""
    order = np.argsort(predictions.ids)
    rows = order[np.searchsorted(predictions.ids, ids, sorter=order)]
    columns = [predictions.labels.index(label) for label in labels]
    rank = np.argsort(columns)
    return Predictions(ids, labels, rank[predictions.targets[rows]], predictions.probabilities[rows][:, columns])


def _to_fractions(points: Estimate) -> Estimate:
    return Estimate(value=points.value / 100, low=points.low / 100, high=points.high / 100)


def compute_view_scores(viewed: Predictions, single: Predictions, *, view: str) -> ViewMetrics:
    """Return the metrics of predictions averaged over views, and the difference from those of the single view.

    Raises:
        DataError: the two have no image in common, or an image has different targets.
    """
    scores = compute_scores(viewed)
    pair = compare_several([viewed, single], [view, "single view"]).pairs[0]
    return ViewMetrics(n=scores.n, accuracy=scores.accuracy, macro_f1=scores.macro_f1, paired=pair)


CORRECTED_T = "t test over folds with Nadeau and Bengio's correction"

ONE_GROUP = "all images are in one group of duplicates or of a subject"
ONE_FOLD = "one fold has finished, which does not show how folds vary"


def compute_trained_accuracy(correct: np.ndarray, groups: np.ndarray, *, level: float = 0.95) -> Estimate:
    """Return the accuracy of the trained models, with its interval over the groups of images.

    It is Wilson's interval with the effective number of images, from the variance between groups, and Student's
    quantile for the number of groups. If each group is a single image, it is the plain Wilson interval.

    Args:
        correct: bool [n], whether the model that predicted an image is right.
        groups: int [n], the same number for correlated images.

    Source: Korn & Graubard, Surv. Methodol. 24 (1998) 193; Franco et al., J. Surv. Stat. Methodol. 7 (2019) 334.
    """
    correct = np.asarray(correct, np.float64)
    value, n, num_groups = float(correct.mean()), len(correct), len(np.unique(groups))
    if num_groups == n:
        low, high = compute_wilson_interval(float(correct.sum()), n, level)
    elif num_groups < 2:
        return Estimate(value=value, reason=ONE_GROUP)
    else:
        variance = _compute_cluster_variance(correct, groups)
        low, high = compute_effective_interval(value, variance, num_groups, level, degrees=num_groups - 1)
    return Estimate(value=value, low=low, high=high)


def compute_recipe_accuracy(
    correct: np.ndarray, groups: np.ndarray, folds: np.ndarray, *, num_folds: int, level: float = 0.95
) -> Estimate:
    """Return the accuracy of the recipe on training sets of this size, with its interval over images and trainings.

    Args:
        correct: bool [n], whether the model that predicted an image is right.
        groups: int [n], the same number for correlated images.
        folds: int [n], the fold that each image is in; some of the `num_folds` folds may be absent.
        num_folds: the number of folds of the cross-validation.

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
    if trained.low is not None:  # if all predictions are right, or all wrong, the estimated variance is 0
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
    """Compare two recipes on the folds that both have, by a t test with the error of `compute_recipe_accuracy`.

    Args:
        correct: bool [n] of each recipe, whether the model that predicted an image is right; for the same images.
        groups, folds, num_folds: as for `compute_recipe_accuracy`.
        names: the names of the two recipes.

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
    # Two pseudo-images, one that only a and one that only b gets right, keep the variance above 0.
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

    The variance between trainings is that of the folds' means minus the part due to their images, at least zero.
    """
    present = np.unique(folds)
    means = np.array([values[folds == fold].mean() for fold in present])
    of_images = _compute_cluster_variance(values, groups, pseudo=pseudo)
    of_training = max(float(means.var(ddof=1)) - len(present) * of_images, 0.0)
    return math.sqrt(of_images + (1 / len(present) + 1 / (num_folds - 1)) * of_training)


def _compute_cluster_variance(values: np.ndarray, groups: np.ndarray, *, pseudo: int = 0) -> float:
    """Return the variance of the mean of `values` (float [n] in -1..1) due to the sampling of groups of images.

    It is at least that of independent images, to whose squares `pseudo` images of the value 1 or -1 are added.
    """
    n, centred = len(values), values - values.mean()
    independent = (float((centred**2).sum()) + pseudo) / (n + pseudo) / (n + pseudo)
    _, dense = np.unique(groups, return_inverse=True)
    sums = np.bincount(dense, weights=centred)
    if len(sums) < 2:
        return independent
    clustered = len(sums) / (len(sums) - 1) * float((sums**2).sum()) / n**2
    return max(clustered, independent)
