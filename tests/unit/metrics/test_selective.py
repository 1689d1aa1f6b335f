from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dlfer.errors import DataError
from dlfer.metrics import selective
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions


def make(confidences, correct) -> Predictions:
    """Two classes, class 0 predicted with the given confidence (at least 0.5)."""
    confidences = np.asarray(confidences, dtype=np.float64)
    targets = np.where(correct, 0, 1)
    probabilities = np.stack([confidences, 1 - confidences], axis=1)
    return Predictions(np.arange(len(targets)).astype(str), ("a", "b"), targets, probabilities)


def test_ties_pass_together_and_order_does_not_matter():
    confidences = np.array([0.9, 0.8, 0.8, 0.6])
    correct = np.array([True, False, True, True])
    for order in (np.arange(4), np.array([3, 2, 1, 0])):
        coverage, risk, thresholds = selective.compute_risk_coverage(confidences[order], correct[order])
        assert coverage.tolist() == [1.0, 0.75, 0.25]
        assert risk.tolist() == pytest.approx([1 / 4, 1 / 3, 0])
        assert thresholds.tolist() == [0.6, 0.8, 0.9]
        assert selective.compute_aurc(confidences[order], correct[order]) == pytest.approx((1 / 4 + 2 / 3 + 0) / 4)


def test_aurc_is_0_where_all_are_right_and_the_error_rate_where_confidence_says_nothing():
    assert selective.compute_aurc(np.array([0.5, 0.7]), np.array([True, True])) == 0.0
    assert selective.compute_aurc(np.full(4, 0.5), np.array([True, False, True, True])) == 0.25


def test_the_threshold_is_the_lowest_that_reaches_the_accuracy():
    p = make([0.95, 0.9, 0.85, 0.8, 0.7, 0.6], [True, True, False, True, False, False])
    # Answered from above: 1/1, 2/2, 2/3, 3/4, 3/5, 3/6.
    assert selective.choose_threshold(p, 0.75) == pytest.approx(0.8, abs=1e-6)
    assert selective.choose_threshold(p, 0.9) == pytest.approx(0.9, abs=1e-6)
    assert selective.choose_threshold(p, 0.5) == 0.0
    found = selective.compute_selective(p, selective.choose_threshold(p, 0.75))["at_threshold"]
    assert found["n"] == 4
    assert found["coverage"]["value"] == pytest.approx(4 / 6)
    assert found["accuracy"]["value"] == 0.75


def test_a_tie_is_not_cut_to_reach_the_accuracy():
    p = make([0.9, 0.9, 0.6], [True, False, False])
    assert selective.choose_threshold(p, 0.8) is None
    assert selective.choose_threshold(p, 0.5) == pytest.approx(0.9, abs=1e-6)


def test_an_accuracy_out_of_reach_or_range():
    assert selective.choose_threshold(make([0.9, 0.6], [False, True]), 0.8) is None
    with pytest.raises(DataError, match="target accuracy of 80"):
        selective.choose_threshold(make([0.9], [True]), 80)


def test_intervals_at_the_threshold_are_wilsons():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.5, 1, 400)
    p = make(confidences, generator.random(400) < confidences)
    found = selective.compute_selective(p, 0.8)["at_threshold"]
    answered = p.probabilities.max(axis=1) >= 0.8
    for name, hits, n in (("coverage", answered, 400), ("accuracy", p.correct[answered], int(answered.sum()))):
        low, high = proportion.proportion_confint(int(hits.sum()), n, method="wilson")
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high))


def test_a_threshold_above_every_confidence_answers_nothing():
    found = selective.compute_selective(make([0.7, 0.6], [True, True]), 0.99)["at_threshold"]
    assert found["n"] == 0
    assert found["coverage"]["value"] == 0.0
    assert np.isnan(found["accuracy"]["value"])
    assert selective.compute_selective(make([0.7], [True]))["at_threshold"] is None


@pytest.mark.parametrize("n", [1, 7, 101, 102, 5000])
def test_the_stored_curve_is_thinned_without_losing_its_ends(n):
    generator = np.random.default_rng(n)
    p = make(generator.uniform(0.5, 1, n), generator.random(n) < 0.7)
    curve = selective.compute_selective(p)["curve"]
    coverage, risk, thresholds = selective.compute_risk_coverage(selective.get_confidences(p), p.correct)
    assert len(curve) == min(len(coverage), 101)
    whole = {(c, r, t) for c, r, t in zip(coverage.tolist(), risk.tolist(), thresholds.tolist(), strict=True)}
    assert {(point["coverage"], point["risk"], point["threshold"]) for point in curve} <= whole
    assert curve[0]["coverage"] == 1.0
    assert curve[0]["risk"] == pytest.approx(1 - p.correct.mean())
    assert curve[-1]["threshold"] == thresholds[-1]
    steps = -np.diff([point["coverage"] for point in curve])
    assert (steps > 0).all()
    if n == 5000:
        assert steps.max() < 0.011


def test_the_interval_of_the_area_is_scipys_bootstrap():
    rng = np.random.default_rng(4)
    confidences = rng.integers(20, 100, 300) / 100  # with ties
    correct = rng.random(300) < confidences
    low, high = selective.compute_aurc_interval(confidences, correct)
    found = stats.bootstrap(
        (confidences, correct), selective.compute_aurc, paired=True, vectorized=False, method="percentile",
        n_resamples=2000, random_state=2,
    ).confidence_interval  # fmt: skip
    assert low < selective.compute_aurc(confidences, correct) < high
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.1 * (found.high - found.low))


def test_effects_on_the_area_are_its_derivatives_by_the_weights():
    rng = np.random.default_rng(2)
    confidences, wrong = rng.integers(0, 9, 40) / 10, rng.random(40) < 0.4

    def compute_area(weights):
        above = confidences[None] >= confidences[:, None]
        risks = (above * weights * wrong).sum(axis=1) / (above * weights).sum(axis=1)
        return (weights * risks).sum() / weights.sum()

    assert compute_area(np.ones(40)) == pytest.approx(selective.compute_aurc(confidences, ~wrong))
    effects = selective.compute_aurc_effects(confidences, ~wrong)
    for row in range(40):
        step = np.eye(40)[row] * 1e-5
        expected = (compute_area(1 + step) - compute_area(1 - step)) / 2e-5
        assert effects[row] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("right", [True, False])
def test_the_interval_of_an_area_without_scatter_is_that_of_the_error_rate(right):
    found = selective.compute_aurc_interval(np.linspace(0.3, 0.9, 40), np.full(40, right))
    assert found == compute_wilson_interval(0 if right else 40, 40)


def test_each_point_of_the_curve_has_the_interval_of_its_risk():
    curve = selective.compute_selective(make(np.linspace(0.5, 0.99, 60), np.arange(60) % 3 > 0))["curve"]
    assert all(point["low"] <= point["risk"] <= point["high"] for point in curve)
    widths = [point["high"] - point["low"] for point in curve]
    assert widths[-1] > widths[0]  # fewer images answered
