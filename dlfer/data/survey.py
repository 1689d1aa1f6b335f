"""One-pass survey of all images of a data set: duplicates, flat images, outliers, images probably without a face."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.duplicates import (
    Components,
    Duplicates,
    compute_signatures,
    hash_images,
    iterate_near_pairs,
    number_sources,
    split_ids,
    to_grey,
)
from dlfer.runs.audit_record import NoFaceImage, NoFaces, OutlierImage, OutlierSummary, Place

FLAT_STD = 5.0
MAX_LISTED = 100
ROBUST_Z = 3.5
RULE = (
    "an outlier is more than 3.5 robust standard deviations (1.4826 median absolute deviations, of the logarithm of "
    "the shorter side for sizes) from the median (Iglewicz and Hoaglin 1993)"
)
_LEAST_SCALE = {"brightness": 2.0, "contrast": 2.0, "size": np.log(1.1)}
"""Lower limits of the robust scale: if nearly all images are alike, invisible differences would count as outliers."""


def compute_light(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (brightness, contrast, constant) of `grey` images (float32 [N, H, W], 0..255).

    Brightness is the mean and contrast the standard deviation of the pixels, float64 [N], in grey
    levels; constant, bool [N], is true if all pixels of an image are equal.
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
    """Return the outliers of one kind, at most 100 of them, those furthest from the median first.

    Args:
        kind: "brightness", "contrast" or "size".
        values: float [N], N >= 1; for "size" the shorter sides in pixels.
        where: split, id and label of each image.
    """
    scaled = np.log(values) if kind == "size" else values
    z, median, scale = compute_robust_z(scaled, _LEAST_SCALE[kind])
    bounds = [median, median - ROBUST_Z * scale, median + ROBUST_Z * scale]
    if kind == "size":
        bounds = [float(np.exp(bound)) for bound in bounds]
    outside = np.flatnonzero(np.abs(z) > ROBUST_Z)
    furthest = outside[np.argsort(-np.abs(z[outside]), kind="stable")][:MAX_LISTED]
    median, low, high = (round(bound, 2) for bound in bounds)
    images = [OutlierImage(**where[row]._asdict(), value=round(float(values[row]), 2)) for row in furthest]
    return OutlierSummary(n=len(outside), median=median, low=low, high=high, images=images)


NUM_COMPONENTS = 80
LEAST_IMAGES = 500
NO_FACE_ROBUST_Z = 3.0
_FOLDS = 5
_IMAGES_PER_COMPONENT = 25
MEASURED = (
    'Measured on FER2013\'s Training and PublicTest against the FER+ votes (0.5 % of the images are "not a face"): area '
    "under the ROC curve 0.773; of the 45 images listed there 16 were no face (36 %, 95 % interval 23 to 50). "
    "A list to look through, not a verdict."
)


def compute_face_distances(signatures: np.ndarray, use: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return float64 [N], the squared distance of each image from the space of the main principal components, >= 0.

    The 80 components (at most one per 25 images) are computed from the images themselves, reduced to
    16x16, with the mean removed and unit norm. If most images are faces, other images lie far from the
    space they span. Each fifth of the images is judged by the components of the other four, with duplicates
    in the same fifth: otherwise an outlier in a small data set, or a frequent image, would be a component itself.
    On FER2013 (32,284 images that are not flat, 146 of them "not a face" by half of FER+'s votes) the distance
    has an area under the ROC curve of 0.773; the number of components was chosen there (60: 0.760, 100: 0.764).

    Args:
        signatures: float32 [N, 256], as returned by `dlfer.data.duplicates.compute_signatures`.
        use: bool [N], the images from which components are computed.
        groups: int [N], groups of duplicates, numbered from 0.

    Source: Turk and Pentland, "Eigenfaces for Recognition", J. Cognitive Neuroscience 3 (1991) 71.
    """
    num_components = min(NUM_COMPONENTS, int(use.sum()) // _IMAGES_PER_COMPONENT)
    distances = np.zeros(len(signatures))
    for fold in range(_FOLDS):
        judged = groups % _FOLDS == fold
        faces = signatures[use & ~judged]
        mean = faces.mean(axis=0, dtype=np.float64).astype(np.float32)
        faces -= mean
        axes = np.linalg.eigh((faces.T @ faces).astype(np.float64))[1][:, -num_components:].astype(np.float32)
        centred = signatures[judged] - mean
        explained = ((centred @ axes) ** 2).sum(axis=1, dtype=np.float64)
        distances[judged] = np.maximum((centred**2).sum(axis=1, dtype=np.float64) - explained, 0.0)
    return distances


def find_no_faces(
    signatures: np.ndarray, contrast: np.ndarray, groups: np.ndarray, where: Sequence[Place]
) -> NoFaces | None:
    """Return the images that probably show no face, those furthest from the space of faces first.

    Listed are images whose distance exceeds the median by more than 3 robust standard deviations, on a log scale.
    On FER2013 these are 45 images, of which 16 (36 %, against 0.5 % of all) show no face by FER+'s votes, 11 % of
    the 146 that show none. The other listed images are faces that are cropped, covered or turned away.

    Args:
        signatures: float32 [N, 256].
        contrast: float [N], standard deviations; images below 5 are flat and not judged.
        groups: int [N], groups of duplicates.
        where: split, id and label of each image.

    Returns:
        None if fewer than 500 images are not flat, or if these are in fewer than 250 groups.
    """
    judged = np.flatnonzero(contrast >= FLAT_STD)
    _, dense = np.unique(groups, return_inverse=True)
    if len(judged) < LEAST_IMAGES or len(np.unique(dense[judged])) < LEAST_IMAGES // 2:
        return None
    distances = compute_face_distances(signatures, contrast >= FLAT_STD, dense)
    # If the components explain all images completely, the distances are only rounding errors (1e-7).
    logs = np.log(np.maximum(distances, 1e-6))
    z, median, scale = compute_robust_z(logs[judged], 1e-3)
    far = judged[z > NO_FACE_ROBUST_Z]
    furthest = far[np.argsort(-distances[far], kind="stable")][:MAX_LISTED]
    return NoFaces(
        n=len(far),
        threshold=round(float(np.exp(median + NO_FACE_ROBUST_Z * scale)), 5),
        images=[NoFaceImage(**where[row]._asdict(), distance=round(float(distances[row]), 5)) for row in furthest],
        measured=MEASURED,
    )


_MAX_PAIRS = 2000
_BLOCK = 1024


@dataclass(frozen=True)
class Survey:
    """The duplicates and statistics of N images, D of them distinct, in the concatenated rows of P splits.

    Attributes:
        split_of: int64 [N], number of the split of each row.
        distinct: int64 [N], number of the distinct image; equal for rows that are equal byte for byte.
        groups: int64 [N], number of the group; equal for rows connected by chains of duplicates of any kind.
        sources: int64 [N], number of the source; equal for augmented copies of one source, by their ids.
        copied: bool [N], whether the id is that of an augmented copy.
        has_duplicate_in: bool [D, P], whether a split contains the image itself, or a near or flipped duplicate of it.
        near, flipped: int64 [M, 2], a sample of the pairs of distinct images, at most 2000 of each kind.
        signatures: float32 [D, 256], as returned by `dlfer.data.duplicates.compute_signatures`.
        brightness, contrast: float64 [D], mean and standard deviation in grey levels.
        constant: bool [D], whether all pixels are equal.
    """

    split_of: np.ndarray
    distinct: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    copied: np.ndarray
    has_duplicate_in: np.ndarray
    near: np.ndarray
    flipped: np.ndarray
    signatures: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    constant: np.ndarray

    def find_duplicates(self, left: int, right: int) -> Duplicates:
        """Return which rows of split `right` have a duplicate in split `left`.

        The result equals that of `dlfer.data.duplicates.find_duplicates` for the images and ids of the two splits.
        """
        rows, reference = self.split_of == right, self.split_of == left
        sources, reference_sources = self.sources[rows], self.sources[reference]
        augmented = np.isin(sources, self.sources[reference & self.copied])
        augmented |= self.copied[rows] & np.isin(sources, reference_sources)
        exact = np.isin(self.distinct[rows], self.distinct[reference])
        return Duplicates(exact, augmented, self.has_duplicate_in[self.distinct[rows], left] | augmented)


def survey_images(splits: Sequence[Split]) -> Survey:
    """Return the survey of in-memory splits, whose images may differ in shape."""
    split_of = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    hashes = np.concatenate([hash_images(split.images) for split in splits])
    _, first, distinct = np.unique(hashes, return_index=True, return_inverse=True)
    signatures, textured, light = _measure(splits, first)
    present = np.zeros((len(first), len(splits)), bool)
    present[distinct, split_of] = True
    has_duplicate_in, components = present.copy(), Components(len(first))
    samples: dict[bool, list[np.ndarray]] = {False: [], True: []}
    taken = {False: 0, True: 0}
    for left, right, flipped in iterate_near_pairs(signatures, textured):
        components.join(left, right)
        for split in range(len(splits)):
            has_duplicate_in[left[present[right, split]], split] = True
            has_duplicate_in[right[present[left, split]], split] = True
        if taken[flipped] < _MAX_PAIRS:
            samples[flipped].append(np.stack([left, right], axis=1)[: _MAX_PAIRS - taken[flipped]])
            taken[flipped] += len(samples[flipped][-1])
    ids = np.concatenate([split.ids for split in splits])
    sources = number_sources(ids)
    components.join_equal(sources, distinct)
    none = np.zeros((0, 2), np.int64)
    return Survey(
        split_of,
        distinct,
        components.compute_groups()[distinct],
        sources,
        split_ids(ids)[1],
        has_duplicate_in,
        np.concatenate([none, *samples[False]]),
        np.concatenate([none, *samples[True]]),
        signatures,
        *light,
    )


def _measure(splits: Sequence[Split], first: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return the signatures, textured flags, and [brightness, contrast, constant] of the distinct images.

    Args:
        splits: the splits, whose concatenated rows `first` counts.
        first: int64 [D], the first row of each distinct image.
    """
    ends = np.cumsum([0, *(len(split) for split in splits)])
    by_split, order = [], []
    for number, split in enumerate(splits):
        chosen = np.flatnonzero((first >= ends[number]) & (first < ends[number + 1]))
        for start in range(0, len(chosen), _BLOCK):
            block = chosen[start : start + _BLOCK]
            images = split.images[first[block] - ends[number]]
            by_split.append((*compute_signatures(images), *compute_light(to_grey(images))))
            order.append(block)
    back = np.argsort(np.concatenate(order))
    signatures, textured, *light = (np.concatenate(values)[back] for values in zip(*by_split, strict=True))
    return signatures, textured, light
