from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from dlfer.errors import DataError
from dlfer.metrics import confidence as cal
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.predictions import Predictions


def draw(n: int, *, sharpness: float = 1.0, seed: int = 0, num_classes: int = 5) -> Predictions:
    """Targets drawn from known probabilities, which are then reported as their power `sharpness`."""
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(n, num_classes))
    true = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (true.cumsum(axis=1) > generator.random((n, 1))).argmax(axis=1)
    told = np.exp(sharpness * logits)
    return Predictions(
        np.arange(n).astype(str), tuple("abcdefg"[:num_classes]), targets, told / told.sum(axis=1, keepdims=True)
    )


def top(predictions: Predictions) -> np.ndarray:
    return predictions.probabilities.max(axis=1)


def get_ece(predictions: Predictions, binning: str = "equal_mass") -> float:
    return cal.compute_calibration(predictions)["raw"][f"ece_{binning}"]["value"]


@pytest.mark.parametrize(("binning", "strategy"), [("mass", "quantile"), ("width", "uniform")])
def test_reliability_and_ece_are_those_of_scikit_learns_calibration_curve(binning, strategy):
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    p = draw(702)
    rows = cal.compute_reliability(top(p), p.correct, binning=binning)
    accuracy, confidence = calibration_curve(p.correct, top(p).astype(float), n_bins=15, strategy=strategy)
    np.testing.assert_allclose([row["accuracy"] for row in rows], accuracy)
    np.testing.assert_allclose([row["confidence"] for row in rows], confidence)
    counts = np.array([row["n"] for row in rows])
    assert counts.sum() == 702
    if binning == "mass":
        assert counts.min() >= 46
        assert counts.max() <= 47
    expected = (counts * np.abs(accuracy - confidence)).sum() / 702
    assert get_ece(p, f"equal_{binning}") == pytest.approx(expected)
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)


def test_a_confidence_of_1_and_one_on_an_edge_have_a_bin_of_equal_width():
    confidences = np.array([1.0, 1.0, 1 / 15, 0.5])
    correct = np.array([True, False, True, True])
    rows = cal.compute_reliability(confidences, correct, binning="width")
    assert [row["n"] for row in rows] == [1, 1, 2]


def test_classwise_ece_is_the_mean_of_the_binary_ones():
    p = draw(400, sharpness=2.0)
    per_class = []
    for c in range(len(p.labels)):
        rows = cal.compute_reliability(p.probabilities[:, c], p.targets == c, binning="width")
        per_class.append(sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(p))
    assert cal.compute_calibration(p)["raw"]["classwise_ece"]["value"] == pytest.approx(np.mean(per_class))


def test_classwise_ece_counts_a_class_that_is_never_the_target():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    # Class 0 is off by 0.5, class 1 by 0.3 and the absent one by 0.2.
    p = Predictions(np.array(["a", "b"]), ("a", "b", "c"), np.array([0, 0]), probabilities)
    assert cal.compute_calibration(p)["raw"]["classwise_ece"]["value"] == pytest.approx(1 / 3)


def test_brier_is_scikit_learns():
    score = pytest.importorskip("sklearn.metrics").brier_score_loss
    p = draw(300)
    found = cal.compute_item_briers(p.targets, p.probabilities).mean()
    probabilities = p.probabilities.astype(float)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert found == pytest.approx(score(p.targets, probabilities, scale_by_half=False, labels=range(5)), abs=1e-6)


@pytest.mark.parametrize("n", [100, 3589])
def test_the_ece_of_a_calibrated_classifier_is_foretold(n):
    some = [draw(n, seed=seed) for seed in range(60)]
    measured = np.mean([get_ece(p) for p in some])
    foretold = np.mean([cal.compute_ece_if_calibrated(top(p)) for p in some])
    assert foretold == pytest.approx(measured, rel=0.1)
    assert foretold == pytest.approx(np.sqrt(15 / n) / 3, rel=0.2)


