from __future__ import annotations

import numpy as np
import pytest

from dlfer.evaluate import areas, metrics
from dlfer.evaluate import intervals as iv


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 50), (50, 50), (7, 10), (2500, 3589)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_that_of_statsmodels(successes, n, level):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert iv.compute_wilson_interval(successes, n, level) == pytest.approx(expected, abs=1e-12)
    low, high = iv.compute_wilson_interval(successes, n, level)
    assert 0 <= low <= successes / n <= high <= 1


def test_wilson_without_trials_is_nan():
    assert np.isnan(iv.compute_wilson_interval(0, 0)).all()


def test_half_width_at_the_size_of_privatetest_is_one_and_a_half_points():
    low, high = iv.compute_wilson_interval(2512, 3589)
    assert (high - low) / 2 == pytest.approx(0.015, abs=2e-4)


def test_f1_interval_covers_the_true_f1():
    generator = np.random.default_rng(0)
    # Rows: 60 of the class found with 0.7; 200 of the rest taken for it with 0.1.
    hits, false_positives = generator.binomial(60, 0.7, 2000), generator.binomial(200, 0.1, 2000)
    truth = 2 * 42 / (60 + 42 + 20)
    bounds = [iv.compute_f1_interval(int(h), int(60 - h + f)) for h, f in zip(hits, false_positives, strict=True)]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert 0.93 < covered < 0.99
    assert iv.compute_f1_interval(10, 0)[1] == 1.0
    assert 0 < iv.compute_f1_interval(10, 0)[0] < 1


CONFUSION = np.array([[60, 30, 10], [20, 150, 30], [5, 5, 30]])


def test_bootstrap_of_the_confusion_is_the_stratified_bootstrap_of_the_rows():
    bounds = iv.compute_bootstrap_intervals(CONFUSION, {"f1": metrics.compute_macro_f1}, resamples=4000, seed=1)
    cells = np.repeat(np.arange(9), CONFUSION.ravel())
    targets, predicted = cells // 3, cells % 3
    generator = np.random.default_rng(2)
    drawn = []
    for _ in range(2000):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(targets == c), size=(targets == c).sum()) for c in range(3)]
        )
        drawn.append(metrics.compute_macro_f1(metrics.compute_confusion(targets[rows], predicted[rows], 3)))
    assert bounds["f1"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


def test_bootstrap_depends_on_the_seed_alone(monkeypatch):
    statistics = {"accuracy": metrics.compute_accuracy}
    first = iv.compute_bootstrap_intervals(CONFUSION, statistics, resamples=300, seed=5)
    assert first == iv.compute_bootstrap_intervals(CONFUSION, statistics, resamples=300, seed=5)
    assert first != iv.compute_bootstrap_intervals(CONFUSION, statistics, resamples=300, seed=6)
    # Many classes are drawn in pieces to bound memory; the pieces together are the same draws.
    monkeypatch.setattr(iv, "_CELLS_AT_ONCE", 90)
    assert first == iv.compute_bootstrap_intervals(CONFUSION, statistics, resamples=300, seed=5)


def test_bootstrap_bears_classes_without_rows():
    confusion = np.array([[8, 2, 0], [3, 7, 0], [0, 0, 0]])
    bounds = iv.compute_bootstrap_intervals(confusion, {"f1": metrics.compute_macro_f1}, resamples=200)
    assert 0 < bounds["f1"][0] < metrics.compute_macro_f1(confusion) < bounds["f1"][1] < 1


@pytest.mark.parametrize(
    "confusion",
    [np.diag([20, 20, 20]), np.array([[20, 0, 0]] * 3), np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]])],
    ids=["all right", "all one class", "one image"],
)
def test_bootstrap_where_every_resample_is_the_same_is_no_certainty(confusion):
    statistics = {
        "recall": lambda m: metrics.compute_macro(metrics.compute_recall(m), m),
        "f1": metrics.compute_macro_f1,
    }
    if (confusion.sum(axis=1) > 0).sum() > 1:  # of one class alone it is always 0
        statistics["mcc"] = metrics.compute_mcc
    for name, (low, high) in iv.compute_bootstrap_intervals(confusion, statistics, resamples=500).items():
        assert low <= statistics[name](confusion) <= high, name
        assert high - low > 0.02, name
    many = iv.compute_bootstrap_intervals(1000 * confusion, statistics, resamples=500)["recall"]
    assert many[1] - many[0] < 0.02


