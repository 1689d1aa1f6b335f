"""Whether probabilities mean what they say, and the one number that mends them: the temperature.

The expected calibration error (ECE) sorts images into bins of similar confidence and averages the distance
between mean confidence and accuracy. It is biased upward: within a bin the accuracy scatters, and a
distance cannot be negative, so that even a perfectly calibrated classifier shows about sqrt(bins / n) / 3
(2 points at n = 3,589, 13 points at n = 100, with 15 bins). `ece_if_calibrated` gives that floor for the
very confidences at hand; an ECE near it says nothing against the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dlfer.metrics.classification import compute_item_losses
from dlfer.metrics.intervals import compute_quantile, compute_skew_interval, compute_wilson_interval
from dlfer.metrics.predictions import Predictions
from dlfer.runs.records import Temperature

NUM_BINS = 15
"""Of reliability and ECE, as in most publications."""

BINNINGS = ("mass", "width")
"""mass: bins of equally many images; width: bins of equal width."""

TEMPERATURES = (0.1, 10.0)
"""Bounds of the fitted temperature; a good network's lies well within (0.5 to 3)."""

FEW_IMAGES = 100
"""Below this many images a fitted temperature is said to be uncertain."""

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Stands for a probability of 0, whose logarithm would be infinite."""


class Binned(NamedTuple):
    """One binary forecast sorted into bins: of each row its bin (int64 [N]), outcome minus forecast, forecast."""

    bins: np.ndarray
    gaps: np.ndarray
    forecasts: np.ndarray


def compute_reliability(confidences: np.ndarray, correct: np.ndarray, *, binning: str = "mass") -> list[dict[str, Any]]:
    """Return the reliability diagram: mean confidence and accuracy of each bin that is not empty.

    Args:
        confidences: float [N] in 0..1.
        correct: bool [N].
        binning: "mass" or "width"; 15 bins, a bin holds its upper edge, equal confidences share a bin.

    Returns:
        [{"n", "confidence", "accuracy", "low", "high"}] by rising confidence, with Wilson's interval of the
        accuracy.
    """
    binned = _bin(confidences, correct, binning)
    rows = []
    for number in np.unique(binned.bins):
        inside = binned.bins == number
        n, hits = int(inside.sum()), int(np.asarray(correct)[inside].sum())
        low, high = compute_wilson_interval(hits, n)
        mean = float(np.asarray(confidences, dtype=np.float64)[inside].mean())
        rows.append({"n": n, "confidence": mean, "accuracy": hits / n, "low": low, "high": high})
    return rows


def compute_ece_if_calibrated(confidences: np.ndarray, *, binning: str = "mass") -> float:
    """Return the ECE to expect of a perfectly calibrated classifier with these confidences (its upward bias)."""
    binned = _bin(confidences, np.zeros(len(confidences)), binning)
    confidences = np.asarray(confidences, dtype=np.float64)
    variances = np.bincount(binned.bins, weights=confidences * (1 - confidences))
    return float(np.sqrt(2 / np.pi * np.maximum(variances, 0)).sum() / len(confidences))


def compute_item_briers(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return each row's squared distance to the truth, summed over all classes (float64 [N], 0..2)."""
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(targets)), targets] -= 1
    return (errors**2).sum(axis=1)


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Return probabilities**(1/temperature), divided by their sum: softer above 1, sharper below.

    It is the softmax of logits / temperature, since log-probabilities are logits up to a constant. The
    order of the classes stays.

    Args:
        probabilities: float [N, C].
        temperature: above 0.

    Returns:
        float64 [N, C], rows sum to one.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (ICML 2017).
    """
    logits = _compute_logits(probabilities) / temperature
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def fit_temperature(predictions: Predictions) -> float:
    """Return the temperature with the smallest log-loss, within 0.1..10.

    Fit it on images that the network was not trained on, and judge it on others again. Where no image is
    wrong the log-loss falls without end towards 0, and the result is the bound 0.1; where no temperature is
    better than none it is 1. `describe_temperature` says so.
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
    # The search stays inside its bounds by its tolerance; the minimum may lie on one.
    candidates = (1.0, float(np.exp(found.x)), *TEMPERATURES)
    return min(candidates, key=lambda temperature: compute_loss(np.log(temperature)))


def describe_temperature(predictions: Predictions, fitted_on: str) -> Temperature:
    """Fit the temperature and record what it was fitted on; its note says why the value may not be reliable."""
    value, n = fit_temperature(predictions), len(predictions)
    notes = []
    if n < FEW_IMAGES:
        notes.append(f"fitted on {n} images only")
    if value in TEMPERATURES:
        why = "no image is wrong" if predictions.correct.all() else "the log-loss has no minimum within"
        notes.append(f"at the bound of {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}: {why}")
    return Temperature(value=value, fitted_on=fitted_on, n=n, note="; ".join(notes) or None)