@pytest.mark.parametrize(("sharpness", "n"), [(1.0, 300), (1.0, 3000), (1.6, 3000)])
def test_the_interval_of_the_ece_covers_the_truth(sharpness, n):
    large = draw(300_000, sharpness=sharpness, seed=99)
    truth = get_ece(large) if sharpness != 1 else 0.0
    figures = [
        cal.compute_calibration(draw(n, sharpness=sharpness, seed=seed))["raw"]["ece_equal_mass"] for seed in range(40)
    ]
    covered = np.mean([figure["low"] <= truth <= figure["high"] for figure in figures])
    assert covered >= 0.9
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in figures)
    assert np.mean([figure["low"] > 0.05 for figure in figures]) == (sharpness != 1)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_undoes_the_sharpness(sharpness):
    p = draw(20_000, sharpness=sharpness)
    assert cal.fit_temperature(p) == pytest.approx(sharpness, rel=0.04)


def test_the_temperature_has_the_smallest_loss_of_a_grid():
    log_loss = pytest.importorskip("sklearn.metrics").log_loss
    p = draw(400, sharpness=1.7)
    grid = np.geomspace(0.1, 10, 400)
    losses = [log_loss(p.targets, cal.apply_temperature(p.probabilities, t), labels=range(5)) for t in grid]
    found = cal.fit_temperature(p)
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.02)
    assert log_loss(p.targets, cal.apply_temperature(p.probabilities, found), labels=range(5)) <= min(losses) + 1e-9


def test_a_temperature_is_the_softmax_of_divided_logits_and_keeps_the_order():
    softmax = pytest.importorskip("scipy.special").softmax
    logits = np.random.default_rng(0).normal(size=(50, 4))
    told = softmax(logits, axis=1)
    np.testing.assert_allclose(cal.apply_temperature(told, 2.5), softmax(logits / 2.5, axis=1), rtol=1e-12)
    np.testing.assert_allclose(cal.apply_temperature(told, 1.0), told, rtol=1e-12)
    p = draw(2000)
    for temperature in (0.1, 0.7, 3.0, 10.0):
        np.testing.assert_array_equal(cal.apply_temperature(p.probabilities, temperature).argmax(axis=1), p.predicted)


def test_a_probability_of_0_stays_finite():
    scaled = cal.apply_temperature(np.array([[1.0, 0.0]], dtype=np.float32), 2.0)
    assert np.isfinite(scaled).all()
    assert scaled[0, 1] < 1e-18


def test_all_right_gives_the_bound_and_says_so():
    p = Predictions(
        np.arange(200).astype(str), ("a", "b"), np.arange(200) % 2, np.eye(2)[np.arange(200) % 2] * 0.8 + 0.1
    )
    found = cal.describe_temperature(p, "PublicTest").as_json()
    assert found["value"] == 0.1
    assert "no image is wrong" in found["note"]
    assert (found["fitted_on"], found["n"]) == ("PublicTest", 200)


def test_confident_errors_give_the_upper_bound_and_few_images_are_told():
    p = Predictions(["0", "1"], ("a", "b"), [0, 1], [[0.01, 0.99], [0.99, 0.01]])
    found = cal.describe_temperature(p, "validation").as_json()
    assert found["value"] == 10.0
    assert "2 images only" in found["note"]
    assert cal.describe_temperature(draw(500), "validation").as_json()["note"] is None


def test_predictions_that_know_nothing_keep_the_temperature_1():
    p = Predictions(["0", "1", "2"], ("a", "b"), [0, 1, 1], np.full((3, 2), 0.5))
    assert cal.fit_temperature(p) == 1.0


