"""Confidence of a classifier: calibration, temperature scaling, and abstention at low confidence.

The expected calibration error (ECE) sorts images into bins of similar confidence and averages the absolute difference
between mean confidence and accuracy. It is biased upward, since the accuracy within a bin varies by chance and an
absolute difference cannot be negative: even a perfectly calibrated classifier has an ECE of about sqrt(bins / n) / 3 (2
percentage points at n = 3,589, 13 at n = 100, with 15 bins). `ece_if_calibrated` is this bias for the confidences at
hand; an ECE near it is no evidence of miscalibration.

With abstention an image is answered if its confidence, the largest of the probabilities that the caller gives (of trained
models those after temperature scaling), is at least the threshold. Images of equal confidence are answered or rejected together, so no metric depends on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dlfer.errors import DataError, ModelError
from dlfer.metrics.classification import compute_item_losses
from dlfer.metrics.intervals import (
    UNDEFINED,
    compute_effective_interval,
    compute_mean,
    compute_proportion,
    compute_quantile,
    compute_wilson_interval,
    widen_level,
)
from dlfer.metrics.predictions import Predictions
from dlfer.runs.records import Temperature

NUM_BINS = 15
"""The number of bins of reliability diagrams and ECE, as in most publications."""

BINNINGS = ("mass", "width")
"""mass: bins of equally many images; width: bins of equal width."""

TEMPERATURES = (0.1, 10.0)
"""Bounds of the fitted temperature; that of a good network is well within (0.5 to 3)."""

FEW_IMAGES = 100
"""A temperature fitted on fewer images than this gets a note."""

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Replaces a probability of 0, whose logarithm would be infinite."""


class Binned(NamedTuple):
    """A binary forecast sorted into bins: the bin of each row (int64 [N]), outcome minus forecast, and forecast."""

    bins: np.ndarray
    gaps: np.ndarray
    forecasts: np.ndarray


def compute_reliability(confidences: np.ndarray, correct: np.ndarray, *, binning: str = "mass") -> list[dict[str, Any]]:
    """Return the reliability diagram: mean confidence and accuracy of each bin that is not empty.

    Args:
        confidences: float [N] in 0..1.
        correct: bool [N].
        binning: "mass" or "width"; 15 bins, which include their upper edges, so equal confidences share a bin.

    Returns:
        [{"n", "confidence", "accuracy", "low", "high"}] by increasing confidence; Wilson's interval of the accuracy.
    """
    binned = _bin(confidences, correct, binning)
    rows = []
    for number in np.unique(binned.bins):
        inside = binned.bins == number
        n = int(inside.sum())
        accuracy = compute_proportion(int(np.asarray(correct)[inside].sum()), n)
        mean = float(np.asarray(confidences, dtype=np.float64)[inside].mean())
        rows.append({"n": n, "confidence": mean, "accuracy": accuracy.pop("value"), **accuracy})
    return rows


def compute_ece_if_calibrated(confidences: np.ndarray, *, binning: str = "mass") -> float:
    """Return the expected ECE of a perfectly calibrated classifier with these confidences, which is its upward bias."""
    binned = _bin(confidences, np.zeros(len(confidences)), binning)
    confidences = np.asarray(confidences, dtype=np.float64)
    variances = np.bincount(binned.bins, weights=confidences * (1 - confidences))
    return float(np.sqrt(2 / np.pi * np.maximum(variances, 0)).sum() / len(confidences))


