"""Images that are far from the rest in size, brightness or contrast, and images without any content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dlfer.runs.audit_record import OutlierImage, OutlierSummary, Place

FLAT_STD = 5.0
MOST_LISTED = 100
ROBUST_Z = 3.5
RULE = (
    "an outlier is more than 3.5 robust standard deviations (1.4826 median absolute deviations, of the logarithm of "
    "the shorter side for sizes) from the median (Iglewicz and Hoaglin 1993)"
)
_LEAST_SCALE = {"brightness": 2.0, "contrast": 2.0, "size": np.log(1.1)}
"""Where nearly all images are alike the deviation is near 0, and grey levels or pixels that nobody sees would count."""


def compute_light(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (brightness, contrast, constant) of `grey` images (float32 [N, H, W], 0..255).

    Brightness is the mean and contrast the standard deviation of the pixels, float64 [N], in grey
    levels; constant, bool [N], tells whether all pixels are equal.
    """
    flat = grey.reshape(len(grey), -1)
    return flat.mean(axis=1, dtype=np.float64), flat.std(axis=1, dtype=np.float64), flat.min(axis=1) == flat.max(axis=1)


def compute_robust_z(values: np.ndarray, least_scale: float) -> tuple[np.ndarray, float, float]:
    """Return (z, median, scale): how many robust standard deviations each value (float [N]) is from the median.

    The scale is 1.4826 median absolute deviations, the standard deviation of normal values, and at
    least `least_scale`.

    Source: Iglewicz and Hoaglin, "How to Detect and Handle Outliers" (1993).
    """
    median = float(np.median(values))
    scale = max(1.4826 * float(np.median(np.abs(values - median))), least_scale)
    return (values - median) / scale, median, scale


def find_outliers(kind: str, values: np.ndarray, where: Sequence[Place]) -> OutlierSummary:
    """Return which images are outliers of one kind, the furthest first and at most 100 of them.

    Args:
        kind: "brightness", "contrast" or "size".
        values: float [N], N >= 1; of sizes the shorter side in pixels.
        where: what names each image.
    """
    scaled = np.log(values) if kind == "size" else values
    z, median, scale = compute_robust_z(scaled, _LEAST_SCALE[kind])
    bounds = [median, median - ROBUST_Z * scale, median + ROBUST_Z * scale]
    if kind == "size":
        bounds = [float(np.exp(bound)) for bound in bounds]
    outside = np.flatnonzero(np.abs(z) > ROBUST_Z)
    furthest = outside[np.argsort(-np.abs(z[outside]), kind="stable")][:MOST_LISTED]
    median, low, high = (round(bound, 2) for bound in bounds)
    images = [OutlierImage(**where[row]._asdict(), value=round(float(values[row]), 2)) for row in furthest]
    return OutlierSummary(n=len(outside), median=median, low=low, high=high, images=images)