def test_calibration_after_the_temperature_is_better_and_has_the_same_keys():
    p = draw(5000, sharpness=2.0)
    judged = cal.compute_calibration(p, cal.fit_temperature(p))
    raw, scaled = judged["raw"], judged["scaled"]
    assert (
        set(raw)
        == set(scaled)
        == {
            *("ece_equal_mass", "ece_equal_width", "classwise_ece", "brier", "log_loss"),
            *("ece_if_calibrated", "reliability"),
        }
    )
    for name in ("ece_equal_mass", "ece_equal_width", "classwise_ece", "brier", "log_loss"):
        assert scaled[name]["value"] < raw[name]["value"]
        assert scaled[name]["low"] <= scaled[name]["value"] <= scaled[name]["high"]
    assert scaled["ece_equal_mass"]["value"] < 0.03 < raw["ece_equal_mass"]["low"]
    assert [row["accuracy"] for row in raw["reliability"]] != [row["accuracy"] for row in scaled["reliability"]]
    assert cal.compute_calibration(p)["scaled"] is None
    assert cal.compute_calibration(p)["raw"] == raw
    json.dumps(judged, allow_nan=False)


def test_the_bias_of_an_absolute_value_is_that_of_the_folded_normal():
    stats = pytest.importorskip("scipy.stats")
    x = np.array([0.0, 0.1, 0.5, 1.0, 2.5, 6.0])
    assert cal._compute_folding_bias(x) == pytest.approx(stats.foldnorm.mean(x) - x, abs=1e-12)


def test_the_interval_of_an_ece_whose_bias_is_negligible_is_that_of_a_mean():
    """One bin with a large gap: the ECE is |mean of outcome - forecast|."""
    outcomes = np.random.default_rng(0).random(400) < 0.6
    forecasts = np.full(400, 0.85)
    binned = cal._bin(forecasts, outcomes, "width")
    low, high = cal.compute_ece_interval([binned])
    errors = (outcomes - forecasts) / 1
    half = 1.959964 * errors.std(ddof=1) / 20
    assert (low, high) == pytest.approx((abs(errors.mean()) - half, abs(errors.mean()) + half), rel=0.01)


def test_one_image_has_a_value_and_no_interval():
    p = Predictions(["0"], ("a", "b"), [1], [[0.3, 0.7]])
    figure = cal.compute_calibration(p)["raw"]["ece_equal_mass"]
    assert figure["value"] == pytest.approx(0.3)
    assert np.isnan([figure["low"], figure["high"]]).all()


def test_a_perfect_classifier_has_no_error():
    p = Predictions(np.arange(30).astype(str), ("a", "b", "c"), np.arange(30) % 3, np.eye(3)[np.arange(30) % 3])
    judged = cal.compute_calibration(p, 1.0)["raw"]
    for name in ("ece_equal_mass", "ece_equal_width", "classwise_ece", "brier"):
        assert judged[name]["value"] == 0
        # The true error may be larger; 30 images that are all alike do not tell by how much.
        assert np.isnan([judged[name]["low"], judged[name]["high"]]).all()


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
        coverage, risk, thresholds = cal.compute_risk_coverage(confidences[order], correct[order])
        assert coverage.tolist() == [1.0, 0.75, 0.25]
        assert risk.tolist() == pytest.approx([1 / 4, 1 / 3, 0])
        assert thresholds.tolist() == [0.6, 0.8, 0.9]
        assert cal.compute_aurc(confidences[order], correct[order]) == pytest.approx((1 / 4 + 2 / 3 + 0) / 4)


def test_aurc_is_0_where_all_are_right_and_the_error_rate_where_confidence_says_nothing():
    assert cal.compute_aurc(np.array([0.5, 0.7]), np.array([True, True])) == 0.0
    assert cal.compute_aurc(np.full(4, 0.5), np.array([True, False, True, True])) == 0.25


def test_the_threshold_is_the_lowest_that_reaches_the_accuracy():
    p = make([0.95, 0.9, 0.85, 0.8, 0.7, 0.6], [True, True, False, True, False, False])
    # Answered from above: 1/1, 2/2, 2/3, 3/4, 3/5, 3/6.
    assert cal.choose_threshold(p, 0.75) == pytest.approx(0.8, abs=1e-6)
    assert cal.choose_threshold(p, 0.9) == pytest.approx(0.9, abs=1e-6)
    assert cal.choose_threshold(p, 0.5) == 0.0
    found = cal.compute_selective(p, cal.choose_threshold(p, 0.75))["at_threshold"]
    assert found["n"] == 4
    assert found["coverage"]["value"] == pytest.approx(4 / 6)
    assert found["accuracy"]["value"] == 0.75