def compute_item_briers(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return each row's Brier score: the squared error summed over the classes (float64 [N] in 0..2)."""
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(targets)), targets] -= 1
    return (errors**2).sum(axis=1)


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities**(1 / temperature), normalised: softer if the temperature is above 1, sharper if below.

    This equals the softmax of logits / temperature, since log probabilities are logits up to a constant, and preserves
    the ranking of the classes. The argument is float [N, C], the result float64 [N, C] with rows that sum to one.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).
    """
    logits = _compute_logits(probabilities) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def calibrate(predictions: Predictions, temperature: float | None) -> Predictions:
    """Return predictions after temperature scaling, in the precision of predictions; unchanged if it is None."""
    if temperature is None:
        return predictions
    scaled = apply_temperature(predictions.probabilities, temperature).astype(np.float32)
    return Predictions(predictions.ids, predictions.labels, predictions.targets, scaled)


def check_finite(probabilities: np.ndarray, what: str = "the model") -> np.ndarray:
    """Return the probabilities (float [N, C]) unchanged if all are finite.

    Raises:
        ModelError: some are NaN or infinite.
    """
    wrong = ~np.isfinite(probabilities).all(axis=1)
    if wrong.any():
        raise ModelError(
            f"{what}: found outputs that are NaN or infinite for {int(wrong.sum()):,} of {len(wrong):,} images, expected "
            "probabilities. Its weights are damaged, or too large to compute with: get the model again, or train it again."
        )
    return probabilities


def fit_temperature(predictions: Predictions) -> float:
    """Return the temperature in 0.1..10 that minimises the log loss.

    Fit it on images that the network was not trained on, and evaluate it on yet other images. If no image is wrong, the
    log loss decreases towards 0 without a minimum and the result is the bound 0.1, which `describe_temperature` notes.
    If no other temperature is better, the result is 1.
    """
    from scipy.optimize import minimize_scalar

    logits = _compute_logits(predictions.probabilities)
    logits -= logits.max(axis=1, keepdims=True)
    of_target = logits[np.arange(len(logits)), predictions.targets]

    def compute_loss(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(scale * logits).sum(axis=1)) - scale * of_target))

    low, high = np.log(TEMPERATURES)
    found = minimize_scalar(compute_loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    # The search never reaches its bounds exactly, but the minimum may be on one of them.
    candidates = (1.0, float(np.exp(found.x)), *TEMPERATURES)
    return min(candidates, key=lambda temperature: compute_loss(np.log(temperature)))


def describe_temperature(predictions: Predictions, fitted_on: str) -> Temperature:
    """Fit the temperature and return its record, with a note if the value may be unreliable."""
    value, n = fit_temperature(predictions), len(predictions)
    notes = []
    if n < FEW_IMAGES:
        notes.append(f"fitted on {n} images only")
    if value in TEMPERATURES:
        why = "no image is wrong" if predictions.correct.all() else "the log-loss has no minimum within"
        notes.append(f"at the bound of {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}: {why}")
    return Temperature(value=value, fitted_on=fitted_on, n=n, note="; ".join(notes) or None)


def compute_calibration(predictions: Predictions, temperature: float | None = None) -> dict[str, Any]:
    """Return calibration metrics of predictions, before and after temperature scaling.

    The interval of an ECE, by `compute_ece_interval`, is for the population value with the same bins. It starts at 0 if
    a calibrated classifier could have such an ECE by chance, and always contains the value. Brier score and log loss
    are means over images, with intervals by `compute_skew_interval`.

    Args:
        temperature: fitted on other images; None: "scaled" is None.

    Returns:
        {"raw": CAL, "scaled": CAL or None} with CAL = {"ece_equal_mass", "ece_equal_width", "classwise_ece",
        "brier", "log_loss": {"value", "low", "high"}, "ece_if_calibrated": float, "reliability": bins of equal
        mass}. ECEs are fractions, the Brier score is in 0..2, the log loss in nats. There is no interval for a single
        image, nor if all images are alike (a classifier that is always right and certain). The classwise ECE is the
        mean over the classes of the ECE of their probabilities, in bins of equal width; it is smaller than the others,
        since most probabilities are near 0.

    Source: Naeini, Cooper & Hauskrecht, AAAI 2015 (equal width); Nixon et al., CVPR workshops 2019 (equal mass); Kull
    et al., "Beyond temperature scaling" (NeurIPS 2019), classwise.
    """
    versions = {"raw": predictions.probabilities.astype(np.float64)}
    if temperature is not None:
        versions["scaled"] = apply_temperature(predictions.probabilities, temperature)
    rows, predicted = np.arange(len(predictions)), predictions.predicted
    judged: dict[str, Any] = {"raw": None, "scaled": None}
    for name, probabilities in versions.items():
        confidences = probabilities[rows, predicted]
        judged[name] = {
            **_compute_ece_figures(predictions, confidences, probabilities),
            "brier": compute_mean(compute_item_briers(predictions.targets, probabilities)),
            "log_loss": compute_mean(compute_item_losses(predictions.targets, probabilities)),
            "ece_if_calibrated": compute_ece_if_calibrated(confidences),
            "reliability": compute_reliability(confidences, predictions.correct),
        }
    return judged


def compute_ece_interval(problems: Sequence[Binned], level: float = 0.95) -> tuple[float, float]:
    """Return an interval of the population ECE with the same bins, averaged over several binary forecasts.

    The observed ECE is the sum of |gap| over bins. Its upward bias increases as the true gaps decrease relative to
    their standard errors: it is s h(|gap| / s) for a normal gap with standard error s, where h(x) = E|x + Z| - x. The
    true gaps are unknown. The upper limit subtracts the bias at the observed gaps, which is too small, because these
    are on average larger than the true gaps. The lower limit subtracts the bias at gaps that are 1.5 standard errors
    smaller, which is too large. Both limits then extend by z times the standard error of the sum of gaps with fixed
    signs, which is at least that of the sum of |gap|. The standard error of a bin is the larger of the observed one and
    that expected from the forecasts, since with few images all deviations may be small by chance.

    Args:
        problems: the bins and gaps of the same N >= 2 images for each binary forecast.

    Returns:
        (low, high) in 0..1, which contains the observed ECE; NaN if every forecast is 0 or 1 and right.
    """
    n, scale = len(problems[0].bins), 1 / len(problems)
    gaps, variances, signed = [], [], np.zeros(n)
    for bins, deviations, forecasts in problems:
        of_bins = scale * np.bincount(bins, weights=deviations, minlength=NUM_BINS) / n
        spread = np.bincount(bins, weights=(scale * deviations) ** 2, minlength=NUM_BINS) / n - of_bins**2
        expected = np.bincount(bins, weights=scale**2 * forecasts * (1 - forecasts), minlength=NUM_BINS) / n
        gaps.append(of_bins)
        variances.append(np.maximum(np.maximum(spread, expected), 0) / (n - 1))
        signed += scale * np.sign(of_bins)[bins] * deviations
    gaps, errors = np.concatenate(gaps), np.sqrt(np.concatenate(variances))
    half = compute_quantile(level) * np.sqrt(max(float(signed.var()) / (n - 1), float((errors**2).sum())))
    if not errors.any():
        return UNDEFINED
    value = float(np.abs(gaps).sum())
    ratios = np.divide(np.abs(gaps), errors, out=np.zeros_like(gaps), where=errors > 0)
    largest_bias = float(errors @ _compute_folding_bias(np.maximum(ratios - 1.5, 0)))
    smallest_bias = float(errors @ _compute_folding_bias(ratios))
    low, high = value - largest_bias - half, value - smallest_bias + half
    return max(0.0, min(low, value)), min(1.0, max(high, value))


def _compute_folding_bias(x: np.ndarray) -> np.ndarray:
    """Return E|x + Z| - x for a standard normal Z and x >= 0; it is 0.798 at x = 0 and decreases to 0."""
    from scipy.special import ndtr

    return np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2) - 2 * x * ndtr(-x)


def _compute_ece_figures(
    predictions: Predictions, confidences: np.ndarray, probabilities: np.ndarray
) -> dict[str, Any]:
    top = {f"ece_equal_{binning}": [_bin(confidences, predictions.correct, binning)] for binning in BINNINGS}
    classes = range(probabilities.shape[1])
    problems = {**top, "classwise_ece": [_bin(probabilities[:, c], predictions.targets == c, "width") for c in classes]}
    figures = {}
    for name, several in problems.items():
        value = float(np.mean([_compute_ece(binned) for binned in several]))
        low, high = compute_ece_interval(several) if len(predictions) > 1 else UNDEFINED
        # The value is summed in another order than the limits, so rounding could put it just outside them.
        figures[name] = {"value": value, "low": float(np.minimum(low, value)), "high": float(np.maximum(high, value))}
    return figures


def _bin(forecasts: np.ndarray, outcomes: np.ndarray, binning: str) -> Binned:
    """Sort forecasts into 15 bins, some of which may be empty; equal forecasts share a bin."""
    forecasts = np.asarray(forecasts, dtype=np.float64)
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    if binning == "mass":
        edges = np.quantile(forecasts, edges)
    return Binned(np.searchsorted(edges, forecasts), np.asarray(outcomes, dtype=np.float64) - forecasts, forecasts)


def _compute_ece(binned: Binned) -> float:
    """Return the mean of |accuracy - confidence| over bins, weighted by their numbers of images."""
    return float(np.abs(np.bincount(binned.bins, weights=binned.gaps)).sum() / len(binned.gaps))


def _compute_logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), _SMALLEST))


MAX_POINTS = 101
"""The maximum number of points of a stored risk-coverage curve: about one for each percent of the images."""


def compute_risk_coverage(confidences: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coverage, risk and threshold at each distinct confidence (float64 [M]), from float [N] and bool [N].

    The coverage is the fraction of images answered, decreasing from 1 as the threshold increases; the risk is the
    fraction of the answered images that are wrong.
    """
    thresholds, position = np.unique(np.asarray(confidences, dtype=np.float64), return_inverse=True)
    answered = _sum_from_above(np.bincount(position, minlength=len(thresholds)))
    wrong = _sum_from_above(np.bincount(position[~np.asarray(correct, dtype=bool)], minlength=len(thresholds)))
    return answered / len(position), wrong / answered, thresholds


