from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dlfer.errors import DataError
from dlfer.metrics import several
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.paired import compute_mcnemar, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.several import compare_folds, compute_recipe_accuracy, compute_trained_accuracy
from dlfer.runs.comparison_record import CochranQ
from dlfer.runs.metrics_record import McNemar

LABELS = ("no", "yes", "perhaps")


def make(correct, *, ids=None, labels=LABELS, order=None) -> Predictions:
    """Predictions that are right where `correct` (bool [N]) says so, with ids test/0..N-1."""
    correct = np.asarray(correct, dtype=bool)
    n = len(correct)
    targets = np.arange(n) % 3
    predicted = np.where(correct, targets, (targets + 1) % 3)
    ids = np.array([f"test/{i}" for i in range(n)]) if ids is None else np.asarray(ids)
    # The same answers under another order of labels: codes are positions in `labels`.
    code = np.array([labels.index(label) for label in LABELS])
    order = np.arange(n) if order is None else order
    probabilities = np.full((n, 3), 0.1)
    probabilities[np.arange(n), code[predicted]] = 0.8
    return Predictions(ids[order], labels, code[targets][order], probabilities[order])


def draw(k: int, n: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    ease = generator.uniform(0.3, 0.9, n)
    return [generator.random(n) < np.clip(ease + 0.05 * i, 0, 1) for i in range(k)]


@pytest.mark.parametrize(("k", "n"), [(2, 30), (3, 200), (5, 1000)])
def test_cochran_q_is_that_of_statsmodels(k, n):
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    correct = np.stack(draw(k, n))
    expected = tables.cochrans_q(correct.T.astype(int))
    found = several.compute_cochran_q(correct)
    assert found.statistic == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.df == expected.df == k - 1


@pytest.mark.parametrize("correct", [np.ones((3, 1)), np.zeros((3, 5)), np.tile([True, False], (4, 3))])
def test_cochran_q_of_those_who_always_agree_is_nothing(correct):
    assert several.compute_cochran_q(correct) == CochranQ(statistic=0.0, p=1.0, df=len(correct) - 1)


@pytest.mark.parametrize("p_values", [[0.5], [0.01, 0.04, 0.03], [0.02, 0.02, 0.02], [1.0, 0.0, 0.9, 0.011]])
def test_holm_is_that_of_statsmodels(p_values):
    multipletests = pytest.importorskip("statsmodels.stats.multitest").multipletests
    assert several.compute_holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_rows_are_matched_by_id_and_labels_by_name():
    a, b, c = draw(3, 60)
    shuffled = make(b, order=np.random.default_rng(1).permutation(60))
    renamed = make(c, labels=("perhaps", "no", "yes"))
    straight = several.compare_several([make(a), make(b), make(c)], ["a", "b", "c"])
    assert several.compare_several([make(a), shuffled, renamed], ["a", "b", "c"]) == straight
    assert straight.n_common == 60
    assert straight.runs[1].accuracy.value == pytest.approx(b.mean())


def test_only_common_images_count_and_the_rest_is_told():
    a, b = draw(2, 50)
    result = several.compare_several([make(a), make(b).take(np.arange(10, 50))], ["a", "b"])
    assert result.n_common == 40
    assert [run.left_out for run in result.runs] == [10, 0]
    assert [run.n for run in result.runs] == [40, 40]  # what the accuracies are of
    assert [run.num_images for run in result.runs] == [50, 40]
    assert result.runs[0].accuracy.value == pytest.approx(a[10:].mean())


def test_a_pair_holds_its_test_and_holms_correction():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    correct = draw(3, 400)
    result = several.compare_several([make(row) for row in correct], ["x", "y", "z"])
    assert [(pair.a, pair.b) for pair in result.pairs] == [("x", "y"), ("x", "z"), ("y", "z")]
    p_values = []
    for pair, (i, j) in zip(result.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        counts = int((correct[i] & ~correct[j]).sum()), int((correct[j] & ~correct[i]).sum())
        assert (pair.mcnemar.b, pair.mcnemar.c) == counts
        assert (pair.mcnemar.method, pair.mcnemar.p) == compute_mcnemar(*counts)
        table = [[0, counts[0]], [counts[1], 0]]
        p_values.append(tables.mcnemar(table, exact=sum(counts) < 25, correction=True).pvalue)
        assert pair.mcnemar.p == pytest.approx(p_values[-1])
        assert pair.difference.value == pytest.approx(correct[i].mean() - correct[j].mean())
        assert pair.difference.low < pair.difference.value < pair.difference.high
    expected = multitest.multipletests(p_values, method="holm")[1]
    assert [pair.p_holm for pair in result.pairs] == pytest.approx(expected)
    assert result.cochran_q.df == 2


def test_holm_can_take_a_difference_back():
    """One pair with p = 0.02 is significant alone; among ten pairs it is not, and the sentence says why."""
    a = np.repeat([True, True, False], [40, 17, 43])
    b = np.repeat([True, False, True, False], [40, 17, 5, 38])
    alone = several.compare_several([make(a), make(b)], ["a", "b"])
    assert alone.pairs[0].is_significant
    assert alone.cochran_q is None
    among = several.compare_several([make(a), make(b), make(a), make(a), make(b)], ["a", "b", "c", "d", "e"])
    assert not among.pairs[0].is_significant
    assert "n = 100): no significant difference" in among.pairs[0].sentence
    assert "by Holm over 10 pairs" in among.pairs[0].sentence


@pytest.mark.parametrize("n", [1, 2, 40])
def test_identical_runs_do_not_differ(n):
    correct = np.arange(n) % 2 == 0
    result = several.compare_several([make(correct)] * 3, ["a", "b", "c"])
    assert result.cochran_q.p == 1.0
    for pair in result.pairs:
        assert pair.difference.value == 0
        assert pair.difference.low < 0 < pair.difference.high
        assert pair.mcnemar == McNemar(b=0, c=0, p=1.0, method="McNemar's exact test")
        assert (pair.p_holm, pair.required_n, pair.is_significant) == (1.0, None, False)


def test_what_cannot_be_compared_is_refused():
    a = make(np.ones(6))
    with pytest.raises(DataError, match="two or more"):
        several.compare_several([a], ["a"])
    with pytest.raises(DataError, match="b: found no id in common with a"):
        several.compare_several([a, make(np.ones(3), ids=["x", "y", "z"])], ["a", "b"])
    other = Predictions(a.ids, ("no", "yes", "never"), a.targets, a.probabilities)
    with pytest.raises(DataError, match="b: found the labels no, yes, never, expected those of a"):
        several.compare_several([a, other], ["a", "b"])
    wrong = Predictions(a.ids, a.labels, (a.targets + np.array([0, 0, 1, 0, 0, 0])) % 3, a.probabilities)
    with pytest.raises(DataError, match=r"b: 1 of 6 images have another target than in a.*'test/2': no, there perhaps"):
        several.compare_several([a, wrong], ["a", "b"])


FOLDS = 5


def _folds(accuracies: list[float], size: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return correct, groups and folds of models with these accuracies, `size` images each."""
    correct = np.concatenate([np.arange(size) < round(size * value) for value in accuracies])
    return correct, np.arange(len(correct)), np.repeat(np.arange(len(accuracies)), size)


def test_without_groups_the_interval_of_the_trained_models_is_wilsons():
    correct, groups, _ = _folds([0.6, 0.7])
    found = compute_trained_accuracy(correct, groups)
    assert found.value == 0.65
    assert (found.low, found.high) == compute_wilson_interval(260, 400)


def test_images_that_come_in_pairs_count_once():
    correct, _, _ = _folds([0.65], size=400)
    alone = compute_trained_accuracy(correct, np.arange(400))
    doubled = compute_trained_accuracy(np.repeat(correct, 2), np.repeat(np.arange(400), 2))
    assert doubled.value == alone.value
    assert (doubled.low, doubled.high) == pytest.approx((alone.low, alone.high), abs=1e-3)


def test_few_subjects_widen_the_interval_by_students_quantile():
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(10) < 0.6, 50)
    found = compute_trained_accuracy(right, np.repeat(np.arange(10), 50))
    low, high = compute_wilson_interval(float(right.mean()) * 10, 10)
    assert found.low < low < high < found.high


@pytest.mark.parametrize("right", [(9, 5), (7, 7), (10, 10), (0, 0)])
def test_two_subjects_say_next_to_nothing(right):
    # As of a fold with two of ten subjects: Student's quantile for one degree of freedom is 12.7.
    correct = np.concatenate([np.arange(10) < count for count in right])
    found = compute_trained_accuracy(correct, np.repeat([0, 1], 10))
    assert found.low <= found.value <= found.high
    assert found.high - found.low > 0.8


def test_groups_whose_images_vary_less_than_independent_ones_do_not_narrow_the_interval():
    alternating = np.tile([True, False], 100)
    found = compute_trained_accuracy(alternating, np.repeat(np.arange(100), 2))
    low, high = compute_wilson_interval(100, 200)
    assert found.high - found.low >= 0.98 * (high - low)


@pytest.mark.parametrize("value", [True, False])
def test_where_all_are_right_or_wrong_both_intervals_have_a_width(value):
    correct, groups, folds = np.full(100, value), np.arange(100), np.repeat(np.arange(5), 20)
    trained = compute_trained_accuracy(correct, groups)
    recipe = compute_recipe_accuracy(correct, groups, folds, num_folds=FOLDS)
    assert recipe.low <= trained.low < trained.high <= recipe.high


def _compute_error(per_fold: list[float], of_images: float, num_folds: int = FOLDS) -> float:
    """Return the error by hand: the variance over images, and Nadeau and Bengio's of what the folds vary beyond it."""
    k = len(per_fold)
    of_training = max(np.var(per_fold, ddof=1) - k * of_images, 0)
    return math.sqrt(of_images + (1 / k + 1 / (num_folds - 1)) * of_training)


def test_the_interval_of_the_recipe_corrects_what_trainings_vary():
    accuracies = [0.5, 0.6, 0.7, 0.8, 0.65]
    found = compute_recipe_accuracy(*_folds(accuracies), num_folds=FOLDS)
    half = stats.t.ppf(0.975, 4) * _compute_error(accuracies, 0.65 * 0.35 / 999)
    assert (found.value, found.low, found.high) == pytest.approx((0.65, 0.65 - half, 0.65 + half))


def test_where_only_trainings_vary_the_error_is_nadeau_and_bengios():
    accuracies = [0.5, 0.6, 0.7, 0.8, 0.65]
    found = compute_recipe_accuracy(*_folds(accuracies, size=20_000), num_folds=FOLDS)
    half = stats.t.ppf(0.975, 4) * np.std(accuracies, ddof=1) * math.sqrt(1 / 5 + 1 / 4)
    assert found.high - found.value == pytest.approx(half, rel=1e-2)


def test_folds_that_happen_to_agree_are_no_certainty():
    correct, groups, folds = _folds([0.65] * 5)
    found, trained = (
        compute_recipe_accuracy(correct, groups, folds, num_folds=FOLDS),
        compute_trained_accuracy(correct, groups),
    )
    assert found.low < trained.low < trained.high < found.high


def test_one_fold_or_one_group_has_no_interval_but_the_reason():
    correct, groups, _ = _folds([0.65])
    found = compute_recipe_accuracy(correct, groups, np.zeros(200, int), num_folds=FOLDS)
    assert (found.value, found.low, found.high) == (0.65, None, None)
    assert "one fold has finished" in found.reason
    found = compute_trained_accuracy(correct, np.zeros(200, int))
    assert (found.low, "one group" in found.reason) == (None, True)


def test_missing_folds_keep_the_ratio_of_test_to_training_images():
    accuracies = [0.5, 0.8, 0.7]
    found = compute_recipe_accuracy(*_folds(accuracies), num_folds=10)
    value = sum(accuracies) / 3
    half = stats.t.ppf(0.975, 2) * _compute_error(accuracies, value * (1 - value) / 599, num_folds=10)
    assert found.high - found.value == pytest.approx(min(half, 1 - found.value))


def test_two_recipes_are_compared_by_a_t_test_with_the_same_error():
    of_a, of_b = [0.7, 0.72, 0.69, 0.74, 0.7], [0.5, 0.6, 0.55, 0.62, 0.53]
    (a, groups, folds), (b, _, _) = _folds(of_a), _folds(of_b)
    found = compare_folds((a, b), groups, folds, num_folds=FOLDS, names=("lite2", "nano"))
    differences = np.subtract(of_a, of_b)
    of_image = np.subtract(a, b, dtype=float)
    of_images = max(of_image.var() / 999, (of_image.var() * 1000 + 2) / 1002**2)
    error = _compute_error(differences.tolist(), of_images)
    p = 2 * stats.t.sf(differences.mean() / error, 4)
    assert found.p_value == pytest.approx(p)
    assert found.difference.value == pytest.approx(100 * differences.mean())
    assert found.difference.low == pytest.approx(100 * (differences.mean() - stats.t.ppf(0.975, 4) * error))
    assert (found.is_significant, found.df, found.num_folds, found.scope) == (True, 4, 5, "recipes")
    assert found.differences == pytest.approx(100 * differences)
    text = describe_difference(found)
    assert "lite2 minus nano: 15.0 percentage points of accuracy" in text
    assert (
        "5 folds, n = 1,000): significant difference (t test over folds with Nadeau and Bengio's correction, p " in text
    )
    assert "4 degrees of freedom; standard deviation of the difference over folds" in text


def test_equal_recipes_are_not_different_and_their_interval_has_a_width():
    a, groups, folds = _folds([0.7, 0.72, 0.69, 0.74, 0.7])
    found = compare_folds((a, a), groups, folds, num_folds=FOLDS, names=("a", "b"))
    assert (found.p_value, found.is_significant) == (1.0, False)
    assert found.difference.low < 0 < found.difference.high


def test_one_common_fold_compares_nothing():
    a, groups, folds = _folds([0.7])
    with pytest.raises(DataError, match="found 1 fold that both have"):
        compare_folds((a, a), groups, folds, num_folds=FOLDS, names=("a", "b"))


def test_over_drawn_folds_the_intervals_cover():
    """A fifth of benchmarks/crossval_coverage.py: equal models, images in groups of two that are right together."""
    rng, covered = np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        groups = np.repeat(np.arange(150), 2)
        correct = np.repeat(rng.random(150) < 0.7, 2)
        folds = np.repeat(np.arange(5), 60)
        trained = compute_trained_accuracy(correct, groups)
        recipe = compute_recipe_accuracy(correct, groups, folds, num_folds=FOLDS)
        covered += [trained.low <= 0.7 <= trained.high, recipe.low <= 0.7 <= recipe.high]
    assert (covered / 300 >= 0.92).all()
