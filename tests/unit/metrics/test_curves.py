"""Intervals of average precision; those of the area under the ROC curve are in test_intervals."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.metrics import curves


def make_scores(n=300, seed=0, shift=1.2):
    generator = np.random.default_rng(seed)
    targets = np.repeat([0, 1, 2], [n // 2, n // 3, n - n // 2 - n // 3])
    logits = generator.normal(size=(n, 3))
    logits[np.arange(n), targets] += shift
    probabilities = np.exp(logits)
    return targets, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_the_variance_is_that_of_the_bootstrap():
    targets, probabilities = make_scores(600)
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(800):
        rows = generator.integers(0, 600, 600)
        drawn.append(curves.compute_average_precisions(targets[rows], probabilities[rows]))
    drawn = np.array(drawn)
    effects = [curves._compute_precision_effects(targets == c, probabilities[:, c])[1] for c in range(3)]
    assert np.sqrt((np.array(effects) ** 2).sum(axis=1)) == pytest.approx(drawn.std(axis=0), rel=0.1)
    bounds, macro = curves.compute_average_precision_intervals(targets, probabilities)
    for (low, high), values in zip([*bounds, macro], [*drawn.T, drawn.mean(axis=1)], strict=True):
        # With few rows of a class no less than a proportion of as many trials.
        spread = np.quantile(values, 0.975) - np.quantile(values, 0.025)
        assert 0.9 * spread < high - low < 1.7 * spread


def test_the_interval_of_a_rare_class_is_at_least_wilsons():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    generator = np.random.default_rng(5)
    targets = np.repeat([0, 1], [8, 192])
    scores = np.clip(generator.normal(0.6 - 0.2 * targets, 0.12), 0.01, 0.99)
    probabilities = np.stack([scores, 1 - scores], axis=1)
    value = curves.compute_average_precision(targets == 0, scores)
    low, high = curves.compute_average_precision_intervals(targets, probabilities)[0][0]
    wilson = proportion.proportion_confint(value * 8, 8, method="wilson")
    assert low < wilson[0]  # by the bias of so few rows
    assert high >= wilson[1] - 1e-9
    assert 0 <= low < value < high <= 1


def test_the_interval_covers_the_truth():
    targets, probabilities = make_scores(60_000, seed=7)
    truth = curves.compute_average_precisions(targets, probabilities)
    covered = []
    for seed in range(200):
        bounds, (low, high) = curves.compute_average_precision_intervals(*make_scores(240, seed=seed))
        inside = [low <= value <= high for (low, high), value in zip(bounds, truth, strict=True)]
        covered.append([*inside, low <= truth.mean() <= high])
    assert (np.mean(covered, axis=0) >= 0.92).all()


def test_effects_are_the_derivatives_by_the_weights():
    score = pytest.importorskip("sklearn.metrics").average_precision_score
    generator = np.random.default_rng(3)
    is_target = generator.random(30) < 0.4
    scores = np.round(generator.random(30), 1)
    value, effects = curves._compute_precision_effects(is_target, scores)
    assert value == pytest.approx(score(is_target, scores))
    for row in range(30):
        weights, step = np.ones(30), 1e-5
        weights[row] += step
        heavier = score(is_target, scores, sample_weight=weights)
        assert (heavier - value) / step == pytest.approx(effects[row], abs=1e-4)


def test_perfect_and_lonely_classes_have_wilsons_interval():
    targets = np.repeat([0, 1], [10, 1])
    probabilities = np.stack([1.0 - targets, targets.astype(float)], axis=1)
    bounds, macro = curves.compute_average_precision_intervals(targets, probabilities)
    assert bounds[0] == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert bounds[1] == pytest.approx((0.0513, 1.0), abs=1e-4)
    # Their distances to 1 add up as those of independent estimates.
    assert macro == pytest.approx((1 - np.hypot(0.2775, 0.9487) / 2, 1.0), abs=1e-4)


def test_absent_classes_have_no_interval_and_stay_out_of_the_mean():
    targets, probabilities = make_scores()
    wider = np.c_[probabilities * 0.9, np.full(len(targets), 0.1)]
    bounds, macro = curves.compute_average_precision_intervals(targets, wider)
    assert np.isnan(bounds[3]).all()
    expected_bounds, expected_macro = curves.compute_average_precision_intervals(targets, probabilities)
    np.testing.assert_allclose(bounds[:3], expected_bounds)
    assert macro == pytest.approx(expected_macro)


def test_the_lower_limit_of_the_mean_allows_for_the_bias_of_few_rows():
    """Scores that say nothing: the average precision is the share of the class, and of few rows far above it."""
    generator, covered, values = np.random.default_rng(9), [], []
    shares = np.array([0.05, 0.15, 0.3, 0.5])
    for _ in range(300):
        targets = np.r_[generator.choice(4, 118, p=shares), 0, 1]
        probabilities = generator.dirichlet(np.ones(4), 120)
        _, (low, high) = curves.compute_average_precision_intervals(targets, probabilities)
        values.append(curves.compute_average_precisions(targets, probabilities).mean())
        truth = (np.bincount(targets, minlength=4) / 120).mean()
        covered.append(low <= truth <= high)
    assert np.mean(values) > 0.25 + 0.02
    assert np.mean(covered) > 0.93
