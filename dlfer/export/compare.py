"""Whether an exported model answers as its artifact does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlfer.data.images import resize_all
from dlfer.errors import ExportError
from dlfer.metrics.intervals import compute_wilson_interval
from dlfer.metrics.paired import compare_paired, describe_difference
from dlfer.metrics.predictions import Predictions
from dlfer.runs.export_record import Agreement, ExportAccuracy

BATCH_SIZE = 32
NUM_OTHER_SIZES = 8
"""Images that are compared at sizes other than their own, where the size is free."""


@dataclass(frozen=True)
class Limits:
    """What an export must reach, or it is refused.

    Attributes:
        difference: the largest of any probability, or None.
        agreement: the smallest share of images with the same most probable label.
    """

    difference: float | None
    agreement: float


@dataclass(frozen=True)
class Sample:
    """The images by which exports are judged and calibrated.

    Attributes:
        images: uint8 [N, H, W, channels], N at least 1.
        source: in words, where they come from.
        calibration: uint8 [M, H, W, channels], by which eight-bit activations get their ranges.
        calibration_source: in words.
        targets: int [N], indices of the classifier's labels; None where the labels are not known.
    """

    images: np.ndarray
    source: str
    calibration: np.ndarray
    calibration_source: str
    targets: np.ndarray | None = None


def compare_export(
    expected: Callable[[np.ndarray], np.ndarray],
    answer: Callable[[np.ndarray], np.ndarray],
    sample: Sample,
    *,
    labels: tuple[str, ...],
    any_size: bool,
) -> Agreement:
    """Compare the probabilities of an export with those of its artifact.

    Args:
        expected: of the artifact, uint8 [N, H, W, C] to float32 [N, number of labels].
        answer: of the export, loaded from its file.
        sample: the images.
        labels: of the columns.
        any_size: whether it takes images of any size, so that others than the sample's are tried, too.

    Returns:
        The agreement; fractions, but for the difference of accuracies in percentage points.
    """
    wanted, found = expected(sample.images), answer_in_batches(answer, sample.images)
    difference = np.abs(wanted.astype(np.float64) - found)
    same = int((wanted.argmax(axis=1) == found.argmax(axis=1)).sum())
    low, high = compute_wilson_interval(same, len(wanted))
    return Agreement.build(
        {
            "images": sample.source,
            "n": len(wanted),
            "size": list(sample.images.shape[1:3]),
            "largest_difference": float(difference.max()),
            "mean_difference": float(difference.mean()),
            "labels_agree": {"value": same / len(wanted), "low": low, "high": high},
            "other_sizes": _compare_other_sizes(expected, answer, sample.images) if any_size else None,
            "accuracy": None if sample.targets is None else _compare_accuracy(wanted, found, sample.targets, labels),
        }
    )


def check_agreement(name: str, agreement: Agreement, limits: Limits) -> None:
    """Raise ExportError where an export differs from its artifact by more than the limits."""
    others = agreement.other_sizes or agreement
    differences = [agreement.largest_difference, others.largest_difference]
    largest = float("nan") if None in differences else max(differences)
    same = agreement.labels_agree.value
    # No probability differs by more than 1; NaN is not below it either.
    if largest <= (1.0 if limits.difference is None else limits.difference) and same >= limits.agreement:
        return
    wanted = [f"{100 * limits.agreement:g} % of the labels"]
    if limits.difference is not None:
        wanted.insert(0, f"a difference of at most {limits.difference:g}")
    raise ExportError(
        f"export to {name}: refused, nothing was written. On {agreement.n:,} images ({agreement.images}) the "
        f"probabilities differ by up to {largest:.3g} and "
        f"{100 * same:.1f} % of the labels agree; expected {' and '.join(wanted)}. Use another format."
    )


def answer_in_batches(answer: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """Return float32 [N, C] of uint8 [N, H, W, channels], N at least 1."""
    return np.concatenate([answer(images[start : start + BATCH_SIZE]) for start in range(0, len(images), BATCH_SIZE)])


def _compare_other_sizes(expected: Callable, answer: Callable, images: np.ndarray) -> dict[str, Any]:
    """Compare a few images larger and smaller than they are, and not square."""
    height, width = images.shape[1:3]
    sizes = [(2 * height + 1, 3 * width // 2), (max(8, height // 2), max(8, width // 3))]
    few = [resize_all(images[:NUM_OTHER_SIZES], size) for size in sizes]
    return {
        "sizes": [list(size) for size in sizes],
        "n": len(few[0]),
        "largest_difference": float(np.max([np.abs(expected(resized) - answer(resized)).max() for resized in few])),
    }


def _compare_accuracy(
    wanted: np.ndarray, found: np.ndarray, targets: np.ndarray, labels: tuple[str, ...]
) -> ExportAccuracy:
    """Return the paired comparison of accuracies, its difference being what the export loses, in points."""
    ids = np.arange(len(targets)).astype(str)
    # Rows of eight-bit answers sum to one within their step only.
    rows = found / np.maximum(found.sum(axis=1, keepdims=True), 1e-12)
    pair = [Predictions(ids, labels, targets, probabilities) for probabilities in (wanted, rows)]
    result = compare_paired(*pair, names=("the artifact", "the export"))
    return ExportAccuracy(**dict(result), sentence=describe_difference(result))