def test_a_tie_is_not_cut_to_reach_the_accuracy():
    p = make([0.9, 0.9, 0.6], [True, False, False])
    assert cal.choose_threshold(p, 0.8) is None
    assert cal.choose_threshold(p, 0.5) == pytest.approx(0.9, abs=1e-6)


def test_an_accuracy_out_of_reach_or_range():
    assert cal.choose_threshold(make([0.9, 0.6], [False, True]), 0.8) is None
    with pytest.raises(DataError, match="target accuracy of 80"):
        cal.choose_threshold(make([0.9], [True]), 80)


def test_intervals_at_the_threshold_are_wilsons():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.5, 1, 400)
    p = make(confidences, generator.random(400) < confidences)
    found = cal.compute_selective(p, 0.8)["at_threshold"]
    answered = p.probabilities.max(axis=1) >= 0.8
    for name, hits, n in (("coverage", answered, 400), ("accuracy", p.correct[answered], int(answered.sum()))):
        low, high = proportion.proportion_confint(int(hits.sum()), n, method="wilson")
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high))


def test_a_threshold_above_every_confidence_answers_nothing():
    found = cal.compute_selective(make([0.7, 0.6], [True, True]), 0.99)["at_threshold"]
    assert found["n"] == 0
    assert found["coverage"]["value"] == 0.0
    assert np.isnan(found["accuracy"]["value"])
    assert cal.compute_selective(make([0.7], [True]))["at_threshold"] is None


@pytest.mark.parametrize("n", [1, 7, 101, 102, 5000])
def test_the_stored_curve_is_thinned_without_losing_its_ends(n):
    generator = np.random.default_rng(n)
    p = make(generator.uniform(0.5, 1, n), generator.random(n) < 0.7)
    curve = cal.compute_selective(p)["curve"]
    coverage, risk, thresholds = cal.compute_risk_coverage(cal.get_confidences(p), p.correct)
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
    low, high = cal.compute_aurc_interval(confidences, correct)
    found = stats.bootstrap(
        (confidences, correct), cal.compute_aurc, paired=True, vectorized=False, method="percentile",
        n_resamples=2000, random_state=2,
    ).confidence_interval  # fmt: skip
    assert low < cal.compute_aurc(confidences, correct) < high
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.1 * (found.high - found.low))


def test_effects_on_the_area_are_its_derivatives_by_the_weights():
    rng = np.random.default_rng(2)
    confidences, wrong = rng.integers(0, 9, 40) / 10, rng.random(40) < 0.4

    def compute_area(weights):
        above = confidences[None] >= confidences[:, None]
        risks = (above * weights * wrong).sum(axis=1) / (above * weights).sum(axis=1)
        return (weights * risks).sum() / weights.sum()

    assert compute_area(np.ones(40)) == pytest.approx(cal.compute_aurc(confidences, ~wrong))
    effects = cal.compute_aurc_effects(confidences, ~wrong)
    for row in range(40):
        step = np.eye(40)[row] * 1e-5
        expected = (compute_area(1 + step) - compute_area(1 - step)) / 2e-5
        assert effects[row] == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("right", [True, False])
def test_the_interval_of_an_area_without_scatter_is_that_of_the_error_rate(right):
    found = cal.compute_aurc_interval(np.linspace(0.3, 0.9, 40), np.full(40, right))
    assert found == compute_wilson_interval(0 if right else 40, 40)


def test_each_point_of_the_curve_has_the_interval_of_its_risk():
    curve = cal.compute_selective(make(np.linspace(0.5, 0.99, 60), np.arange(60) % 3 > 0))["curve"]
    assert all(point["low"] <= point["risk"] <= point["high"] for point in curve)
    widths = [point["high"] - point["low"] for point in curve]
    assert widths[-1] > widths[0]  # fewer images answered
