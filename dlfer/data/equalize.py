"""Equalisation of an image's histogram by OpenCV, over the whole image or tile by tile."""

from __future__ import annotations

import numpy as np

from dlfer.config.names import EQUALIZERS
from dlfer.data.images import to_channels
from dlfer.errors import DataError, EnvironmentProblem

CLIP_LIMIT = 2.0
TILES = 4
"""CLAHE: a tile's grey level may hold this many times its even share; tiles a side, 12 pixels each of 48."""


def equalize(image: np.ndarray, method: str) -> np.ndarray:
    """Return an image whose grey levels are spread over the whole range; in colour the luma is, and the chroma stays.

    Args:
        image: uint8 [H, W, 1 or 3].
        method: "histogram" (over the whole image), "clahe" (in 4x4 tiles, contrast limited) or "none".

    Raises:
        DataError: the method is none of these.
        EnvironmentProblem: OpenCV is not installed.

    Source: Zuiderveld, Contrast Limited Adaptive Histogram Equalization, Graphics Gems IV (1994) 474.
    """
    if method not in EQUALIZERS:
        raise DataError(f"faces.equalize: found {method!r}, expected one of {', '.join(EQUALIZERS)}.")
    if method == "none":
        return image
    try:
        import cv2
    except ImportError as error:
        raise EnvironmentProblem(
            f"faces.equalize: {method} needs OpenCV ({error}): pip install 'opencv-python-headless<5'"
        ) from error
    grey = np.ascontiguousarray(to_channels(image, 1)[..., 0])
    if method == "histogram":
        equalized = cv2.equalizeHist(grey)
    else:
        equalized = cv2.createCLAHE(clipLimit=CLIP_LIMIT, tileGridSize=(TILES, TILES)).apply(grey)
    if image.shape[-1] == 1:
        return equalized[..., None]
    change = equalized.astype(np.int16) - grey
    return (image + change[..., None]).clip(0, 255).astype(np.uint8)
