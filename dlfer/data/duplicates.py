"""Duplicates of an image: exact, near or horizontally flipped copies, and augmented copies of one source.

Two images are duplicates of each other (the direct relation) if any of these holds:

- exact: they are equal byte for byte;
- near: both have a standard deviation of at least 8 grey levels, and in grey, reduced to 16x16 by block means, they
  correlate by 0.98 or more (flat images, which all look alike, are thereby no near duplicates);
- flipped: the same after a horizontal flip of one;
- augmented: their ids name one source, "<source id>" and "<source id>#<number>" (see `find_copies_by_id`).

The relation is used in two ways. Whoever counts uses the direct relation: an image has a duplicate in training if one
of the training images is its duplicate (`find_duplicates`; the audit counts all pairs of splits in one pass by the same
relation). Whoever splits or drops uses chains: the direct relation is not transitive, and if A is a duplicate of B and
B one of C, then C says something about A. So groups are the connected components of the relation
(`group_duplicates`); drawn splits keep them whole, and `data.drop_duplicates` drops what a chain connects to an image of
validation or test. Chains include the direct relation, so that nothing is counted after such a split or drop.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dlfer.data.near_pairs import SIGNATURE_SIDE, iterate_pairs

NEAR_STD = 8.0
_COPY = re.compile(r"(#\d+)+$")
_BLOCK = 1024
_MOST_EDGES = 4_000_000
"""Images that are measured at a time, and edges that are held before they are merged."""


@dataclass(frozen=True)
class Duplicates:
    """Which of N images have a duplicate among some reference images, by the direct relation.

    Attributes:
        exact: bool [N], a reference image is equal byte for byte.
        augmented: bool [N], a reference image is of the same source by its id.
        any: bool [N], a reference image is a duplicate of any kind. "Has a duplicate" means this everywhere.
    """

    exact: np.ndarray
    augmented: np.ndarray
    any: np.ndarray

    def __or__(self, other: Duplicates) -> Duplicates:
        """Return which of the images have a duplicate among the reference images of one or the other."""
        return Duplicates(self.exact | other.exact, self.augmented | other.augmented, self.any | other.any)

    def count(self) -> dict[str, int]:
        """Return the number of images of each kind: {"exact", "augmented", "any"}; a kind may overlap with another."""
        return {kind: int(getattr(self, kind).sum()) for kind in ("exact", "augmented", "any")}


def find_duplicates(
    images: np.ndarray,
    reference_images: np.ndarray,
    *,
    ids: np.ndarray | None = None,
    reference_ids: np.ndarray | None = None,
) -> Duplicates:
    """Return which images have a duplicate among the reference images, as the module's docstring defines it.

    Args:
        images: uint8 [N, H, W, C].
        reference_images: uint8 [M, H, W, C]. Of another size or depth, none is exact, but some may be near.
        ids: str [N], and
        reference_ids: str [M]: given where an id means the same image in both, so that augmented copies are found.

    Example:
        >>> find_duplicates(test.images, train.images, ids=test.ids, reference_ids=train.ids).count()
        {'exact': 280, 'augmented': 0, 'any': 375}
    """
    exact = np.isin(hash_images(images), hash_images(reference_images))
    augmented = np.zeros(len(images), bool)
    if ids is not None and reference_ids is not None:
        augmented = find_copies_by_id(ids, reference_ids)
    found = exact | augmented
    if len(images) and len(reference_images):
        signatures, textured = compute_signatures(images)
        references, reference_textured = compute_signatures(reference_images)
        rows = np.flatnonzero(textured & ~found)
        for _, near, _ in iterate_pairs(references[reference_textured], signatures[rows]):
            found[rows[near]] = True
    return Duplicates(exact, augmented, found)


def find_copies_by_id(ids: np.ndarray, reference_ids: np.ndarray) -> np.ndarray:
    """Return bool [N]: whether an image and one of the reference images are of one source, by the ids alone.

    The id of an augmented copy is "<source id>#<number>", so this is exact where pixels differ. At least one of
    the two must be a copy: two splits may each have a "0.png" of their own.

    Args:
        ids: str [N].
        reference_ids: str [M].
    """
    sources, copied = split_ids(ids)
    reference_sources, reference_copied = split_ids(reference_ids)
    return np.isin(sources, reference_sources[reference_copied]) | (copied & np.isin(sources, reference_sources))


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return str [N], the id of the image that each one was made from (its own), and bool [N], whether it is a copy."""
    sources = np.array([_COPY.sub("", str(name)) for name in ids], dtype=str)
    return sources, np.array([source != str(name) for source, name in zip(sources, ids, strict=True)], dtype=bool)


def number_sources(ids: np.ndarray) -> np.ndarray:
    """Return int64 [N], equal for a source and its augmented copies; an id that recurs without a copy is two sources.

    Args:
        ids: str [N], of several splits one after the other.
    """
    sources, copied = split_ids(ids)
    numbers = np.arange(len(ids))
    if copied.any():
        names, dense = np.unique(sources, return_inverse=True)
        with_copies = np.isin(names, sources[copied])[dense]
        numbers[with_copies] = len(ids) + dense[with_copies]
    return numbers


