"""The stated conventions, on inputs small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.metrics import classification as metrics
from dlfer.metrics import curves

NEVER_PREDICTED = np.array([[2, 1, 0], [1, 3, 0], [2, 0, 0]])
NO_ROWS = np.array([[2, 1, 1], [1, 3, 0], [0, 0, 0]])


def test_a_class_never_predicted_has_precision_0():
    assert metrics.compute_precision(NEVER_PREDICTED).tolist() == [2 / 5, 3 / 4, 0.0]
    assert metrics.compute_f1(NEVER_PREDICTED)[2] == 0.0
    assert metrics.compute_macro(metrics.compute_recall(NEVER_PREDICTED), NEVER_PREDICTED) == pytest.approx(
        (2 / 3 + 3 / 4 + 0) / 3
    )


def test_a_class_without_rows_is_nan_and_left_out_of_averages():
    for figure in (metrics.compute_precision, metrics.compute_recall, metrics.compute_f1):
        assert np.isnan(figure(NO_ROWS)).tolist() == [False, False, True]
    recall = metrics.compute_recall(NO_ROWS)
    assert metrics.compute_macro(recall, NO_ROWS) == pytest.approx((2 / 4 + 3 / 4) / 2)
    assert metrics.compute_weighted(recall, NO_ROWS) == pytest.approx(5 / 8)
    # Its specificity is defined, since all rows are of the rest, but it stays out of the average.
    specificity = metrics.compute_specificity(NO_ROWS)
    assert specificity.tolist() == [3 / 4, 3 / 4, 7 / 8]
    assert metrics.compute_macro(specificity, NO_ROWS) == 3 / 4


def test_specificity_is_nan_where_all_rows_are_of_the_class():
    confusion = np.array([[3, 1], [0, 0]])
    assert np.isnan(metrics.compute_specificity(confusion)[0])
    assert np.isnan(metrics.compute_macro(metrics.compute_specificity(confusion), confusion))


def test_no_rows_at_all_is_nan_and_not_an_error():
    empty = np.zeros((2, 2), dtype=np.int64)
    assert np.isnan(metrics.compute_accuracy(empty))
    assert np.isnan(metrics.compute_macro_f1(empty))


def test_log_loss_of_a_certain_error_is_large_and_finite():
    probabilities = np.array([[1.0, 0.0]], dtype=np.float32)
    assert metrics.compute_item_losses(np.array([1]), probabilities) == pytest.approx(15.94, abs=0.01)
    assert metrics.compute_item_losses(np.array([0]), probabilities) == pytest.approx(0, abs=1e-6)


def test_seven_class_accuracy_is_not_the_mean_of_the_one_against_rest_accuracies():
    # 70 % right and errors spread evenly: (TP + TN) / N averaged over classes would be 91.4 %.
    confusion = np.full((7, 7), 5) + np.diag(np.full(7, 65))
    assert metrics.compute_accuracy(confusion) == 0.7


def test_roc_of_all_tied_scores_is_the_diagonal():
    is_target = np.array([True, False, True, False])
    fpr, tpr, _ = curves.compute_roc(is_target, np.full(4, 0.5))
    assert (fpr.tolist(), tpr.tolist()) == ([0, 1], [0, 1])
    assert curves.compute_auc(is_target, np.full(4, 0.5)) == 0.5
    assert curves.compute_auc(is_target, np.array([0.9, 0.1, 0.8, 0.2])) == 1.0
