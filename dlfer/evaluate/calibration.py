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

from dlfer.evaluate.intervals import compute_mean_interval, compute_wilson_interval, iterate_row_weights
from dlfer.evaluate.metrics import compute_item_losses
from dlfer.evaluate.predictions import Predictions

NUM_BINS = 15
"""Of reliability and ECE, as in most publications."""

BINNINGS = ("mass", "width")
"""mass: bins of equally many images; width: bins of equal width."""

TEMPERATURES = (0.1, 10.0)
"""Bounds of the fitted temperature; a good network's lies well within (0.5 to 3)."""

FEW_IMAGES = 100
"""Below this many images a fitted temperature is said to be uncertain."""

_MAX_BLOCKS = 2048

_SMALLEST = float(np.finfo(np.float32).tiny)
"""Stands for a probability of 0, whose logarithm would be infinite."""


class Binned(NamedTuple):
    """One binary forecast sorted into bins: of each row its bin (int64 [N]), and outcome minus forecast."""

    bins: np.ndarray
    gaps: np.ndarray


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


def compute_ece(confidences: np.ndarray, correct: np.ndarray, *, binning: str = "mass") -> float:
    """Return the expected calibration error: the mean over images of |accuracy - confidence| of their bin.

    Args:
        confidences: float [N] in 0..1.
        correct: bool [N].
        binning: "mass" or "width"; 15 bins.

    Source: Naeini, Cooper & Hauskrecht, AAAI 2015 (equal width); Nixon et al., CVPR workshops 2019 (equal mass).
    """
    return _compute_ece(_bin(confidences, correct, binning))


