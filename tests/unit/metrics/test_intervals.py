from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dlfer.metrics import classification as metrics
from dlfer.metrics import curves
from dlfer.metrics import intervals as iv


@pytest.mark.parametrize(("successes", "n"), [(0, 50), (50, 50), (7, 10), (4, 90), (2500, 3589)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_that_of_statsmodels(successes, n, level):
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    expected = proportion.proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert iv.compute_wilson_interval(successes, n, level) == pytest.approx(expected, abs=1e-12)
    low, high = iv.compute_wilson_interval(successes, n, level)
    assert 0 <= low <= successes / n <= high <= 1


@pytest.mark.parametrize(("successes", "n"), [(1, 30), (2, 50), (1, 400), (3, 400)])
def test_few_successes_have_the_poisson_limit_of_brown_cai_and_dasgupta(successes, n):
    expected = stats.chi2.ppf(0.05, 2 * successes) / 2 / n
    low, high = iv.compute_wilson_interval(successes, n)
    assert low == pytest.approx(expected)
    assert iv.compute_wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("n", [20, 50, 150, 400])
def test_the_interval_of_a_proportion_covers_by_enumeration(n):
    """The exact coverage, the sum of the binomial chances of the counts whose interval has p; Wilson's own has 0.84."""
    chances = np.r_[np.geomspace(0.02, 4, 120) / n, np.linspace(0.05, 0.5, 60)]
    counts = np.arange(n + 1)
    bounds = np.array([iv.compute_wilson_interval(int(count), n) for count in counts])
    inside = (bounds[:, :1] <= chances) & (chances <= bounds[:, 1:])
    covered = (stats.binom.pmf(counts[:, None], n, chances) * inside).sum(axis=0)
    assert covered.min() > 0.91
    assert covered.mean() > 0.945


def test_the_effective_interval_of_a_binomial_proportion_is_wilsons():
    assert iv.compute_effective_interval(0.7, 0.7 * 0.3 / 200, 999) == pytest.approx(
        iv.compute_wilson_interval(140, 200)
    )
    assert iv.compute_effective_interval(1.0, 0.0, 40) == iv.compute_wilson_interval(40, 40)
    wide, narrow = (iv.compute_effective_interval(0.7, variance, 200) for variance in (0.01, 0.001))
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]


def test_mover_of_normal_intervals_is_the_normal_interval_of_the_sum():
    generator = np.random.default_rng(0)
    factors = generator.normal(size=(4, 4))
    covariances, weights, values = factors @ factors.T, np.array([0.1, 0.2, 0.3, 0.4]), generator.normal(size=4)
    errors = np.sqrt(np.diag(covariances))
    limits = np.stack([values - 1.96 * errors, values + 1.96 * errors], axis=1)
    found = iv.compute_mover_interval(values, limits, weights, covariances / np.outer(errors, errors))
    half = 1.96 * np.sqrt(weights @ covariances @ weights)
    assert found == pytest.approx((weights @ values - half, weights @ values + half))


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


def make_scores(n=80, seed=0, shift=1.0):
    generator = np.random.default_rng(seed)
    targets = np.repeat([0, 1, 2], [n // 2, n // 4, n // 4])
    logits = np.round(generator.normal(size=(len(targets), 3)), 1)
    logits[np.arange(len(targets)), targets] += shift
    probabilities = np.exp(logits)
    return targets, probabilities / probabilities.sum(axis=1, keepdims=True)


def test_auc_interval_is_delongs_written_out():
    targets, probabilities = make_scores(n=800)
    bounds, _ = curves.compute_auc_intervals(targets, probabilities)
    for c in range(3):
        x, y = probabilities[targets == c, c], probabilities[targets != c, c]
        wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
        area = wins.mean()
        variance = wins.mean(axis=1).var(ddof=1) / len(x) + wins.mean(axis=0).var(ddof=1) / len(y)
        logit, half = np.log(area / (1 - area)), 1.959964 * np.sqrt(variance) / (area * (1 - area))
        expected = 1 / (1 + np.exp(-np.array([logit - half, logit + half])))
        assert bounds[c] == pytest.approx(expected, abs=1e-6)


def test_auc_of_few_rows_contains_delongs_interval_and_every_area_that_hanley_and_mcneil_do_not_reject():
    targets, probabilities = make_scores(n=80, seed=2, shift=2.0)
    x, y = probabilities[targets == 1, 1], probabilities[targets != 1, 1]
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])
    area, few, rest = wins.mean(), len(x), len(y)
    low, high = curves.compute_auc_intervals(targets, probabilities)[0][1]

    def compute_variance(a):
        by_positives, by_negatives = a / (2 - a) - a**2, 2 * a**2 / (1 + a) - a**2
        equal = (few + rest) / 2 - 1  # Newcombe's method 5 takes the mean of both numbers of rows
        return (a * (1 - a) + equal * (by_positives + by_negatives)) / (few * rest)

    for a in np.linspace(0.5, 0.999, 200):
        if abs(a - area) < 1.9599 * np.sqrt(compute_variance(a)):
            assert low <= a <= high
    variance = wins.mean(axis=1).var(ddof=1) / few + wins.mean(axis=0).var(ddof=1) / rest
    logit, half = np.log(area / (1 - area)), 1.9599 * np.sqrt(variance) / (area * (1 - area))
    assert low <= 1 / (1 + np.exp(half - logit))
    assert high >= 1 / (1 + np.exp(-half - logit))


def test_auc_near_1_that_few_rows_decide_has_at_least_hanley_and_mcneils_interval():
    """150 rows of 1,000, three of which lie among the rest: DeLong's interval says more than three rows can."""
    targets = np.repeat([0, 1], [150, 850])
    scores = np.r_[np.full(147, 0.9), 0.485, 0.49, 0.495, np.linspace(0.01, 0.5, 850)]
    low, high = curves.compute_auc_intervals(targets, np.stack([scores, 1 - scores], axis=1))[0][0]
    area = curves.compute_auc(targets == 0, scores)
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 149 * (q1 - area**2) + 849 * (q2 - area**2)) / (150 * 850))
    assert low < area - 1.3 * error
    assert area < high < 1


