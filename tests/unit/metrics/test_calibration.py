from __future__ import annotations

import json

import numpy as np
import pytest

from dlfer.metrics import calibration as cal
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
