"""`Predictions`: what a classifier said about each image, and the file that keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlfer.errors import DataError, shorten
from dlfer.runs.files import read_npz, write_npz

SUM_TOLERANCE = 1e-4
"""How far the probabilities of one row may sum from 1: a float32 softmax stays well within."""

_KEYS = ("ids", "labels", "targets", "probabilities")


@dataclass(frozen=True, eq=False)
class Predictions:
    """The probabilities that a classifier gave to each image, beside the image's target.

    Construction converts to the dtypes below and checks; a `Predictions` that exists is valid.

    Attributes:
        ids: str [N], unique names of the images.
        labels: names of the C classes, in the order of the columns.
        targets: int64 [N], indices into `labels`.
        probabilities: float32 [N, C], in 0..1, each row sums to 1 within 1e-4.
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
        """int64 [N]: the class of the largest probability; the first one of a tie."""
        return np.argmax(self.probabilities, axis=1)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: whether the predicted class is the target."""
        return self.predicted == self.targets

    def take(self, indices: np.ndarray) -> Predictions:
        """Return the rows at `indices` (int [M], or bool [N])."""
        return Predictions(self.ids[indices], self.labels, self.targets[indices], self.probabilities[indices])


Known = Mapping[tuple[str, str], Predictions]
"""(split, view) -> predictions that are there already, from the members of an ensemble, and need not be made again."""


def check_predictions(predictions: Predictions, where: str = "predictions") -> None:
    """Raise DataError unless the arrays fit together as the docstring of `Predictions` says.

    Args:
        predictions: what to check.
        where: what the message begins with, e.g. the path of the file.
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
    """Write `predictions` to `path` (.npz, no pickle), under a temporary name first, and return the path."""
    arrays = {key: np.asarray(getattr(predictions, key)) for key in _KEYS}
    write_npz(Path(path), arrays)
    return Path(path)


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote, and check it.

    Raises:
        DataError: the file is absent, damaged, holds pickled objects, or its arrays do not fit together.
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
