"""Intervals of what a confusion matrix gives, for any matrix."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.metrics import classification as metrics
from dlfer.metrics import intervals as iv

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


@st.composite
def some_confusions(draw):
    size = draw(st.integers(1, 5))
    cells = st.lists(st.sampled_from([0, 0, 1, 2, 5, 40]), min_size=size**2, max_size=size**2).filter(any)
    return np.array(draw(cells)).reshape(size, size)


@settings(max_examples=150)
@given(some_confusions())
def test_the_interval_contains_the_value_and_stays_in_range(confusion):
    found = iv.compute_average_intervals(confusion)
    for name, compute in VALUES.items():
        low, high = found[name]
        if not np.isnan(low):
            smallest = -1 if name in ("mcc", "cohen_kappa") else 0
            assert smallest <= low <= compute(confusion) + 1e-9, name
            assert compute(confusion) - 1e-9 <= high <= 1, name
    low, high = found["emotion_detection_rate"]
    present = confusion.sum(axis=1) > 0
    assert 0 <= low <= metrics.compute_detected(confusion).sum() / present.sum() <= high <= 1


@settings(max_examples=100)
@given(some_confusions(), st.sampled_from([(0.5, 0.8), (0.8, 0.95), (0.95, 0.99)]))
def test_a_higher_level_has_a_wider_interval(confusion, levels):
    narrow, wide = (iv.compute_average_intervals(confusion, level) for level in levels)
    for name, (low, high) in narrow.items():
        if not np.isnan(low):
            assert wide[name][0] <= low + 1e-9, name
            assert wide[name][1] >= high - 1e-9, name


def test_the_order_of_classes_does_not_matter_where_no_image_is_right():
    """Whose accuracy, computed back from kappa, is 0 or 1e-17 by the order of sums."""
    confusion = np.array([[0, 0, 0, 1], [0, 0, 40, 0], [1, 40, 0, 0], [0, 0, 5, 0]])
    expected = iv.compute_average_intervals(confusion)
    assert expected["cohen_kappa"][1] < -0.7
    for order in itertools.permutations(range(4)):
        found = iv.compute_average_intervals(confusion[np.ix_(order, order)])
        for name, interval in expected.items():
            np.testing.assert_allclose(found[name], interval, atol=1e-9, err_msg=name)


@settings(max_examples=100)
@given(some_confusions(), st.randoms(use_true_random=False))
def test_the_order_of_classes_does_not_matter(confusion, random):
    order = list(range(len(confusion)))
    random.shuffle(order)
    shuffled = confusion[np.ix_(order, order)]
    first, other = iv.compute_average_intervals(confusion), iv.compute_average_intervals(shuffled)
    for name, interval in first.items():
        np.testing.assert_allclose(other[name], interval, atol=1e-9, err_msg=name)
    first, other = iv.compute_class_intervals(confusion), iv.compute_class_intervals(shuffled)
    for name, intervals in first.items():
        np.testing.assert_allclose(other[name], np.array(intervals)[order], atol=1e-9, err_msg=name)
