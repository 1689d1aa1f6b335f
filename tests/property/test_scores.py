"""A metrics file of any predictions is strict JSON whose figures lie in their ranges and intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dlfer.metrics import confidence as cal
from dlfer.metrics.predictions import Predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.runs.metrics_record import Metrics

RANGES = {"mcc": (-1, 1), "cohen_kappa": (-1, 1), "log_loss": (0, 16), "brier": (0, 2)}


def make(targets, scores) -> Predictions:
    scores = np.asarray(scores, dtype=np.float64)
    ids = [f"PublicTest/{i}" for i in range(len(targets))]
    return Predictions(
        ids, tuple("abcdefg"[: scores.shape[1]]), np.array(targets), scores / scores.sum(axis=1, keepdims=True)
    )


@st.composite
def some_predictions(draw):
    """Few classes, few distinct probabilities (0 and 1 among them), so that ties and gaps are the rule."""
    num_classes, n = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    targets = draw(st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n))
    row = st.lists(st.integers(0, 3), min_size=num_classes, max_size=num_classes).filter(any)
    return make(targets, draw(st.lists(row, min_size=n, max_size=n)))


def iterate_figures(value, name=""):
    if isinstance(value, dict):
        if {"value", "low", "high"} <= set(value):
            yield name, value
        for key, item in value.items():
            yield from iterate_figures(item, key)


@pytest.mark.slow
@settings(max_examples=60)
@given(some_predictions())
@example(make([0], [[1, 0]]))
@example(make([0, 0, 0], [[0, 1], [0, 1], [0, 1]]))
@example(make([0, 1, 2], np.eye(3)))
@example(make([0, 0, 1, 1], [[1, 1, 2]] * 4))
def test_the_metrics_file_is_strict_json_and_its_figures_are_in_range(predictions):
    file = compute_metrics_file(
        {"validation": predictions, "test": predictions},
        Metrics(protocol="official", banner=None, selected_on="PublicTest", test_opened=0),
        without_duplicates_ids=predictions.ids[:1].tolist(),
    ).as_json()
    assert json.loads(json.dumps(file, allow_nan=False)) == file
    for name, figure in iterate_figures(file["test"]):
        if figure["value"] is None:
            continue
        low, high = RANGES.get(name, (0, 1))
        assert low - 1e-9 <= figure["value"] <= high + 1e-9, name
        for bound in (figure["low"], figure["high"]):
            assert bound is None or np.isfinite(bound), name
    for figures in file["test"]["per_class"].values():
        for name, (low, high) in figures["intervals"].items():
            # A class that was never predicted has precision 0, from no prediction at all.
            if name != "precision":
                assert (figures[name] is None) == (low is None), name
            if low is not None:
                assert -1e-9 <= low <= figures[name] + 1e-9, name
                assert figures[name] - 1e-9 <= high <= 1 + 1e-9, name
    for version in ("raw", "scaled"):
        bins = file["test"]["calibration"][version]["reliability"]
        assert sum(row["n"] for row in bins) == len(predictions)


@settings(max_examples=60)
@given(some_predictions())
def test_the_threshold_is_the_best_that_trying_all_finds(predictions):
    confidences, correct = cal.get_confidences(predictions), predictions.correct
    tried = {
        float(threshold): correct[confidences >= threshold].mean() for threshold in np.unique(confidences).tolist()
    }
    for target in (0.5, 0.8, 1.0):
        reaching = [threshold for threshold, accuracy in tried.items() if accuracy >= target - 1e-12]
        found = cal.choose_threshold(predictions, target)
        if not reaching:
            assert found is None
        else:
            expected = 0.0 if min(reaching) == min(tried) else min(reaching)
            assert found == expected
            answered = cal.compute_selective(predictions, found)["at_threshold"]
            assert answered["accuracy"]["value"] >= target - 1e-12
    assert cal.compute_aurc(confidences, correct) == pytest.approx(
        np.mean([1 - tried[float(confidence)] for confidence in confidences])
    )


@settings(max_examples=60)
@given(some_predictions(), st.floats(0.1, 10))
def test_a_temperature_keeps_probabilities_and_the_order_of_classes(predictions, temperature):
    scaled = cal.apply_temperature(predictions.probabilities, temperature)
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    rows = np.arange(len(predictions))
    np.testing.assert_array_equal(scaled[rows, predictions.predicted], scaled.max(axis=1))


@settings(max_examples=60)
@given(some_predictions())
def test_the_fitted_temperature_is_never_worse_than_none(predictions):
    temperature = cal.fit_temperature(predictions)
    assert 0.1 <= temperature <= 10

    def compute_loss(t):
        scaled = cal.apply_temperature(predictions.probabilities, t)
        return -np.log(np.maximum(scaled[np.arange(len(predictions)), predictions.targets], 1e-300)).mean()

    assert compute_loss(temperature) <= min(compute_loss(t) for t in (0.1, 0.5, 1.0, 2.0, 10.0)) + 1e-6


@settings(max_examples=40)
@given(some_predictions(), st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order_of_rows(predictions, random):
    order = list(range(len(predictions)))
    random.shuffle(order)
    other = predictions.take(np.array(order))
    before, after = (cal.compute_calibration(some)["raw"] for some in (predictions, other))
    for name in ("ece_equal_mass", "ece_equal_width", "classwise_ece"):
        assert after[name]["value"] == pytest.approx(before[name]["value"])
    assert cal.compute_selective(other, 0.0) == cal.compute_selective(predictions, 0.0)