def make_scores(n=80, seed=0, shift=1.0):
    generator = np.random.default_rng(seed)
    targets = np.repeat([0, 1, 2], [n // 2, n // 4, n // 4])
    logits = np.round(generator.normal(size=(len(targets), 3)), 1)
    logits[np.arange(len(targets)), targets] += shift
    probabilities = np.exp(logits)
    return targets, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_auc_interval_is_delongs_written_out():
    targets, probabilities = make_scores()
    bounds, _ = areas.compute_auc_intervals(targets, probabilities)
    for c in range(3):
        x, y = probabilities[targets == c, c], probabilities[targets != c, c]
        wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
        area = wins.mean()
        variance = wins.mean(axis=1).var(ddof=1) / len(x) + wins.mean(axis=0).var(ddof=1) / len(y)
        logit, half = np.log(area / (1 - area)), 1.959964 * np.sqrt(variance) / (area * (1 - area))
        expected = 1 / (1 + np.exp(-np.array([logit - half, logit + half])))
        assert bounds[c] == pytest.approx(expected, abs=1e-6)


def test_macro_auc_interval_agrees_with_a_bootstrap():
    targets, probabilities = make_scores(n=200)
    _, (low, high) = areas.compute_auc_intervals(targets, probabilities)
    generator = np.random.default_rng(3)
    drawn = []
    for _ in range(600):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(targets == c), size=(targets == c).sum()) for c in range(3)]
        )
        drawn.append(metrics.compute_aucs(targets[rows], probabilities[rows]).mean())
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)


def test_a_perfect_auc_still_has_a_lower_bound_below_1():
    targets = np.repeat([0, 1], [5, 20])
    probabilities = np.stack([1.0 - targets, targets.astype(float)], axis=1)
    bounds, macro = areas.compute_auc_intervals(targets, probabilities)
    assert bounds[0][1] == 1.0
    assert 0.5 < bounds[0][0] < 0.95
    assert macro == pytest.approx(bounds[0])


def test_auc_of_one_row_against_many_has_a_wide_interval():
    targets = np.array([0] + [1] * 19)
    probabilities = np.stack([np.linspace(0.5, 0.9, 20), np.linspace(0.5, 0.1, 20)], axis=1)
    probabilities[0] = [0.8, 0.2]
    (low, high), _ = areas.compute_auc_intervals(targets, probabilities)[0]
    assert high - low > 0.4


def test_auc_is_nan_for_absent_classes():
    bounds, macro = areas.compute_auc_intervals(np.zeros(4, dtype=int), np.full((4, 2), 0.5))
    assert np.isnan(bounds).all()
    assert np.isnan(macro).all()


def test_mean_interval():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = iv.compute_mean_interval(values)
    assert (low, high) == pytest.approx((2.5 - 1.26516, 2.5 + 1.26516), abs=1e-4)
    assert iv.compute_mean_interval(np.array([0.0, 0.0, 3.0]), smallest=0.0)[0] == 0.0
    assert np.isnan(iv.compute_mean_interval(np.array([1.0]), smallest=0.0)).all()


@pytest.mark.parametrize(
    "figure", [metrics.compute_macro_f1, metrics.compute_mcc, metrics.compute_kappa], ids=lambda f: f.__name__
)
def test_bootstrap_of_the_confusion_is_that_of_scipy(figure):
    """scipy draws the rows of each class (one sample per class) and computes the figure from them."""
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    rows = [np.repeat(np.arange(3), CONFUSION[c]) for c in range(3)]

    def compute(*predicted):
        return float(figure(np.stack([np.bincount(some, minlength=3) for some in predicted])))

    expected = bootstrap(
        rows, compute, n_resamples=2000, method="percentile", vectorized=False, random_state=np.random.default_rng(1)
    ).confidence_interval
    found = iv.compute_bootstrap_intervals(CONFUSION, {"figure": figure}, resamples=4000, seed=1)["figure"]
    assert found == pytest.approx((expected.low, expected.high), abs=0.008)


def test_drawn_rows_are_counts_of_resamples_in_pieces(monkeypatch):
    whole = list(iv.iterate_row_weights(7, 10, np.random.default_rng(0)))
    assert [(start, weights.shape) for start, weights in whole] == [(0, (10, 7))]
    assert (whole[0][1].sum(axis=1) == 7).all()
    monkeypatch.setattr(iv, "_CELLS_AT_ONCE", 21)
    pieces = list(iv.iterate_row_weights(7, 10, np.random.default_rng(0)))
    assert [start for start, _ in pieces] == [0, 3, 6, 9]
    np.testing.assert_array_equal(np.concatenate([weights for _, weights in pieces]), whole[0][1])