def compute_calibration(predictions: Predictions, temperature: float | None = None) -> dict[str, Any]:
    """Return how well predictions are calibrated, as they are and after a temperature.

    The interval of an ECE is that of the ECE of all images in the same bins, `compute_ece_interval`. It begins at 0
    where a calibrated classifier might show as much, and always contains the value. Brier and log-loss are means over
    images, with `compute_skew_interval`.

    Args:
        predictions: of the images to judge.
        temperature: fitted on other images; None: "scaled" is None.

    Returns:
        {"raw": CAL, "scaled": CAL or None} with CAL = {"ece_equal_mass", "ece_equal_width", "classwise_ece",
        "brier", "log_loss": {"value", "low", "high"}, "ece_if_calibrated": float, "reliability": bins of equal
        mass}. Errors are fractions, Brier is in 0..2, log-loss in nats. One image has no interval, nor
        have images that are all alike (of a classifier that is always right and certain). The classwise ECE is the mean
        over all classes of that of their probability, in bins of equal width; most images are far from most classes, so
        that it is smaller.

    Source: Naeini, Cooper & Hauskrecht, AAAI 2015 (equal width); Nixon et al., CVPR workshops 2019 (equal mass); Kull et
    al., "Beyond temperature scaling" (NeurIPS 2019), classwise.
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
            "brier": _mean_figure(compute_item_briers(predictions.targets, probabilities)),
            "log_loss": _mean_figure(compute_item_losses(predictions.targets, probabilities)),
            "ece_if_calibrated": compute_ece_if_calibrated(confidences),
            "reliability": compute_reliability(confidences, predictions.correct),
        }
    return judged


def compute_ece_interval(problems: Sequence[Binned], level: float = 0.95) -> tuple[float, float]:
    """Return an interval of the mean over problems of their ECE, for all images in the same bins.

    The observed ECE is the sum of |gap| over bins. It is biased upward, by the more the smaller the true gaps are
    beside their standard errors: by s h(|gap| / s) for a normal gap with standard error s, where h(x) = E|x + Z| - x.
    The true gaps are not known. For the upper limit the bias at the observed gaps is subtracted, which is too small,
    because the observed ones are on average larger than the true ones; for the lower limit the bias at gaps that are
    1.5 standard errors smaller, which is too large. To both comes z times the standard error of the sum of gaps with
    fixed signs, which is at least that of the sum of |gap|. A bin's standard error is the larger one of that of
    the observed deviations and that which the forecasts themselves lead to, since with few images all deviations
    may be small by chance.

    Args:
        problems: the bins and gaps of the same N >= 2 images for each binary forecast.
        level: the probability of covering.

    Returns:
        (low, high) in 0..1 with the observed ECE within; NaN where every forecast is 0 or 1 and right.
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
        return float("nan"), float("nan")
    value = float(np.abs(gaps).sum())
    ratios = np.divide(np.abs(gaps), errors, out=np.zeros_like(gaps), where=errors > 0)
    largest_bias = float(errors @ _compute_folding_bias(np.maximum(ratios - 1.5, 0)))
    smallest_bias = float(errors @ _compute_folding_bias(ratios))
    low, high = value - largest_bias - half, value - smallest_bias + half
    return max(0.0, min(low, value)), min(1.0, max(high, value))


def _compute_folding_bias(x: np.ndarray) -> np.ndarray:
    """Return E|x + Z| - x for a standard normal Z and x >= 0; 0.798 at 0, falling to 0."""
    from scipy.special import ndtr

    return np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2) - 2 * x * ndtr(-x)


def _compute_ece_figures(
    predictions: Predictions, confidences: np.ndarray, probabilities: np.ndarray
) -> dict[str, Any]:
    top = {f"ece_equal_{binning}": [_bin(confidences, predictions.correct, binning)] for binning in BINNINGS}
    problems = {**top, "classwise_ece": _bin_classes(predictions.targets, probabilities)}
    undefined = (float("nan"), float("nan"))
    figures = {}
    for name, several in problems.items():
        value = float(np.mean([_compute_ece(binned) for binned in several]))
        low, high = compute_ece_interval(several) if len(predictions) > 1 else undefined
        # Sums in another order differ in the last digit.
        figures[name] = {"value": value, "low": float(np.minimum(low, value)), "high": float(np.maximum(high, value))}
    return figures


def _bin_classes(targets: np.ndarray, probabilities: np.ndarray) -> list[Binned]:
    return [_bin(probabilities[:, c], targets == c, "width") for c in range(probabilities.shape[1])]


def _bin(forecasts: np.ndarray, outcomes: np.ndarray, binning: str) -> Binned:
    """Sort forecasts into 15 bins; one that is empty gives nothing, equal forecasts share a bin."""
    forecasts = np.asarray(forecasts, dtype=np.float64)
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    if binning == "mass":
        edges = np.quantile(forecasts, edges)
    return Binned(np.searchsorted(edges, forecasts), np.asarray(outcomes, dtype=np.float64) - forecasts, forecasts)


def _compute_ece(binned: Binned) -> float:
    """Return the mean over images of |accuracy - confidence| of their bin."""
    return float(np.abs(np.bincount(binned.bins, weights=binned.gaps)).sum() / len(binned.gaps))


def _mean_figure(values: np.ndarray) -> dict[str, float]:
    low, high = compute_skew_interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}


def _compute_logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), _SMALLEST))