def group_duplicates(images: np.ndarray | Sequence[np.ndarray], ids: np.ndarray | None = None) -> np.ndarray:
    """Return int64 [N], a number per image that is the same for images that a chain of duplicates connects.

    A group is a connected component of the relation: two of its images need not be duplicates of each other.

    Args:
        images: uint8 [N, H, W, C]; or several such arrays, of one shape or not, whose rows follow one another.
        ids: str [N]; where given, augmented copies of one source are duplicates, too.
    """
    parts = [images] if isinstance(images, np.ndarray) else list(images)
    hashes = np.concatenate([hash_images(part) for part in parts])
    first, copies = np.unique(hashes, return_index=True, return_inverse=True)[1:]
    measured = zip(*(compute_signatures(part) for part in parts), strict=True)
    signatures, textured = (np.concatenate(values)[first] for values in measured)
    components = Components(len(first))
    for left, right, _ in iterate_near_pairs(signatures, textured):
        components.join(left, right)
    if ids is not None:
        components.join_equal(number_sources(ids), copies)
    return components.compute_groups()[copies]


def iterate_near_pairs(signatures: np.ndarray, textured: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield all pairs of different images that are near or flipped duplicates, in no order.

    Args:
        signatures: float32 [N, 256] and
        textured: bool [N], as `compute_signatures` returns them.

    Yields:
        left, right: int64 [P], rows of the two; left < right, so that each pair comes once (twice if it
            is near as well as flipped).
        flipped: whether the pairs of the block are alike after a horizontal flip of one.
    """
    rows = np.flatnonzero(textured)
    for left, right, flipped in iterate_pairs(signatures[rows]):
        yield rows[left], rows[right], flipped


class Components:
    """The connected components of a graph whose edges are added in batches and need not all be held in memory.

    Args:
        num: of nodes.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._edges: list[np.ndarray] = []
        self._num_edges = 0

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Connect each node of `left` (int [E]) with that of `right` (int [E])."""
        self._edges.append(np.stack([left, right]))
        self._num_edges += len(left)
        if self._num_edges > _MOST_EDGES + self._num:  # in a video nearly all pairs of frames can be duplicates
            groups = self.compute_groups()
            self._edges, self._num_edges = [], 0
            self.join_equal(groups, np.arange(self._num))

    def join_equal(self, values: np.ndarray, nodes: np.ndarray) -> None:
        """Connect the nodes (int [N]) whose values (any [N]) are equal."""
        _, first, group = np.unique(values, return_index=True, return_inverse=True)
        self.join(nodes[first][group], nodes)

    def compute_groups(self) -> np.ndarray:
        """Return int64 [num], the number of the component of each node."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        left, right = np.concatenate([np.zeros((2, 0), np.int64), *self._edges], axis=1)
        graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(self._num, self._num))
        return connected_components(graph, directed=False)[1].astype(np.int64)


def compute_signatures(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what near and flipped duplicates are found by.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        signatures: float32 [N, 256], the image in grey at 16x16, mean removed, of unit norm (zero if flat).
        textured: bool [N], whether its standard deviation is at least 8.
    """
    signatures = np.zeros((len(images), SIGNATURE_SIDE**2), np.float32)
    textured = np.zeros(len(images), bool)
    for start in range(0, len(images), _BLOCK):
        rows = slice(start, start + _BLOCK)
        grey = to_grey(images[rows])
        textured[rows] = grey.std(axis=(1, 2)) >= NEAR_STD
        small = reduce_area(grey, SIGNATURE_SIDE).reshape(len(grey), -1)
        small -= small.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(small, axis=1, keepdims=True)
        signatures[rows] = np.divide(small, norms, out=np.zeros_like(small), where=norms > 0)
    return signatures, textured


def hash_images(images: np.ndarray) -> np.ndarray:
    """Return bytes [N], a 128-bit digest of each image's shape and pixels."""
    shape = repr(images.shape[1:]).encode()
    digests = [hashlib.blake2b(shape + image.tobytes(), digest_size=16).digest() for image in images]
    return np.array([digest.hex() for digest in digests], dtype="S32")


def to_grey(images: np.ndarray) -> np.ndarray:
    """Return float32 [N, H, W], the luma of ITU-R BT.601 for RGB (uint8 [N, H, W, 1 or 3])."""
    if images.shape[-1] == 1:
        return images[..., 0].astype(np.float32)
    return images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def reduce_area(grey: np.ndarray, side: int) -> np.ndarray:
    """Return float32 [N, side, side], area means of `grey` (float32 [N, H, W])."""
    count, height, width = grey.shape
    if height % side == 0 and width % side == 0:
        return grey.reshape(count, side, height // side, side, width // side).mean(axis=(2, 4))
    resized = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in grey]
    return np.stack(resized)
