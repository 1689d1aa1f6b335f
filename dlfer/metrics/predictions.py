"""`Predictions`, the class probabilities of a classifier, their file format, and combinations of several classifiers.

The probabilities of M classifiers for N images and C classes are float [M, N, C].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dlfer.errors import DataError, shorten
from dlfer.runs.files import read_npz, write_npz

SUM_TOLERANCE = 1e-4
"""How far the sum of one row's probabilities may be from 1; a float32 softmax stays well within this."""

_KEYS = ("ids", "labels", "targets", "probabilities")


@dataclass(frozen=True, eq=False)
class Predictions:
    """The probabilities that a classifier predicted for each image, and the image's target.

    The constructor converts to the dtypes below and validates, so every instance is valid.

    Attributes:
        ids: str [N], unique names of the images.
        labels: names of the C classes, in the order of the columns.
        targets: int64 [N], indices into `labels`.
        probabilities: float32 [N, C] in 0..1; each row sums to 1 within 1e-4.
    """

    ids: np.ndarray
    labels: tuple[str, ...]
    targets: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self) -> None:
        targets = np.asarray(self.targets)
        if targets.size and not np.issubdtype(targets.dtype, np.integer):
            raise DataError(f"predictions: found targets of dtype {targets.dtype}, expected integers.")
        object.__setattr__(self, "ids", np.asarray(self.ids, dtype=np.str_))
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        object.__setattr__(self, "targets", targets.astype(np.int64))
        object.__setattr__(self, "probabilities", np.asarray(self.probabilities, dtype=np.float32))
        check_predictions(self)

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def predicted(self) -> np.ndarray:
        """int64 [N]: the class with the largest probability; the first one in a tie."""
        return np.argmax(self.probabilities, axis=1)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: whether the predicted class is the target."""
        return self.predicted == self.targets

    def take(self, indices: np.ndarray) -> Predictions:
        """Return the rows at `indices` (int [M], or bool [N])."""
        return Predictions(self.ids[indices], self.labels, self.targets[indices], self.probabilities[indices])


Known = Mapping[tuple[str, str], Predictions]
"""(split, view) -> predictions already computed from those of an ensemble's members."""


def check_predictions(predictions: Predictions, where: str = "predictions") -> None:
    """Raise DataError unless shapes and values are as documented in `Predictions`.

    Args:
        where: the start of the message, e.g. the path of the file.
    """
    ids, targets, probabilities = predictions.ids, predictions.targets, predictions.probabilities
    num_classes = len(predictions.labels)
    if num_classes == 0 or len(set(predictions.labels)) != num_classes:
        raise DataError(f"{where}: found the labels {predictions.labels}, expected at least one and no two alike.")
    if ids.ndim != 1 or targets.shape != ids.shape or probabilities.shape != (len(ids), num_classes):
        raise DataError(
            f"{where}: found ids {ids.shape}, targets {targets.shape} and probabilities {probabilities.shape}; "
            f"expected [N], [N] and [N, {num_classes}] for {num_classes} labels."
        )
    if len(ids) == 0:
        raise DataError(f"{where}: found no row, expected at least one.")
    _check_rows(predictions, where)


def _check_rows(predictions: Predictions, where: str) -> None:
    ids, targets, probabilities = predictions.ids, predictions.targets, predictions.probabilities
    names, counts = np.unique(ids, return_counts=True)
    if len(names) != len(ids):
        raise DataError(f"{where}: the id {str(names[counts > 1][0])!r} occurs more than once; ids must be unique.")
    wrong = np.flatnonzero((targets < 0) | (targets >= len(predictions.labels)))
    if len(wrong):
        raise DataError(
            f"{where}: row {wrong[0]} ({ids[wrong[0]]}) has the target {targets[wrong[0]]}; "
            f"expected 0..{len(predictions.labels) - 1}."
        )
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(wrong):
        raise DataError(
            f"{where}: row {wrong[0]} ({ids[wrong[0]]}) has a probability that is NaN or infinite "
            f"({len(wrong)} rows in all); the network's weights have probably diverged."
        )
    sums = probabilities.sum(axis=1, dtype=np.float64)
    bad_range = (probabilities < 0).any(axis=1) | (probabilities > 1 + SUM_TOLERANCE).any(axis=1)
    wrong = np.flatnonzero(bad_range | (np.abs(sums - 1) > SUM_TOLERANCE))
    if len(wrong):
        raise DataError(
            f"{where}: row {wrong[0]} ({ids[wrong[0]]}) has probabilities {probabilities[wrong[0]].tolist()} with sum "
            f"{sums[wrong[0]]:.6f}; expected values in 0..1 with sum 1 (a softmax, or sigmoids divided by their sum)."
        )


