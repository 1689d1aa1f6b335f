"""One pass over all images of a data set: which are duplicates or flat, and how bright and rich in contrast they are."""

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
from dlfer.data.outliers import compute_light

_MOST_PAIRS = 2000
_BLOCK = 1024


@dataclass(frozen=True)
class Survey:
    """What is known of N images in P parts, D of them distinct. Rows run through the parts one after the other.

    Attributes:
        part_of: int64 [N], number of the part of each row.
        distinct: int64 [N], number of the image; equal for rows that are equal byte for byte.
        groups: int64 [N], number of the group that chains of duplicates of any kind make.
        sources: int64 [N], number of the source; equal for rows that are augmented copies of one source by their ids.
        copied: bool [N], whether the id is that of an augmented copy.
        has_duplicate_in: bool [D, P], whether a part has an image itself, or a near or flipped duplicate of it.
        near, flipped: int64 [M, 2], some of the pairs of distinct images, at most 2000 of either kind.
        signatures: float32 [D, 256], as `dlfer.data.duplicates.compute_signatures` returns them.
        brightness, contrast: float64 [D], mean and standard deviation in grey levels.
        constant: bool [D], whether all pixels are equal.
    """

    part_of: np.ndarray
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
        """Return which rows of part `right` have a duplicate in part `left`.

        The answer is that of `dlfer.data.duplicates.find_duplicates` for images and ids of the two parts.
        """
        rows, reference = self.part_of == right, self.part_of == left
        sources, reference_sources = self.sources[rows], self.sources[reference]
        augmented = np.isin(sources, self.sources[reference & self.copied])
        augmented |= self.copied[rows] & np.isin(sources, reference_sources)
        exact = np.isin(self.distinct[rows], self.distinct[reference])
        return Duplicates(exact, augmented, self.has_duplicate_in[self.distinct[rows], left] | augmented)


def survey_images(parts: Sequence[Split]) -> Survey:
    """Return the survey of in-memory splits; they may differ in shape."""
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    hashes = np.concatenate([hash_images(part.images) for part in parts])
    _, first, distinct = np.unique(hashes, return_index=True, return_inverse=True)
    signatures, textured, light = _measure(parts, first)
    present = np.zeros((len(first), len(parts)), bool)
    present[distinct, part_of] = True
    has_duplicate_in, components = present.copy(), Components(len(first))
    samples: dict[bool, list[np.ndarray]] = {False: [], True: []}
    taken = {False: 0, True: 0}
    for left, right, flipped in iterate_near_pairs(signatures, textured):
        components.join(left, right)
        for part in range(len(parts)):
            has_duplicate_in[left[present[right, part]], part] = True
            has_duplicate_in[right[present[left, part]], part] = True
        if taken[flipped] < _MOST_PAIRS:
            samples[flipped].append(np.stack([left, right], axis=1)[: _MOST_PAIRS - taken[flipped]])
            taken[flipped] += len(samples[flipped][-1])
    ids = np.concatenate([part.ids for part in parts])
    sources = number_sources(ids)
    components.join_equal(sources, distinct)
    none = np.zeros((0, 2), np.int64)
    return Survey(
        part_of,
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


def _measure(parts: Sequence[Split], first: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return signatures, textured, and [brightness, contrast, constant] of the distinct images.

    Args:
        parts: the splits.
        first: int64 [D], the first row of each distinct image.
    """
    ends = np.cumsum([0, *(len(part) for part in parts)])
    by_part, order = [], []
    for number, part in enumerate(parts):
        chosen = np.flatnonzero((first >= ends[number]) & (first < ends[number + 1]))
        for start in range(0, len(chosen), _BLOCK):
            block = chosen[start : start + _BLOCK]
            images = part.images[first[block] - ends[number]]
            by_part.append((*compute_signatures(images), *compute_light(to_grey(images))))
            order.append(block)
    back = np.argsort(np.concatenate(order))
    signatures, textured, *light = (np.concatenate(values)[back] for values in zip(*by_part, strict=True))
    return signatures, textured, light
