"""The two intervals of a cross-validation, and the test of two recipes over folds, against hand-made values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from dlfer.errors import DataError
from dlfer.metrics.folds import compare_folds, compute_recipe_accuracy, compute_trained_accuracy
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.paired import describe_difference

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