def write_predictions(predictions: Predictions, path: Path) -> Path:
    """Write `predictions` atomically to `path` (.npz without pickle) and return the path."""
    arrays = {key: np.asarray(getattr(predictions, key)) for key in _KEYS}
    write_npz(Path(path), arrays)
    return Path(path)


def read_predictions(path: Path) -> Predictions:
    """Read and validate a file written by `write_predictions`.

    Raises:
        DataError: the file is absent, damaged, contains pickled objects, or its arrays are not valid predictions.
    """
    path = Path(path)
    try:
        arrays = read_npz(path, names=_KEYS)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected predictions (.npz) of an earlier run.") from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: not a predictions file ({shorten(error, path)}); evaluate the run again to rewrite it."
        ) from error
    try:
        return Predictions(arrays["ids"], tuple(arrays["labels"]), arrays["targets"], arrays["probabilities"])
    except (DataError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}") from None


STRENGTH = 1.0
"""Weight of the penalty, half the sum of squared coefficients, added to the summed log loss; C = 1 in scikit-learn."""

SMALLEST = 1e-6
"""Lower clip of probabilities before the logarithm, since the logarithm of zero would dominate every other input."""

FOLDS = 5


@dataclass(frozen=True, eq=False)
class TrainedCombination:
    """A multinomial logistic regression on the log-probabilities of M classifiers.

    Attributes:
        coefficients: float64 [M * C, C]; row m * C + c has the weights of log p_c of classifier m for each class.
        intercept: float64 [C].
    """

    coefficients: np.ndarray
    intercept: np.ndarray

    def predict(self, probabilities: np.ndarray) -> np.ndarray:
        """Return combined probabilities (float64 [N, C], rows sum to one) of the classifiers' (float [M, N, C])."""
        from scipy.special import softmax

        return softmax(_make_inputs(probabilities) @ self.coefficients + self.intercept, axis=1)

    def as_dict(self) -> dict[str, Any]:
        """Return the regression as a JSON-serialisable dictionary, without rounding."""
        return {
            "coefficients": self.coefficients.tolist(),
            "intercept": self.intercept.tolist(),
            "penalty": f"{STRENGTH:g}/2 times the sum of the squared coefficients, beside the summed log-loss",
            "smallest_probability": SMALLEST,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainedCombination:
        """Return the combination from the result of `as_dict`."""
        return cls(np.asarray(values["coefficients"], np.float64), np.asarray(values["intercept"], np.float64))


def combine_average(probabilities: np.ndarray) -> np.ndarray:
    """Return the mean probabilities over the classifiers (float64 [N, C])."""
    return np.asarray(probabilities, np.float64).mean(axis=0)


def combine_vote(probabilities: np.ndarray) -> np.ndarray:
    """Return the vote fractions (float64 [N, C]), where each classifier votes for its most probable class.

    The mean probabilities count as one additional vote, divided over the classes: it breaks ties and cannot overturn a
    majority.
    """
    probabilities = np.asarray(probabilities, np.float64)
    votes = np.eye(probabilities.shape[-1])[probabilities.argmax(axis=-1)].sum(axis=0)
    return (votes + probabilities.mean(axis=0)) / (len(probabilities) + 1)


def fit_combination(probabilities: np.ndarray, targets: np.ndarray) -> TrainedCombination:
    """Fit a trained combination by minimising log loss plus STRENGTH / 2 times the sum of squared coefficients.

    Args:
        probabilities: float [M, N, C], for images that none of the classifiers was trained on.
        targets: int [N].

    Raises:
        DataError: there are no images.
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


def predict_out_of_fold(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return out-of-fold predictions of trained combinations (float64 [N, C]).

    The folds are stratified by class; a combination fitted on the other folds predicts each fold.
    """
    targets = np.asarray(targets)
    rng, fold = np.random.default_rng(0), np.zeros(len(targets), int)
    for target in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == target))
        fold[rows] = (np.arange(len(rows)) + rng.integers(FOLDS)) % FOLDS
    answers = np.zeros(np.shape(probabilities)[1:])
    for number in np.unique(fold):
        inside = fold == number
        # A handful of images may all be in one fold; the combination is then fitted on the images that it predicts.
        rest = ~inside if not inside.all() else inside
        answers[inside] = fit_combination(probabilities[:, rest], targets[rest]).predict(probabilities[:, inside])
    return answers


def _make_inputs(probabilities: np.ndarray) -> np.ndarray:
    """Return the logarithms of the probabilities (float64 [N, M * C])."""
    logs = np.log(np.maximum(np.asarray(probabilities, np.float64), SMALLEST))
    return np.concatenate(list(logs), axis=1)
