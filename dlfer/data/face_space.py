"""Images that are probably no face: far from the space that the other images span."""

from __future__ import annotations

from typing import Any

import numpy as np

from dlfer.data.outliers import FLAT_STD, MOST_LISTED, compute_robust_z

NUM_COMPONENTS = 80
LEAST_IMAGES = 500
ROBUST_Z = 3.0
MEASURED = (
    'Measured against the FER+ votes for "not a face" (160 of 32,298 images of FER2013\'s Training and PublicTest): '
    "area under the ROC curve 0.774; of the 47 images listed there 36 % were no face, 0.5 % being so in all. "
    "A list to look through, not a verdict."
)


def compute_face_distances(signatures: np.ndarray, use: np.ndarray) -> np.ndarray:
    """Return float64 [N] in [0, 1], the share of each image that the principal components leave unexplained.

    The 80 components are those of the images themselves, reduced to 16x16, mean removed, of unit
    norm. If most of them are faces, what is no face lies far from the space they span.
    On FER2013 (32,298 images, 160 of them "not a face" by FER+'s votes) the distance has an area
    under the ROC curve of 0.774; the number of components was chosen there (60: 0.761, 100: 0.764).

    Args:
        signatures: float32 [N, 256], as `dlfer.data.twins.compute_signatures` returns them.
        use: bool [N], the images from which the components are computed.

    Source: Turk and Pentland, "Eigenfaces for Recognition", J. Cognitive Neuroscience 3 (1991) 71.
    """
    mean = signatures[use].mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = signatures - mean
    covariance = (centred[use].T @ centred[use]).astype(np.float64) / max(1, int(use.sum()))
    axes = np.linalg.eigh(covariance)[1][:, -NUM_COMPONENTS:].astype(np.float32)
    distances = (centred**2).sum(axis=1, dtype=np.float64) - ((centred @ axes) ** 2).sum(axis=1, dtype=np.float64)
    return np.maximum(distances, 0.0)


def find_no_faces(signatures: np.ndarray, contrast: np.ndarray, where: list[dict[str, str]]) -> dict[str, Any] | None:
    """Return which images are probably no face, the furthest from face space first; None for fewer than 500 images.

    Listed are those whose distance is more than 3 robust standard deviations of its logarithm above
    the median. On FER2013 these are 47 of 32,298 images, of which 36 % are no face by FER+'s votes,
    against 0.5 % of all: 11 % of the 160. The others there are faces cut, covered or turned away.

    Args:
        signatures: float32 [N, 256].
        contrast: float [N], standard deviations; images below 5 are flat, and not judged.
        where: for each image what names it, {"split", "id", "label"}.

    Returns:
        {"n", "threshold" (of the distance), "images": [{"split", "id", "label", "distance"}] (at most 100), "measured"}.
    """
    judged = np.flatnonzero(contrast >= FLAT_STD)
    if len(judged) < LEAST_IMAGES:
        return None
    distances = compute_face_distances(signatures, contrast >= FLAT_STD)
    # Where components explain all images wholly, what is left is rounding, 1e-7: no distance to speak of.
    logs = np.log(np.maximum(distances, 1e-6))
    z, median, scale = compute_robust_z(logs[judged], 1e-3)
    far = judged[z > ROBUST_Z]
    furthest = far[np.argsort(-distances[far], kind="stable")][:MOST_LISTED]
    return {
        "n": len(far),
        "threshold": round(float(np.exp(median + ROBUST_Z * scale)), 5),
        "images": [{**where[row], "distance": round(float(distances[row]), 5)} for row in furthest],
        "measured": MEASURED,
    }