def test_macro_auc_interval_agrees_with_a_bootstrap():
    targets, probabilities = make_scores(n=200)
    _, (low, high) = curves.compute_auc_intervals(targets, probabilities)
    generator = np.random.default_rng(3)
    drawn = []
    for _ in range(600):
        rows = np.concatenate(
            [generator.choice(np.flatnonzero(targets == c), size=(targets == c).sum()) for c in range(3)]
        )
        drawn.append(curves.compute_aucs(targets[rows], probabilities[rows]).mean())
    assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.015)


def test_a_perfect_auc_still_has_a_lower_bound_below_1():
    targets = np.repeat([0, 1], [5, 20])
    probabilities = np.stack([1.0 - targets, targets.astype(float)], axis=1)
    bounds, macro = curves.compute_auc_intervals(targets, probabilities)
    assert bounds[0][1] == 1.0
    assert 0.5 < bounds[0][0] < 0.95
    assert macro == pytest.approx(bounds[0])


def test_auc_of_one_row_against_many_has_a_wide_interval():
    targets = np.array([0] + [1] * 19)
    probabilities = np.stack([np.linspace(0.5, 0.9, 20), np.linspace(0.5, 0.1, 20)], axis=1)
    probabilities[0] = [0.8, 0.2]
    (low, high), _ = curves.compute_auc_intervals(targets, probabilities)[0]
    assert high - low > 0.4


def test_auc_is_nan_for_absent_classes():
    bounds, macro = curves.compute_auc_intervals(np.zeros(4, dtype=int), np.full((4, 2), 0.5))
    assert np.isnan(bounds).all()
    assert np.isnan(macro).all()


def test_mean_interval():
    values = np.array([1.0, 2.0, 3.0, 4.0])
    low, high = iv.compute_mean_interval(values)
    expected = stats.t.interval(0.95, 3, loc=2.5, scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=1e-9)
    assert iv.compute_mean_interval(np.array([0.0, 0.0, 3.0]), smallest=0.0)[0] == 0.0
    assert np.isnan(iv.compute_mean_interval(np.array([1.0]), smallest=0.0)).all()


