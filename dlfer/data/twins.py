"""Copies of one image: equal byte for byte, nearly equal, mirrored, or made from one source by augmentation."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dlfer.data.near_pairs import SIGNATURE_SIDE, iterate_pairs

NEAR_STD = 8.0
_COPY = re.compile(r"(#\d+)+$")
_BLOCK = 1024
_MOST_EDGES = 4_000_000
"""Images that are measured at a time, and edges that are held before they merge."""


def find_twins(images: np.ndarray, reference_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tell which images have a copy among the reference images.

    Exact is equal byte for byte. Near is a correlation of at least 0.98 between the two images in
    grey, reduced to 16x16 by block means, where both have a standard deviation of at least 8 (flat
    images all look alike). Mirrored is the same after a left-right flip of one.

    Args:
        images: uint8 [N, H, W, C].
        reference_images: uint8 [M, H, W, C]. Of another size or depth, none is exact.

    Returns:
        exact: bool [N].
        near_or_mirrored: bool [N], exact copies included.
    """
    exact = np.isin(hash_images(images), hash_images(reference_images))
    near = exact.copy()
    if not len(images) or not len(reference_images):
        return exact, near
    signatures, textured = compute_signatures(images)
    references, reference_textured = compute_signatures(reference_images)
    rows = np.flatnonzero(textured & ~near)
    for _, found, _ in iterate_pairs(references[reference_textured], signatures[rows]):
        near[rows[found]] = True
    return exact, near


def find_copies(ids: np.ndarray, reference_ids: np.ndarray) -> np.ndarray:
    """Return bool [N]: whether an image and one of the reference come from one source, by the ids alone.

    The id of an augmented copy is "<source id>#<number>", so that this is exact where pixels differ.
    At least one of the two must be a copy: two parts may each have a "0.png" of their own.
    """
    sources, copied = split_ids(ids)
    reference_sources, reference_copied = split_ids(reference_ids)
    return np.isin(sources, reference_sources[reference_copied]) | (copied & np.isin(sources, reference_sources))


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return str [N], the id of the image that each one was made from (its own), and bool [N], whether it is a copy."""
    sources = np.array([_COPY.sub("", str(name)) for name in ids], dtype=str)
    return sources, np.array([source != str(name) for source, name in zip(sources, ids, strict=True)], dtype=bool)


def group_copies(images: np.ndarray) -> np.ndarray:
    """Return int64 [N], a number per image that is the same for images that are equal byte for byte.

    Args:
        images: uint8 [N, H, W, C].
    """
    return np.unique(hash_images(images), return_inverse=True)[1].astype(np.int64)


def group_twins(images: np.ndarray, ids: np.ndarray | None = None) -> np.ndarray:
    """Return int64 [N], a number per image that is the same for images that twins connect.

    Twins are exact, near or mirrored as `find_twins` says. A group is a connected component: two of
    its images need not be twins of each other, if a chain of twins leads from one to the other.

    Args:
        images: uint8 [N, H, W, C].
        ids: str [N]; where given, copies of one source ("<source id>#<number>") are twins, too.
    """
    distinct, copies = np.unique(hash_images(images), return_index=True, return_inverse=True)[1:]
    components = Components(len(distinct))
    for left, right, _ in iterate_near_pairs(*compute_signatures(images[distinct])):
        components.join(left, right)
    if ids is not None:
        components.join_equal(split_ids(ids)[0], copies)
    return components.compute_groups()[copies]


def iterate_near_pairs(signatures: np.ndarray, textured: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield all pairs of images that are near or mirrored twins, in no order; no image stands against itself.

    Args:
        signatures: float32 [N, 256] and
        textured: bool [N], as `compute_signatures` returns them.

    Yields:
        left, right: int64 [P], rows of the two; left < right, so that each pair comes once (twice if it
            is near as well as mirrored).
        mirrored: whether the pairs of the block are alike after a flip of one.
    """
    rows = np.flatnonzero(textured)
    for left, right, mirrored in iterate_pairs(signatures[rows]):
        yield rows[left], rows[right], mirrored


class Components:
    """The connected components of a graph whose edges come bit by bit and need not all be held.

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
        if self._num_edges > _MOST_EDGES + self._num:  # of a film, nearly all pairs of frames can be twins
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
    """Return what near copies are found by.

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
