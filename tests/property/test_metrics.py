"""Every figure equals scikit-learn's on random and on degenerate inputs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.metrics import classification as metrics
from dlfer.metrics import curves

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@st.composite
def judged(draw):
    """Targets int [N], probabilities float32 [N, C] with many ties; often classes are missing."""
    num_classes = draw(st.integers(2, 5))
    n = draw(st.integers(1, 25))
    targets = draw(st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n))
    weights = draw(
        st.lists(st.lists(st.integers(0, 3), min_size=num_classes, max_size=num_classes), min_size=n, max_size=n)
    )
    scores = np.array(weights, dtype=np.float64) + 0.01
    return np.array(targets), (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)


def confuse(targets, probabilities):
    return metrics.compute_confusion(targets, probabilities.argmax(axis=1), probabilities.shape[1])


@given(judged())
def test_confusion_accuracy_and_log_loss(case):
    targets, probabilities = case
    classes = np.arange(probabilities.shape[1])
    confusion = confuse(targets, probabilities)
    predicted = probabilities.argmax(axis=1)
    np.testing.assert_array_equal(confusion, sklearn_metrics.confusion_matrix(targets, predicted, labels=classes))
    assert metrics.compute_accuracy(confusion) == pytest.approx(sklearn_metrics.accuracy_score(targets, predicted))
    assert metrics.compute_item_losses(targets, probabilities).mean() == pytest.approx(
        sklearn_metrics.log_loss(targets, probabilities, labels=classes), rel=1e-5
    )


@given(judged())
def test_per_class_figures(case):
    targets, probabilities = case
    classes = np.arange(probabilities.shape[1])
    confusion = confuse(targets, probabilities)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        targets, probabilities.argmax(axis=1), labels=classes, zero_division=0
    )
    present = support > 0
    np.testing.assert_array_equal(metrics.compute_support(confusion), support)
    for own, expected in (
        (metrics.compute_precision(confusion), precision),
        (metrics.compute_recall(confusion), recall),
        (metrics.compute_f1(confusion), f1),
    ):
        np.testing.assert_allclose(own[present], expected[present], rtol=1e-12)
        assert np.isnan(own[~present]).all()


@given(judged())
def test_specificity_is_the_recall_of_the_rest(case):
    targets, probabilities = case
    confusion = confuse(targets, probabilities)
    own = metrics.compute_specificity(confusion)
    for c in range(probabilities.shape[1]):
        rest = targets != c
        if rest.any():
            expected = sklearn_metrics.recall_score(rest, probabilities.argmax(axis=1) != c, zero_division=0)
            assert own[c] == pytest.approx(expected)
        else:
            assert np.isnan(own[c])


@given(judged(), st.sampled_from(["macro", "weighted"]))
def test_averages_leave_out_classes_without_rows(case, kind):
    targets, probabilities = case
    confusion = confuse(targets, probabilities)
    expected = sklearn_metrics.precision_recall_fscore_support(
        targets, probabilities.argmax(axis=1), labels=np.unique(targets), average=kind, zero_division=0
    )[:3]
    average = metrics.compute_macro if kind == "macro" else metrics.compute_weighted
    figures = (metrics.compute_precision, metrics.compute_recall, metrics.compute_f1)
    for figure, value in zip(figures, expected, strict=True):
        assert average(figure(confusion), confusion) == pytest.approx(value)


@given(judged())
def test_roc_and_auc(case):
    targets, probabilities = case
    for c in range(probabilities.shape[1]):
        is_target, scores = targets == c, probabilities[:, c]
        fpr, tpr, thresholds = curves.compute_roc(is_target, scores)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = sklearn_metrics.roc_curve(is_target, scores, drop_intermediate=False)
        for own, other in zip((fpr, tpr, thresholds), expected, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-6)
        area = curves.compute_auc(is_target, scores)
        if is_target.all() or not is_target.any():
            assert np.isnan(area)
        else:
            assert area == pytest.approx(sklearn_metrics.roc_auc_score(is_target, scores))
            assert area == pytest.approx(np.trapezoid(tpr, fpr))


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
def test_midranks_are_those_of_scipy(values):
    scipy_stats = pytest.importorskip("scipy.stats")
    np.testing.assert_array_equal(curves.compute_midranks(np.array(values)), scipy_stats.rankdata(values))


@settings(max_examples=30)
@given(st.lists(judged(), min_size=2, max_size=4))
def test_stacked_confusions_give_what_each_gives_alone(cases):
    matrices = [confuse(targets, probabilities) for targets, probabilities in cases]
    matrices = [m for m in matrices if m.shape == matrices[0].shape]
    for figure in (metrics.compute_f1, metrics.compute_specificity, metrics.compute_accuracy, metrics.compute_macro_f1):
        np.testing.assert_array_equal(figure(np.stack(matrices)), np.stack([figure(m) for m in matrices]))


def silently(function, *args, **kwargs):
    """Call scikit-learn without its warnings about classes that are absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


