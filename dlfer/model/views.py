"""Test-time augmentation: one answer from several views of an image.

Its figure is a row of its own beside that of the single view: it costs as many predictions as there are
views, and most published numbers do not say whether they have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from dlfer.data.augment import compute_crop_size
from dlfer.data.images import make_square
from dlfer.errors import ModelError

CROP = 0.9
"""The side of a crop as a fraction of the image's, 43 of 48 pixels, for a classifier that looks at whole images."""


class Predictor(Protocol):
    """What is needed of a classifier here."""

    def predict(self, images: np.ndarray, *, batch_size: int = 64) -> np.ndarray: ...


def iterate_mirror(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield the images (uint8 [N, H, W] or [N, H, W, C]) and their left-right flips, whatever part is looked at."""
    yield images
    yield images[:, :, ::-1]


def iterate_ten_crop(images: np.ndarray, crop: float | None = None) -> Iterator[np.ndarray]:
    """Yield the four corners and the centre of the images and their flips.

    Each is nine tenths of either side; or `crop` of it, for a classifier that itself looks at a central part
    of that size. Such a crop is yielded in the middle of an image as large as the whole, whose edges repeat
    its outermost pixels, so that exactly the crop is what the classifier looks at.

    Source: Krizhevsky, Sutskever & Hinton, NeurIPS 25 (2012), section 4.1 (there 224 of 256 pixels).
    """
    height, width = images.shape[1:3]
    rows, columns = compute_crop_size(crop or CROP, height, width)
    bottom, right = height - rows, width - columns
    # The central part begins at half of the difference, rounded down; so does `crop_centre`.
    down, across = (bottom // 2, bottom - bottom // 2), (right // 2, right - right // 2)
    margins = ((0, 0), down, across, *(((0, 0),) if images.ndim == 4 else ()))
    for top, left in ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)):
        part = images[:, top : top + rows, left : left + columns]
        for view in iterate_mirror(part):
            yield view if crop is None else np.pad(view, margins, mode="edge")


VIEWS: dict[str, Callable[[np.ndarray, float | None], Iterator[np.ndarray]]] = {
    "mirror": iterate_mirror,
    "ten_crop": iterate_ten_crop,
}
"""Name -> the views it takes of images, for a classifier that looks at a central part of them, or at all. The classifier resizes a crop as it does any image."""


def predict_views(classifier: Predictor, images: np.ndarray, view: str, *, batch_size: int = 64) -> np.ndarray:
    """Return the mean of the probabilities over the views of each image.

    Args:
        classifier: takes uint8 images of any size; its attributes `aspect` and `crop`, if it has them, say what part it looks at.
        images: uint8 [N, H, W] or [N, H, W, C].
        view: a name of VIEWS.
        batch_size: images at a time.

    Returns:
        float32 [N, number of labels], rows sum to one.

    Raises:
        ModelError: no such view.

    Example:
        >>> predict_views(load_artifact("quickstart"), images, "mirror").shape
        (3589, 7)
    """
    if view not in VIEWS:
        raise ModelError(f"views: found {view!r}, expected one of {', '.join(VIEWS)}.")
    if hasattr(classifier, "predict_view"):
        # An ensemble's members may each look at parts of their own size.
        return classifier.predict_view(images, view, batch_size=batch_size)
    # Views are those of what the classifier looks at, not of pixels that it never sees.
    images = make_square(images, getattr(classifier, "aspect", "crop"))
    total, num_views = 0.0, 0
    for seen in VIEWS[view](images, getattr(classifier, "crop", None)):
        total = total + classifier.predict(np.ascontiguousarray(seen), batch_size=batch_size).astype(np.float64)
        num_views += 1
    return (total / num_views).astype(np.float32)
