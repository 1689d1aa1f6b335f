"""Occlusion maps: cover one square of an image after another, and record how the prediction changes.

Source: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dlfer.errors import ModelError

BATCH_SIZE, BATCH_BYTES = 128, 2**26
SQUARES_A_SIDE = 6
"""By default the square is a sixth of an image's shorter side: 8 of 48 pixels, the size of an eye with its brow."""


@dataclass(frozen=True)
class Occlusion:
    """The effects of covering parts of one image.

    Attributes:
        sensitivity: float64 [H, W] in -1..1, the drop of the target's probability when a pixel is covered, averaged
            over all squares that cover it; negative where the probability rises.
        flips: bool [H, W], whether any square that covers the pixel changes the most probable label.
        probability: of the target in the uncovered image.
        predicted: index of the most probable label of the uncovered image.
        size, stride: of the square, in pixels of the image.
        num_predictions: number of images predicted, the uncovered one included.
    """

    sensitivity: np.ndarray
    flips: np.ndarray
    probability: float
    predicted: int
    size: int
    stride: int
    num_predictions: int


def compute_occlusion(
    predict: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    target: int,
    *,
    size: int | None = None,
    stride: int | None = None,
    fill: int | str = "mean",
) -> Occlusion:
    """Slide a square over an image and record how covering a region changes the prediction.

    The last square of a row and of a column is moved inwards, so that every pixel is covered at least once.
    The map shows which regions change the prediction when they are hidden, not why: a partly covered face is unlike
    all training faces, and the prediction may change for that reason alone.

    Args:
        predict: uint8 [N, H, W, C] -> float [N, K], rows sum to one; for example the method of a classifier.
        image: uint8 [H, W] or [H, W, C].
        target: index of the label whose probability is recorded.
        size: side of the square in pixels; by default a sixth of the shorter side.
        stride: distance between squares in pixels, at most `size`; by default half of it.
        fill: grey level 0..255 of the square, or "mean", the image's own mean colour.

    Raises:
        ModelError: the image, the square, the fill or the target is invalid.

    Example:
        >>> occlusion = compute_occlusion(classifier.predict, image, target=3)
        >>> occlusion.sensitivity.shape == image.shape[:2]
        True
    """
    image = _check_image(image)
    size, stride = _choose_square(image.shape[:2], size, stride)
    colour = _choose_colour(image, fill)
    places = [
        (y, x) for y in _find_starts(image.shape[0], size, stride) for x in _find_starts(image.shape[1], size, stride)
    ]
    probabilities = _predict_covered(predict, image, places, size=size, colour=colour)
    plain, covered = probabilities[0], probabilities[1:]
    if not 0 <= target < len(plain):
        raise ModelError(f"occlusion: found the target {target}, expected 0..{len(plain) - 1}.")
    predicted = int(plain.argmax())
    fallen, times = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
    flips = np.zeros(image.shape[:2], bool)
    for row, (y, x) in zip(covered, places, strict=True):
        here = (slice(y, y + size), slice(x, x + size))
        fallen[here] += plain[target] - row[target]
        times[here] += 1
        flips[here] |= row.argmax() != predicted
    return Occlusion(fallen / times, flips, float(plain[target]), predicted, size, stride, 1 + len(places))


def _predict_covered(
    predict: Callable[[np.ndarray], np.ndarray],
    image: np.ndarray,
    places: list[tuple[int, int]],
    *,
    size: int,
    colour: np.ndarray,
) -> np.ndarray:
    """Return probabilities, float64 [1 + len(places), K]: of the uncovered image, then of one for each square."""
    at_once = max(1, min(BATCH_SIZE, BATCH_BYTES // image.size))
    found, left = [], [None, *places]
    for start in range(0, len(left), at_once):
        some = left[start : start + at_once]
        images = np.repeat(image[None], len(some), axis=0)
        for covered_image, place in zip(images, some, strict=True):
            if place is not None:
                y, x = place
                covered_image[y : y + size, x : x + size] = colour
        found.append(np.asarray(predict(images), np.float64))
    return np.concatenate(found)


def _find_starts(length: int, size: int, stride: int) -> list[int]:
    """Return the start positions of the squares along a side; the last square ends at the edge of the image."""
    last = length - size
    return [*range(0, last, stride), last]


def _choose_square(shape: tuple[int, int], size: int | None, stride: int | None) -> tuple[int, int]:
    size = max(1, round(min(shape) / SQUARES_A_SIDE)) if size is None else size
    stride = max(1, size // 2) if stride is None else stride
    if not 1 <= size <= min(shape) or not 1 <= stride <= size:
        raise ModelError(
            f"occlusion: found size {size} and stride {stride} for an image of {shape[1]}x{shape[0]} pixels, expected "
            f"1 <= stride <= size <= {min(shape)}, so that every pixel is covered."
        )
    return size, stride


def _choose_colour(image: np.ndarray, fill: int | str) -> np.ndarray:
    """Return the colour of the square, uint8 [C]."""
    if fill == "mean":
        return image.mean(axis=(0, 1)).round().astype(np.uint8)
    if isinstance(fill, str) or not 0 <= fill <= 255:
        raise ModelError(f'occlusion: found the fill {fill!r}, expected a grey level 0..255 or "mean".')
    return np.full(image.shape[-1], fill, np.uint8)


def _check_image(image: np.ndarray) -> np.ndarray:
    """Return the image as uint8 [H, W, C]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
        raise ModelError(
            f"occlusion: found an image of dtype {image.dtype} and shape {image.shape}, "
            "expected uint8 [H, W] or [H, W, 1 or 3]."
        )
    return image[..., None] if image.ndim == 2 else image