@given(judged())
def test_balanced_accuracy_mcc_and_kappa(case):
    targets, probabilities = case
    predicted, confusion = probabilities.argmax(axis=1), confuse(targets, probabilities)
    balanced = metrics.compute_macro(metrics.compute_recall(confusion), confusion)
    assert balanced == pytest.approx(silently(sklearn_metrics.balanced_accuracy_score, targets, predicted))
    assert metrics.compute_mcc(confusion) == pytest.approx(
        silently(sklearn_metrics.matthews_corrcoef, targets, predicted)
    )
    kappa = silently(sklearn_metrics.cohen_kappa_score, targets, predicted)
    assert metrics.compute_kappa(confusion) == pytest.approx(kappa, nan_ok=True)


@given(judged())
def test_kappa_is_that_of_statsmodels(case):
    inter_rater = pytest.importorskip("statsmodels.stats.inter_rater")
    confusion = confuse(*case)
    with np.errstate(all="ignore"):
        expected = inter_rater.cohens_kappa(confusion, return_results=False)
    assert metrics.compute_kappa(confusion) == pytest.approx(expected, nan_ok=True)


@given(judged())
def test_one_vs_rest_accuracy_is_the_accuracy_of_each_binary_task(case):
    targets, probabilities = case
    predicted, confusion = probabilities.argmax(axis=1), confuse(targets, probabilities)
    classes = range(probabilities.shape[1])
    expected = [sklearn_metrics.accuracy_score(targets == c, predicted == c) for c in classes]
    own = metrics.compute_one_vs_rest_accuracy(confusion)
    np.testing.assert_allclose(own, expected)
    errors = 1 - metrics.compute_accuracy(confusion)
    assert own.mean() == pytest.approx(1 - 2 * errors / probabilities.shape[1])


@given(judged())
def test_detected_classes_are_those_whose_one_most_frequent_prediction_is_right(case):
    from collections import Counter

    targets, probabilities = case
    predicted = probabilities.argmax(axis=1)
    own = metrics.compute_detected(confuse(targets, probabilities))
    for c in range(probabilities.shape[1]):
        ranked = Counter(predicted[targets == c].tolist()).most_common()
        is_tie = len(ranked) > 1 and ranked[0][1] == ranked[1][1]
        assert own[c] == (bool(ranked) and not is_tie and ranked[0][0] == c)


@given(judged())
def test_average_precision(case):
    targets, probabilities = case
    own = curves.compute_average_precisions(targets, probabilities)
    for c in range(probabilities.shape[1]):
        if (targets == c).any():
            expected = sklearn_metrics.average_precision_score(targets == c, probabilities[:, c])
            assert own[c] == pytest.approx(expected)
        else:
            assert np.isnan(own[c])


@settings(max_examples=30)
@given(judged())
def test_stacked_confusions_of_the_further_figures(case):
    matrix = confuse(*case)
    for figure in (
        metrics.compute_mcc,
        metrics.compute_kappa,
        metrics.compute_one_vs_rest_accuracy,
        metrics.compute_detected,
    ):
        np.testing.assert_array_equal(figure(np.stack([matrix, matrix])), np.stack([figure(matrix)] * 2))
