"""One pass over all images of a data set: which are copies, twins or flat, and what they look like in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlfer.data.bundle import Split
from dlfer.data.outliers import compute_light
from dlfer.data.twins import Components, compute_signatures, hash_images, iterate_near_pairs, split_ids, to_grey

_MOST_PAIRS = 2000
_BLOCK = 1024


@dataclass(frozen=True)
class Survey:
    """What is known of N images in P parts, D of them distinct. Rows run through the parts one after the other.

    Attributes:
        part_of: int64 [N], number of the part of each row.
        distinct: int64 [N], number of the image; equal for rows that are equal byte for byte.
        groups: int64 [N], number of the group that exact, near and mirrored twins and copies of one source make.
        sources: int64 [N], number of the source; equal for rows that are copies of one source by their ids.
        has_twin_in: bool [D, P], whether an image stands in a part, or a near or mirrored twin of it.
        near, mirrored: int64 [M, 2], some of the pairs of distinct images, at most 2000 of either kind.
        signatures: float32 [D, 256], as `dlfer.data.twins.compute_signatures` returns them.
        brightness, contrast: float64 [D], mean and standard deviation in grey levels.
        constant: bool [D], whether all pixels are equal.
    """

    part_of: np.ndarray
    distinct: np.ndarray
    groups: np.ndarray
    sources: np.ndarray
    has_twin_in: np.ndarray
    near: np.ndarray
    mirrored: np.ndarray
    signatures: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    constant: np.ndarray

    def find_leaks(self, left: int, right: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (exact, near_or_mirrored), bool [rows of part `right`]: whether part `left` has a twin of it.

        A copy of one source by its id counts as an exact one.
        """
        rows, reference = self.part_of == right, self.part_of == left
        same_source = np.isin(self.sources[rows], self.sources[reference])
        exact = np.isin(self.distinct[rows], self.distinct[reference]) | same_source
        return exact, self.has_twin_in[self.distinct[rows], left] | same_source


def survey_images(parts: Sequence[Split]) -> Survey:
    """Return the survey of in-memory splits; they may differ in shape."""
    part_of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    hashes = np.concatenate([hash_images(part.images) for part in parts])
    _, first, distinct = np.unique(hashes, return_index=True, return_inverse=True)
    signatures, textured, light = _measure(parts, first)
    present = np.zeros((len(first), len(parts)), bool)
    present[distinct, part_of] = True
    has_twin_in, components = present.copy(), Components(len(first))
    samples: dict[bool, list[np.ndarray]] = {False: [], True: []}
    taken = {False: 0, True: 0}
    for left, right, mirrored in iterate_near_pairs(signatures, textured):
        components.join(left, right)
        for part in range(len(parts)):
            has_twin_in[left[present[right, part]], part] = True
            has_twin_in[right[present[left, part]], part] = True
        if taken[mirrored] < _MOST_PAIRS:
            samples[mirrored].append(np.stack([left, right], axis=1)[: _MOST_PAIRS - taken[mirrored]])
            taken[mirrored] += len(samples[mirrored][-1])
    sources = _number_sources(np.concatenate([part.ids for part in parts]))
    components.join_equal(sources, distinct)
    none = np.zeros((0, 2), np.int64)
    return Survey(
        part_of,
        distinct,
        components.compute_groups()[distinct],
        sources,
        has_twin_in,
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


def _number_sources(ids: np.ndarray) -> np.ndarray:
    """Return int64 [N], equal for a source and its copies; an id that recurs without a copy is two sources."""
    sources, copied = split_ids(ids)
    numbers = np.arange(len(ids))
    if copied.any():
        names, dense = np.unique(sources, return_inverse=True)
        with_copies = np.isin(names, sources[copied])[dense]
        numbers[with_copies] = len(ids) + dense[with_copies]
    return numbers
