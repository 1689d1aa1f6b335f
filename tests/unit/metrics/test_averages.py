"""Intervals of averages over classes against bootstraps and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.metrics import averages
from dlfer.metrics import classification as metrics

CONFUSION = np.array([[60, 30, 10], [20, 150, 30], [5, 5, 30]])

VALUES = {
    "accuracy": metrics.compute_accuracy,
    "macro_f1": metrics.compute_macro_f1,
    "macro_precision": lambda m: metrics.compute_macro(metrics.compute_precision(m), m),
    "macro_recall": lambda m: metrics.compute_macro(metrics.compute_recall(m), m),
    "macro_specificity": lambda m: metrics.compute_macro(metrics.compute_specificity(m), m),
    "weighted_f1": lambda m: metrics.compute_weighted(metrics.compute_f1(m), m),
    "weighted_precision": lambda m: metrics.compute_weighted(metrics.compute_precision(m), m),
    "mcc": metrics.compute_mcc,
    "cohen_kappa": metrics.compute_kappa,
}


UNEVEN = np.array([[195, 3, 2], [30, 25, 15], [20, 40, 20]])
"""Classes that are found well and badly, so that their shares among the images matter to weighted averages."""


@pytest.mark.parametrize("matrix", [CONFUSION, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", VALUES)
def test_with_many_images_the_interval_is_that_of_a_bootstrap_of_the_images(name, matrix):
    """Drawing images with replacement makes the confusion matrix multinomial; classes have random numbers of them."""
    confusion = 20 * matrix
    n = int(confusion.sum())
    drawn = np.random.default_rng(1).multinomial(n, confusion.ravel() / n, size=20_000).reshape(-1, 3, 3)
    expected = np.quantile(VALUES[name](drawn), [0.025, 0.975])
    found = averages.compute_average_intervals(confusion)[name]
    assert found == pytest.approx(expected, abs=0.035 * (expected[1] - expected[0]) + 1e-4)


def test_macro_recall_combines_the_classes_wilson_limits():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    hits, n = np.diag(CONFUSION), CONFUSION.sum(axis=1)
    low, high = proportion.proportion_confint(hits, n, method="wilson")
    value = (hits / n).mean()
    expected = [
        value - np.sqrt(((hits / n - low) ** 2).sum()) / 3,
        value + np.sqrt(((high - hits / n) ** 2).sum()) / 3,
    ]
    found = averages.compute_average_intervals(CONFUSION)
    assert found["macro_recall"] == found["balanced_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["recall", "precision", "specificity", "f1"])
def test_effects_are_the_derivatives_by_the_cells(name):
    compute = getattr(metrics, f"compute_{name}")
    effects = averages._compute_ratio_effects(name, CONFUSION)
    for i, j in np.ndindex(3, 3):
        step = np.zeros((3, 3))
        step[i, j] = 1e-4
        expected = (compute(CONFUSION + step) - compute(CONFUSION - step)) / 2e-4
        assert effects[:, i, j] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "confusion",
    [np.diag([20, 20, 20]), np.array([[20, 0, 0]] * 3), np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])],
    ids=["all right", "all one class", "one image"],
)
def test_a_confusion_that_no_bootstrap_changes_is_no_certainty(confusion):
    found = averages.compute_average_intervals(confusion)
    for name, compute in VALUES.items():
        low, high = found[name]
        if np.isnan(low):
            assert name in ("mcc", "cohen_kappa", "macro_specificity"), name
            continue
        assert low - 1e-12 <= compute(confusion) <= high + 1e-12, name
        assert high - low > 0.02, name


def test_a_class_without_images_stays_out():
    confusion = np.array([[8, 2, 0], [3, 7, 0], [0, 0, 0]])
    wide, narrow = (averages.compute_average_intervals(m) for m in (confusion, confusion[:2, :2]))
    for name in set(VALUES) - {"macro_specificity"}:
        assert wide[name] == pytest.approx(narrow[name]), name
    per_class = averages.compute_class_intervals(confusion)
    assert np.isnan([per_class[name][2] for name in ("precision", "recall", "f1")]).all()


@pytest.mark.parametrize(
    ("confusion", "expected"),
    [
        (np.diag([30, 30, 30]), (1.0, 1.0)),
        (np.diag([3, 30, 30]), (2 / 3, 1.0)),
        (np.array([[0, 30, 0], [0, 30, 0], [0, 0, 30]]), (2 / 3, 2 / 3)),
        (np.array([[14, 16, 0], [0, 30, 0], [0, 0, 30]]), (2 / 3, 1.0)),
    ],
)
def test_detected_classes_are_counted_where_they_are_certain(confusion, expected):
    assert averages.compute_detection_interval(confusion) == pytest.approx(expected)


def test_detection_at_a_tie_is_rarely_certain():
    """Two labels are equally frequent in the population, so that no class is detected there."""
    drawn = np.random.default_rng(0).multinomial(40, [0.45, 0.45, 0.1], size=(400, 3))
    rolled = np.stack([np.roll(drawn[:, c], c, axis=-1) for c in range(3)], axis=1)
    above = [averages.compute_detection_interval(confusion)[0] > 0 for confusion in rolled]
    assert np.mean(above) <= 0.05


def test_of_two_classes_macro_specificity_is_macro_recall():
    found = averages.compute_average_intervals(np.array([[30, 10], [8, 60]]))
    assert found["macro_specificity"] == found["macro_recall"]
