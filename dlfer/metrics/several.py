"""Two or more classifiers on the same images: which of them differ significantly.

Cochran's Q asks whether any differs, McNemar's test which pairs do, and Holm's correction keeps the
chance of a single false alarm among all pairs at 5 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from dlfer.errors import DataError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.paired import compare_paired, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_scores
from dlfer.runs.comparison_record import CochranQ, ComparedRun, ModelComparison
from dlfer.runs.metrics_record import Estimate, McNemar, ModelPair, ViewMetrics


def match_predictions(several: Sequence[Predictions], names: Sequence[str]) -> list[Predictions]:
    """Return the rows that all have, matched by id, in the order of the ids and with the labels of the first.

    Args:
        several: predictions of different classifiers; rows and labels may stand in different orders.
        names: what each is called in a message.

    Raises:
        DataError: the sets of labels differ, no id is common to all, or an image has two targets.
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
    """Compare the accuracies of two or more classifiers on the images that all of them judged.

    Args:
        several: the predictions of each.
        names: what they are called, no two alike.
        level: the probability that an interval covers, and 1 - the chance of a false alarm over all pairs.

    Returns:
        The runs, Cochran's Q (None for two), and every pair; accuracies and differences as fractions.

    Raises:
        DataError: fewer than two, names that repeat, or predictions that do not match.
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
        runs.append(ComparedRun(name=name, n=len(predictions), left_out=len(predictions) - n, accuracy=accuracy))
    return ModelComparison(
        runs=runs,
        n_common=n,
        cochran_q=compute_cochran_q(correct) if len(several) > 2 else None,
        pairs=_compare_pairs(matched, names, level),
    )


def compute_cochran_q(correct: np.ndarray) -> CochranQ:
    """Return Cochran's Q test of whether k >= 2 classifiers are equally often right (bool [k, N]) on the same images.

    Where all are right and wrong on the same images, its statistic is 0 and p is 1.

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
    """Return the p values corrected for being several: all of them hold together at the level of one.

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
        DataError: the two are not about the same images.
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
                mcnemar=McNemar(b=result.a_only, c=result.b_only, p=result.p_value, method=result.test),
                p_holm=p_holm,
                required_n=result.required_n,
                is_significant=is_significant,
                sentence=describe_difference(result),
            )
        )
    return pairs


def _select(predictions: Predictions, ids: np.ndarray, labels: tuple[str, ...]) -> Predictions:
    """Return the rows of `ids`, in their order, with the columns in the order of `labels`."""
    order = np.argsort(predictions.ids)
    rows = order[np.searchsorted(predictions.ids, ids, sorter=order)]
    columns = [predictions.labels.index(label) for label in labels]
    rank = np.argsort(columns)
    return Predictions(ids, labels, rank[predictions.targets[rows]], predictions.probabilities[rows][:, columns])


def _to_fractions(points: Estimate) -> Estimate:
    return Estimate(value=points.value / 100, low=points.low / 100, high=points.high / 100)


def compute_view_scores(viewed: Predictions, single: Predictions, *, view: str) -> ViewMetrics:
    """Return the metrics of predictions averaged over views, and their difference to the single view's.

    Raises:
        DataError: the two are not about the same images.
    """
    scores = compute_scores(viewed)
    pair = compare_several([viewed, single], [view, "single view"]).pairs[0]
    return ViewMetrics(n=scores.n, accuracy=scores.accuracy, macro_f1=scores.macro_f1, paired=pair)