def compute_classwise_ece(targets: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the mean over all classes of the ECE of that class's probability, in 15 bins of equal width.

    Most images are far from most classes, so that it is smaller than the ECE of the largest probability.

    Args:
        targets: int [N].
        probabilities: float [N, C].

    Source: Kull et al., "Beyond temperature scaling" (NeurIPS 2019).
    """
    return float(np.mean([_compute_ece(binned) for binned in _bin_classes(targets, probabilities)]))


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


def describe_temperature(predictions: Predictions, fitted_on: str) -> dict[str, Any]:
    """Fit the temperature and say what it stands on.

    Returns:
        {"value", "fitted_on", "n", "note"}; note is None, or says why the value is not to be relied on.
    """
    value, n = fit_temperature(predictions), len(predictions)
    notes = []
    if n < FEW_IMAGES:
        notes.append(f"fitted on {n} images only")
    if value in TEMPERATURES:
        why = "no image is wrong" if predictions.correct.all() else "the log-loss has no minimum within"
        notes.append(f"at the bound of {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}: {why}")
    return {"value": value, "fitted_on": fitted_on, "n": n, "note": "; ".join(notes) or None}


def compute_calibration(
    predictions: Predictions, temperature: float | None = None, *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return how well predictions are calibrated, as they are and after a temperature.

    Intervals of the three ECEs come from a bootstrap over images, with the bins held fast. The resampled
    ECE itself would not do, because it is biased upward twice, by the sample and by the resample. Its
    scatter about the sample's gaps is used instead: the interval holds those multiples of the observed gaps
    which, with the scatter added, give an ECE as small and as large as the observed one in more than 2.5 % of
    resamples. It begins at 0 where a calibrated classifier might show as much, and always holds the value.
    Brier and log-loss are means over images, with the normal interval.

    Args:
        predictions: of the images to judge.
        temperature: fitted on other images; None: "scaled" is None.
        bootstrap: number of resamples.
        seed: of the resamples.

    Returns:
        {"raw": CAL, "scaled": CAL or None} with CAL = {"ece_equal_mass", "ece_equal_width", "classwise_ece",
        "brier", "log_loss": {"value", "low", "high"}, "ece_if_calibrated": float, "reliability": bins of equal
        mass}. Errors are fractions, Brier is in 0..2, log-loss in nats.
    """
    versions = {"raw": predictions.probabilities.astype(np.float64)}
    if temperature is not None:
        versions["scaled"] = apply_temperature(predictions.probabilities, temperature)
    rows, predicted = np.arange(len(predictions)), predictions.predicted
    judged: dict[str, Any] = {"raw": None, "scaled": None}
    for name, probabilities in versions.items():
        confidences = probabilities[rows, predicted]
        judged[name] = {
            **_compute_ece_figures(predictions, confidences, probabilities, bootstrap=bootstrap, seed=seed),
            "brier": _mean_figure(compute_item_briers(predictions.targets, probabilities)),
            "log_loss": _mean_figure(compute_item_losses(predictions.targets, probabilities)),
            "ece_if_calibrated": compute_ece_if_calibrated(confidences),
            "reliability": compute_reliability(confidences, predictions.correct),
        }
    return judged


def _compute_ece_figures(
    predictions: Predictions, confidences: np.ndarray, probabilities: np.ndarray, *, bootstrap: int, seed: int
) -> dict[str, Any]:
    top = {f"ece_equal_{binning}": [_bin(confidences, predictions.correct, binning)] for binning in BINNINGS}
    problems = {**top, "classwise_ece": _bin_classes(predictions.targets, probabilities)}
    flat = [binned for several in problems.values() for binned in several]
    sums = np.stack([np.bincount(binned.bins, weights=binned.gaps, minlength=NUM_BINS) for binned in flat])
    scatter = _resample_sums(flat, bootstrap, seed) - sums
    figures, start, n = {}, 0, len(confidences)
    for name, several in problems.items():
        own = slice(start, start + len(several))
        # The classwise ECE is the mean over classes, that is the sum over all bins of all classes.
        scale = n * len(several)
        figures[name] = _ece_figure(sums[own].ravel() / scale, scatter[:, own].reshape(bootstrap, -1) / scale, n)
        start += len(several)
    return figures


def _bin_classes(targets: np.ndarray, probabilities: np.ndarray) -> list[Binned]:
    return [_bin(probabilities[:, c], targets == c, "width") for c in range(probabilities.shape[1])]


def _bin(forecasts: np.ndarray, outcomes: np.ndarray, binning: str) -> Binned:
    """Sort forecasts into 15 bins; one that is empty gives nothing, equal forecasts share a bin."""
    forecasts = np.asarray(forecasts, dtype=np.float64)
    edges = np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    if binning == "mass":
        edges = np.quantile(forecasts, edges)
    return Binned(np.searchsorted(edges, forecasts), np.asarray(outcomes, dtype=np.float64) - forecasts)


def _compute_ece(binned: Binned) -> float:
    return float(np.abs(np.bincount(binned.bins, weights=binned.gaps)).sum() / len(binned.gaps))


def _resample_sums(problems: Sequence[Binned], resamples: int, seed: int) -> np.ndarray:
    """Return the sum of the gaps in each bin of each problem, for resampled rows (float64 [R, problems, bins]).

    More than 2,048 rows are drawn in as many random blocks: rows are independent, so that blocks scatter as
    their rows do, and the cost no longer grows with n.
    """
    n, shape = len(problems[0].bins), (len(problems), NUM_BINS)
    generator = np.random.default_rng(seed)
    num_blocks = min(n, _MAX_BLOCKS)
    blocks = np.arange(n) if n == num_blocks else generator.permutation(n) % num_blocks
    sums = np.stack(
        [
            np.bincount(blocks * NUM_BINS + bins, weights=gaps, minlength=num_blocks * NUM_BINS)
            for bins, gaps in problems
        ]
    )
    sums = sums.reshape(len(problems), num_blocks, NUM_BINS).swapaxes(0, 1).reshape(num_blocks, -1)
    drawn = [weights @ sums for _, weights in iterate_row_weights(num_blocks, resamples, generator)]
    return np.concatenate(drawn).reshape(-1, *shape)


def _ece_figure(gaps: np.ndarray, scatter: np.ndarray, n: int) -> dict[str, float]:
    """Return the sum of |gaps| with its interval.

    Args:
        gaps: float [B], the observed gap of each bin, as a share of all images.
        scatter: float [R, B], how far resampled gaps are from it.
        n: number of images; below two there is no interval.
    """
    value = float(np.abs(gaps).sum())
    if n < 2:
        return {"value": value, "low": float("nan"), "high": float("nan")}
    # From this multiple on no resample can be as small as the value.
    largest = 1 + float(np.abs(scatter).sum(axis=1).max()) / value if value else 1.0

    def find_multiple(level: float) -> float:
        low, high = 0.0, largest
        for _ in range(25):
            middle = (low + high) / 2
            is_large = np.quantile(np.abs(middle * gaps + scatter).sum(axis=1), level) >= value
            low, high = (low, middle) if is_large else (middle, high)
        return low

    return {
        "value": value,
        "low": min(value * find_multiple(0.975), value),
        "high": max(value * find_multiple(0.025), value),
    }


def _mean_figure(values: np.ndarray) -> dict[str, float]:
    low, high = compute_mean_interval(values, smallest=0.0)
    return {"value": float(values.mean()), "low": low, "high": high}


def _compute_logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), _SMALLEST))