def test_the_interval_of_a_mean_of_symmetric_values_is_students_and_of_skewed_ones_leans_to_the_tail():
    generator = np.random.default_rng(0)
    values = generator.random(300)
    values = np.r_[values, 1 - values]
    assert iv.compute_skew_interval(values) == pytest.approx(iv.compute_mean_interval(values), abs=1e-6)
    skewed = generator.exponential(size=60) ** 2
    low, high = iv.compute_skew_interval(skewed)
    student = iv.compute_mean_interval(skewed)
    assert student[0] < low < skewed.mean() < student[1] < high
    assert np.isnan(iv.compute_skew_interval(np.full(5, 0.3))).all()


def test_the_interval_of_a_skewed_mean_covers():
    generator = np.random.default_rng(1)
    samples = generator.lognormal(0, 1.2, size=(1500, 150))
    bounds = np.array([iv.compute_skew_interval(sample) for sample in samples])
    student = np.array([iv.compute_mean_interval(sample) for sample in samples])
    truth = np.exp(1.2**2 / 2)
    covered, of_student = (((b[:, 0] <= truth) & (truth <= b[:, 1])).mean() for b in (bounds, student))
    assert covered > 0.93 > of_student


def test_the_widened_level_has_students_quantile():
    assert iv.compute_quantile(iv.widen_level(0.95, 9)) == pytest.approx(stats.t.ppf(0.975, 9))


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
"""Classes that are found well and badly, so that their shares among the images matter to weighted iv."""


@pytest.mark.parametrize("matrix", [CONFUSION, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", VALUES)
def test_with_many_images_the_interval_is_that_of_a_bootstrap_of_the_images(name, matrix):
    """Drawing images with replacement makes the confusion matrix multinomial; classes have random numbers of them."""
    confusion = 20 * matrix
    n = int(confusion.sum())
    drawn = np.random.default_rng(1).multinomial(n, confusion.ravel() / n, size=20_000).reshape(-1, 3, 3)
    expected = np.quantile(VALUES[name](drawn), [0.025, 0.975])
    found = iv.compute_average_intervals(confusion)[name]
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
    found = iv.compute_average_intervals(CONFUSION)
    assert found["macro_recall"] == found["balanced_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["recall", "precision", "specificity", "f1"])
def test_effects_are_the_derivatives_by_the_cells(name):
    compute = getattr(metrics, f"compute_{name}")
    effects = iv._compute_ratio_effects(name, CONFUSION)
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
    found = iv.compute_average_intervals(confusion)
    for name, compute in VALUES.items():
        low, high = found[name]
        if np.isnan(low):
            assert name in ("mcc", "cohen_kappa", "macro_specificity"), name
            continue
        assert low - 1e-12 <= compute(confusion) <= high + 1e-12, name
        assert high - low > 0.02, name


def test_a_class_without_images_stays_out():
    confusion = np.array([[8, 2, 0], [3, 7, 0], [0, 0, 0]])
    wide, narrow = (iv.compute_average_intervals(m) for m in (confusion, confusion[:2, :2]))
    for name in set(VALUES) - {"macro_specificity"}:
        assert wide[name] == pytest.approx(narrow[name]), name
    per_class = iv.compute_class_intervals(confusion)
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
    assert iv.compute_detection_interval(confusion) == pytest.approx(expected)


def test_detection_at_a_tie_is_rarely_certain():
    """Two labels are equally frequent in the population, so that no class is detected there."""
    drawn = np.random.default_rng(0).multinomial(40, [0.45, 0.45, 0.1], size=(400, 3))
    rolled = np.stack([np.roll(drawn[:, c], c, axis=-1) for c in range(3)], axis=1)
    above = [iv.compute_detection_interval(confusion)[0] > 0 for confusion in rolled]
    assert np.mean(above) <= 0.05


def test_of_two_classes_macro_specificity_is_macro_recall():
    found = iv.compute_average_intervals(np.array([[30, 10], [8, 60]]))
    assert found["macro_specificity"] == found["macro_recall"]


def test_losses_that_are_almost_equal_have_an_interval():
    """Their spread to the third power is 0 in float64, which was divided by."""
    losses = 1e-120 * np.arange(1.0, 21.0)
    low, high = iv.compute_skew_interval(losses)
    assert 0 <= low <= losses.mean() <= high
