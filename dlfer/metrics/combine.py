"""One answer from several classifiers: their average, their vote, or a trained combination.

Shapes throughout: the probabilities of M classifiers for N images and C classes are float [M, N, C].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dlfer.errors import DataError

STRENGTH = 1.0
"""Weight of half the sum of the squared coefficients, beside the summed log-loss: scikit-learn's C = 1."""

SMALLEST = 1e-6
"""Probabilities below it count as it, since a logarithm of zero would outweigh everything."""

FOLDS = 5


@dataclass(frozen=True, eq=False)
class TrainedCombination:
    """A multinomial logistic regression on the log-probabilities of M classifiers.

    Attributes:
        coefficients: float64 [M * C, C]; row m * C + c is what log p_c of classifier m adds to each class.
        intercept: float64 [C].
    """

    coefficients: np.ndarray
    intercept: np.ndarray

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """Return float64 [N, C], rows sum to one."""
        from scipy.special import softmax

        return softmax(_make_inputs(probabilities) @ self.coefficients + self.intercept, axis=1)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready numbers, exact."""
        return {
            "coefficients": self.coefficients.tolist(),
            "intercept": self.intercept.tolist(),
            "penalty": f"{STRENGTH:g}/2 times the sum of the squared coefficients, beside the summed log-loss",
            "smallest_probability": SMALLEST,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainedCombination:
        """Return what `as_dict` gave."""
        return cls(np.asarray(values["coefficients"], np.float64), np.asarray(values["intercept"], np.float64))


def combine_average(probabilities: np.ndarray) -> np.ndarray:
    """Return the mean of the probabilities, float64 [N, C]."""
    return np.asarray(probabilities, np.float64).mean(axis=0)


def combine_vote(probabilities: np.ndarray) -> np.ndarray:
    """Return the shares of the votes, float64 [N, C], where each classifier votes for its most probable class.

    The average of the probabilities has one vote beside them, which it divides over the classes: so it decides
    between equal counts, and can never turn a majority.
    """
    probabilities = np.asarray(probabilities, np.float64)
    votes = np.eye(probabilities.shape[-1])[probabilities.argmax(axis=-1)].sum(axis=0)
    return (votes + probabilities.mean(axis=0)) / (len(probabilities) + 1)


def fit_combination(probabilities: np.ndarray, targets: np.ndarray) -> TrainedCombination:
    """Fit a trained combination: least log-loss plus STRENGTH / 2 times the sum of the squared coefficients.

    Args:
        probabilities: of images that none of the classifiers was trained on.
        targets: int [N].

    Raises:
        DataError: there is no image.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    inputs, num_classes = _make_inputs(probabilities), np.shape(probabilities)[-1]
    if not len(inputs):
        raise DataError("combination: found no image to fit it on, expected the predictions of validation.")
    one_hot = np.eye(num_classes)[targets]
    width = inputs.shape[1]

    def compute_loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(width + 1, num_classes)
        logs = log_softmax(inputs @ weights[:-1] + weights[-1], axis=1)
        error = np.exp(logs) - one_hot
        gradient = np.vstack([inputs.T @ error + STRENGTH * weights[:-1], error.sum(axis=0)])
        loss = -(one_hot * logs).sum() + STRENGTH / 2 * (weights[:-1] ** 2).sum()
        return loss / len(inputs), gradient.ravel() / len(inputs)

    start = np.zeros((width + 1) * num_classes)
    found = minimize(compute_loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "gtol": 1e-7})
    weights = found.x.reshape(width + 1, num_classes)
    return TrainedCombination(weights[:-1], weights[-1] - weights[-1].mean())


def predict_out_of_fold(probabilities: np.ndarray, targets: np.ndarray, *, folds: int = FOLDS, seed: int = 0):
    """Return what trained combinations answer to images that each was not fitted on, float64 [N, C].

    Every class is divided over the folds; each fold is answered by a combination fitted on the others.
    """
    targets = np.asarray(targets)
    rng, fold = np.random.default_rng(seed), np.zeros(len(targets), int)
    for target in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == target))
        fold[rows] = (np.arange(len(rows)) + rng.integers(folds)) % folds
    answers = np.zeros(np.shape(probabilities)[1:])
    for number in np.unique(fold):
        inside = fold == number
        # With a fold alone, as of a handful of images, nothing is left to fit on.
        rest = ~inside if not inside.all() else inside
        answers[inside] = fit_combination(probabilities[:, rest], targets[rest]).predict(probabilities[:, inside])
    return answers


def _make_inputs(probabilities: np.ndarray) -> np.ndarray:
    """Return float64 [N, M * C], the logarithms of the probabilities."""
    logs = np.log(np.maximum(np.asarray(probabilities, np.float64), SMALLEST))
    return np.concatenate(list(logs), axis=1)