def compute_aurc(confidences: np.ndarray, correct: np.ndarray) -> float:
    """Return the area under the risk-coverage curve: the mean over images of the risk at their confidence.

    It is 0 if all images are right, and about the error rate if the confidence is uninformative.

    Source: Geifman & El-Yaniv, "Selective Classification for Deep Neural Networks" (NeurIPS 2017); Geifman,
    Uziel & El-Yaniv, "Bias-Reduced Uncertainty Estimation" (ICLR 2019).
    """
    coverage, risk, _ = compute_risk_coverage(confidences, correct)
    return float((risk * -np.diff(np.r_[coverage, 0.0])).sum())


def compute_aurc_interval(confidences: np.ndarray, correct: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return an interval of the area under the risk-coverage curve.

    It is Wilson's interval with the number of images that would give the variance of the area by the infinitesimal
    jackknife, the sum of the squared effects of the images' weights. The variance is determined by the wrong or the
    right images, whichever are fewer: Student's quantile has one degree of freedom less than their number, but at least
    2. If all images are right or all are wrong, the area equals the error rate, whose Wilson interval is returned.

    Args:
        confidences: float [N], N at least 1.
        correct: bool [N].

    Source: Efron, J. R. Stat. Soc. B 54 (1992) 83.
    """
    # Sorted by both keys, so that rounding does not depend on the order of rows.
    wrong = ~np.asarray(correct, dtype=bool)
    order = np.lexsort((wrong, confidences))
    confidences, wrong = np.asarray(confidences)[order], wrong[order]
    n, fewest = len(wrong), int(min(wrong.sum(), (~wrong).sum()))
    if fewest == 0:
        return compute_wilson_interval(int(wrong.sum()), n, level)
    value = compute_aurc(confidences, ~wrong)
    variance = float((compute_aurc_effects(confidences, ~wrong) ** 2).sum()) * n / (n - 1)
    return compute_effective_interval(value, variance, n, widen_level(level, max(fewest - 1, 2)))


def compute_aurc_effects(confidences: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Return the derivative of the area under the risk-coverage curve with respect to each image's weight.

    float64 [N], sums to 0. An image contributes at its own confidence and to the risk at each lower one.
    """
    _, position = np.unique(np.asarray(confidences, dtype=np.float64), return_inverse=True)
    wrong = ~np.asarray(correct, dtype=bool)
    tied = np.bincount(position)
    answered = _sum_from_above(tied)
    risk = _sum_from_above(np.bincount(position[wrong], minlength=len(tied))) / answered
    of_wrong, of_all = np.cumsum(tied / answered), np.cumsum(tied * risk / answered)
    area = float((risk * tied).sum()) / len(wrong)
    return (risk[position] + wrong * of_wrong[position] - of_all[position] - area) / len(wrong)


def choose_threshold(predictions: Predictions, target_accuracy: float) -> float | None:
    """Return the lowest confidence threshold at which the answered images reach an accuracy (a fraction in 0..1).

    The accuracy on the images that the threshold is chosen on is too good, so choose it on validation and evaluate it
    on other images. It is 0 if all images together reach the accuracy, and None if no threshold does.

    Raises:
        DataError: the accuracy is not in 0..1.
    """
    if not 0 <= target_accuracy <= 1:
        raise DataError(f"choose_threshold: found a target accuracy of {target_accuracy}, expected 0..1.")
    _, risk, thresholds = compute_risk_coverage(get_confidences(predictions), predictions.correct)
    reached = np.flatnonzero(1 - risk >= target_accuracy - 1e-12)
    if len(reached) == 0:
        return None
    return float(thresholds[reached[0]]) if reached[0] else 0.0


def compute_selective(predictions: Predictions, threshold: float | None = None) -> dict[str, Any]:
    """Return the risk-coverage curve of predictions, and their coverage and accuracy at a threshold.

    Args:
        threshold: chosen on other images, or None.

    Returns:
        {"aurc": EST, "curve": [{"coverage", "risk", "low", "high", "threshold"}] (coverage from 1
        downwards, at most 101 points; the interval is that of the risk at the threshold), "at_threshold":
        {"threshold", "coverage": EST, "accuracy": EST, "n"} or None} with EST = {"value", "low", "high"}. The intervals
        are Wilson's, that of aurc by `compute_aurc_interval`; the accuracy is NaN if no image is answered.
    """
    confidences, correct = get_confidences(predictions), predictions.correct
    coverage, risk, thresholds = compute_risk_coverage(confidences, correct)
    low, high = compute_aurc_interval(confidences, correct)
    curve = []
    for i in _thin_out(coverage):
        answered = round(coverage[i] * len(correct))
        bounds = compute_proportion(round(risk[i] * answered), answered)
        point = {"coverage": float(coverage[i]), "risk": float(risk[i]), "threshold": float(thresholds[i])}
        curve.append(point | {"low": bounds["low"], "high": bounds["high"]})
    return {
        "aurc": {"value": compute_aurc(confidences, correct), "low": low, "high": high},
        "curve": curve,
        "at_threshold": None if threshold is None else _apply_threshold(confidences, correct, threshold),
    }


def get_confidences(predictions: Predictions) -> np.ndarray:
    """Return the largest probability of each row (float64 [N])."""
    return predictions.probabilities.max(axis=1).astype(np.float64)


def _apply_threshold(confidences: np.ndarray, correct: np.ndarray, threshold: float) -> dict[str, Any]:
    answered = confidences >= threshold
    n = int(answered.sum())
    return {
        "threshold": float(threshold),
        "coverage": compute_proportion(n, len(answered)),
        "accuracy": compute_proportion(int((correct & answered).sum()), n),
        "n": n,
    }


def _thin_out(coverage: np.ndarray) -> np.ndarray:
    """Return at most 101 indices: the last point that covers at least each whole percent, and the very last point."""
    if len(coverage) <= MAX_POINTS:
        return np.arange(len(coverage))
    wanted = np.arange(100, 0, -1) / 100
    last_covering = len(coverage) - 1 - np.searchsorted(coverage[::-1], wanted - 1e-12)
    return np.unique(np.r_[last_covering, len(coverage) - 1])


def _sum_from_above(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[::-1])[::-1]
