"""Duplicates of an image: exact, near or horizontally flipped copies, and augmented copies of one source.

Two images are duplicates of each other (the direct relation) if any of these holds:

- exact: they are equal byte for byte;
- near: both have a standard deviation of at least 8 grey levels, and in grey, reduced to 16x16 by block means, their
  correlation is at least 0.98 (so flat images, which all look alike, are not near duplicates);
- flipped: the same after a horizontal flip of one;
- augmented: their ids name one source, "<source id>" and "<source id>#<number>" (see `find_copies_by_id`).

The relation is used in two ways. Counts use the direct relation: an image has a duplicate in training if one of the
training images is its duplicate (`find_duplicates`; the audit counts all pairs of splits in one pass by the same
relation). Splitting and dropping use chains: the direct relation is not transitive, but if A is a duplicate of B and B
of C, then A and C are related. So groups are the connected components of the relation (`group_duplicates`); drawn
splits keep groups whole, and `data.drop_duplicates` drops the images of train that a chain connects to validation or
test. Chains include the direct relation, so no duplicates are counted after such a split or drop.

The search for near duplicates is exact: it finds all pairs of signatures whose correlation, with or without a flip of
one, reaches the threshold, without comparing most pairs. The signatures are projected onto the few principal directions
with the largest variance, separately for their even and odd parts under a left-right flip. The odd coordinates are
replaced by their absolute values, so that an image and its mirror image have the same point, and the norm of the
residual is one more coordinate. This mapping never increases the distance of two signatures, or of one and the flipped
other; a correlation of 0.98 corresponds to a distance of at most 0.2. A k-d tree (Bentley 1975,
https://doi.org/10.1145/361002.361007) divides the points into small leaves, and a point remains a candidate for a box
only while it is within 0.2 of it. The candidates of a leaf are compared by matrix products, first of the few
coordinates, then of the whole signatures of the remaining pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

SIGNATURE_SIDE = 16
NEAR_CORRELATION = 0.98
_LOOSE = NEAR_CORRELATION - 1e-3
"""Threshold for products of projected points; it is lower since rounding changes the residual's norm by up to 3e-4."""
_DOUBT = 2e-5
"""Upper bound on the rounding error of the product of two signatures in single precision (256 terms of 6e-8 each)."""
_DIRECTIONS = 32
_LEAF = 64
_PAIR_BLOCK = 4096
_SAMPLE = 16384
"""Largest number of points in a leaf; points compared with it at a time; signatures used to compute the directions."""


def iterate_pairs(pool: np.ndarray, queries: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield all pairs of signatures whose correlation is at least 0.98, with or without a flip of one.

    Correlations within rounding error of the threshold are recomputed in double precision, pair by pair, so
    that the result does not depend on the blocks.

    Args:
        pool: float32 [N, 256], of unit norm or zero, as returned by `compute_signatures`.
        queries: float32 [M, 256], which are compared with the pool; None: compare the pool with itself.

    Yields:
        left: int64 [P], rows of the pool, and
        right: int64 [P], rows of the queries. Without queries left < right, and each pair occurs at most once
            as near and once as flipped.
        flipped: whether the pairs of the block correlate after a horizontal flip of one.
    """
    within = queries is None
    others = pool if within else queries
    if not len(pool) or not len(others):
        return
    directions = _find_directions(pool)
    points = _project(pool, directions)
    other_points = points if within else _project(others, directions)
    for leaf, close in _iterate_leaves(points, None if within else other_points):
        for start in range(0, len(close), _PAIR_BLOCK):
            chosen = close[start : start + _PAIR_BLOCK]
            products = points[leaf] @ other_points[chosen].T
            chosen = chosen[products.max(axis=0) >= _LOOSE]
            if len(chosen):
                yield from _compare(pool, leaf, others, chosen, within=within)


def flip_signatures(signatures: np.ndarray) -> np.ndarray:
    """Return the signatures (float32 [N, 256]) of the horizontally flipped images."""
    side = SIGNATURE_SIDE
    return np.ascontiguousarray(signatures.reshape(-1, side, side)[:, :, ::-1]).reshape(-1, side * side)


def _compare(
    pool: np.ndarray, leaf: np.ndarray, others: np.ndarray, chosen: np.ndarray, *, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield the pairs of pool[leaf] and others[chosen]; with `within`, pairs inside the leaf only as left < right."""
    own = pool[leaf]
    in_leaf = np.isin(chosen, leaf) if within else None
    for flipped in (False, True):
        signatures = flip_signatures(others[chosen]) if flipped else others[chosen]
        products = own @ signatures.T
        row, column = np.nonzero(products >= NEAR_CORRELATION - _DOUBT)
        if in_leaf is not None:
            once = ~in_leaf[column] | (leaf[row] < chosen[column])
            row, column = row[once], column[once]
        doubtful = products[row, column] < NEAR_CORRELATION + _DOUBT
        alike = ~doubtful
        again = (own[row[doubtful]].astype(np.float64) * signatures[column[doubtful]]).sum(axis=1)
        alike[doubtful] = again >= NEAR_CORRELATION
        left, right = leaf[row[alike]], chosen[column[alike]]
        if len(left) and within:
            yield np.minimum(left, right), np.maximum(left, right), flipped
        elif len(left):
            yield left, right, flipped


def _split_halves(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the even and odd parts, float32 [N, 128] each, orthonormal: a flip negates only the odd one."""
    images = signatures.reshape(-1, SIGNATURE_SIDE, SIGNATURE_SIDE)
    half = SIGNATURE_SIDE // 2
    left, right = images[:, :, :half], images[:, :, : half - 1 : -1]
    scale = np.float32(np.sqrt(0.5))
    return ((left + right) * scale).reshape(len(images), -1), ((left - right) * scale).reshape(len(images), -1)


def _find_directions(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the even and odd principal directions of largest variance, float32 [128, E] and [128, O], E + O = 32."""
    step = -(-len(signatures) // _SAMPLE)
    even, odd = _split_halves(signatures[::step])
    even = even - even.mean(axis=0)  # the odd mean is zero if the flipped signatures are included
    spreads, directions = zip(*(np.linalg.eigh(half.T @ half) for half in (even, odd)), strict=True)
    least = np.sort(np.concatenate(spreads))[-_DIRECTIONS]
    even_count = min(int((spreads[0] >= least).sum()), _DIRECTIONS)
    odd_count = _DIRECTIONS - even_count
    return directions[0][:, len(even.T) - even_count :], directions[1][:, len(odd.T) - odd_count :]


def _project(signatures: np.ndarray, directions: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Project signatures to points, float32 [N, 33], whose products are upper bounds of both correlations."""
    points = np.empty((len(signatures), _DIRECTIONS + 1), np.float32)
    even_count = directions[0].shape[1]
    for start in range(0, len(signatures), _PAIR_BLOCK):
        rows = slice(start, start + _PAIR_BLOCK)
        even, odd = _split_halves(signatures[rows])
        points[rows, :even_count] = even @ directions[0]
        points[rows, even_count:-1] = np.abs(odd @ directions[1])
        kept = np.square(points[rows, :-1]).sum(axis=1)
        points[rows, -1] = np.sqrt(np.maximum(np.square(signatures[rows]).sum(axis=1) - kept, 0))
    return points


def _iterate_leaves(points: np.ndarray, queries: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the leaves of a k-d tree of points, each with all queries that can be near one of its points.

    Args:
        points: float32 [N, D], of norm 1 at most.
        queries: float32 [M, D]; None: the points themselves, without those of the leaves yielded before.

    Yields:
        leaf: int64 [1 to 64], rows of the points, in order; each row is in exactly one leaf.
        close: int64 [C], rows of the queries, in order; without queries they include those of the leaf.
    """
    columns = np.ascontiguousarray(points.T)
    query_columns = columns if queries is None else np.ascontiguousarray(queries.T)
    done = None if queries is not None else np.zeros(len(points), bool)
    reach = np.float32(2 * (1 - _LOOSE))  # squared distance of unit vectors with this product
    num_queries = query_columns.shape[1]
    unbounded = np.array([[-np.inf], [np.inf]], np.float32).repeat(len(columns), axis=1)
    stack = [(np.arange(len(points)), np.arange(num_queries), np.zeros(num_queries, np.float32), unbounded)]
    while stack:
        leaf, close, squared, bounds = stack.pop()
        if done is not None:
            left = ~done[close]
            close, squared = close[left], squared[left]
        if len(leaf) <= _LEAF:
            yield leaf, close
            if done is not None:
                done[leaf] = True
            continue
        axis = int(np.argmax(columns[:, leaf[:: -(-len(leaf) // 256)]].var(axis=1)))
        values, coordinates = columns[axis, leaf], query_columns[axis, close]
        apart = squared - _measure_gaps(coordinates, bounds[:, axis])
        lower = np.zeros(len(leaf), bool)
        lower[np.argpartition(values, len(leaf) // 2)[: len(leaf) // 2]] = True
        for part in (~lower, lower):
            inside = bounds.copy()
            inside[:, axis] = values[part].min(), values[part].max()
            distances = apart + _measure_gaps(coordinates, inside[:, axis])
            kept = distances <= reach
            stack.append((leaf[part], close[kept], distances[kept], inside))


def _measure_gaps(coordinates: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return float32 [N], the squared distances of coordinates from an interval."""
    return np.square(np.maximum(np.maximum(bounds[0] - coordinates, coordinates - bounds[1]), 0))


NEAR_STD = 8.0
_COPY = re.compile(r"(#\d+)+$")
_BLOCK = 1024
_MAX_EDGES = 4_000_000
"""Number of images processed at a time, and number of edges held before they are merged."""


@dataclass(frozen=True)
class Duplicates:
    """Flags for N images that have a duplicate among some reference images, by the direct relation.

    Attributes:
        exact: bool [N], a reference image is equal byte for byte.
        augmented: bool [N], a reference image is of the same source by its id.
        any: bool [N], a reference image is a duplicate of any kind. "Has a duplicate" means this everywhere.
    """

    exact: np.ndarray
    augmented: np.ndarray
    any: np.ndarray

    def __or__(self, other: Duplicates) -> Duplicates:
        """Return the flags for the union of both sets of reference images."""
        return Duplicates(self.exact | other.exact, self.augmented | other.augmented, self.any | other.any)

    def count(self) -> dict[str, int]:
        """Return the number of images of each kind, "exact", "augmented" and "any"; the kinds overlap."""
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
        reference_images: uint8 [M, H, W, C]. If H, W or C differ, none is an exact duplicate, but some may be near.
        ids: str [N], and
        reference_ids: str [M]; needed to find augmented copies. An id must mean the same image in both.

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
    """Return bool [N], whether an image and one of the reference images have the same source, by the ids alone.

    The id of an augmented copy is "<source id>#<number>", which is reliable although the pixels differ. At least one
    of the two must be a copy, since two splits may each have a "0.png" of their own.

    Args:
        ids: str [N].
        reference_ids: str [M].
    """
    sources, copied = split_ids(ids)
    reference_sources, reference_copied = split_ids(reference_ids)
    return np.isin(sources, reference_sources[reference_copied]) | (copied & np.isin(sources, reference_sources))


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return str [N], the id of each image's source (its own id if it is one), and bool [N], whether it is a copy."""
    sources = np.array([_COPY.sub("", str(name)) for name in ids], dtype=str)
    return sources, np.array([source != str(name) for source, name in zip(sources, ids, strict=True)], dtype=bool)


def number_sources(ids: np.ndarray) -> np.ndarray:
    """Return int64 [N], equal for a source and its augmented copies; equal ids without copies get different numbers.

    Args:
        ids: str [N], the concatenated ids of several splits.
    """
    sources, copied = split_ids(ids)
    numbers = np.arange(len(ids))
    if copied.any():
        names, dense = np.unique(sources, return_inverse=True)
        with_copies = np.isin(names, sources[copied])[dense]
        numbers[with_copies] = len(ids) + dense[with_copies]
    return numbers


def group_duplicates(images: np.ndarray | Sequence[np.ndarray], ids: np.ndarray | None = None) -> np.ndarray:
    """Return int64 [N], a group number per image, equal for images that a chain of duplicates connects.

    A group is a connected component of the relation: two of its images need not be duplicates of each other.

    Args:
        images: uint8 [N, H, W, C]; or several such arrays, possibly of different shapes, which are concatenated.
        ids: str [N]; if given, augmented copies of one source also count as duplicates.
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
    """Yield all pairs of images that are near or flipped duplicates, in no particular order.

    Args:
        signatures: float32 [N, 256] and
        textured: bool [N], as returned by `compute_signatures`.

    Yields:
        left, right: int64 [P], rows of the pairs; left < right, so that each pair occurs once (twice if it
            is near as well as flipped).
        flipped: whether the pairs of the block are duplicates after a horizontal flip of one.
    """
    rows = np.flatnonzero(textured)
    for left, right, flipped in iterate_pairs(signatures[rows]):
        yield rows[left], rows[right], flipped


class Components:
    """The connected components of a graph whose edges are added in batches and need not all be held in memory.

    Args:
        num: number of nodes.
    """

    def __init__(self, num: int) -> None:
        self._num = num
        self._edges: list[np.ndarray] = []
        self._num_edges = 0

    def join(self, left: np.ndarray, right: np.ndarray) -> None:
        """Add edges between the nodes in `left` (int [E]) and those in `right` (int [E]), pair by pair."""
        self._edges.append(np.stack([left, right]))
        self._num_edges += len(left)
        if self._num_edges > _MAX_EDGES + self._num:  # nearly all pairs of frames of a video can be duplicates
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
    """Compute the signatures by which near and flipped duplicates are found.

    Args:
        images: uint8 [N, H, W, C].

    Returns:
        signatures: float32 [N, 256], the images in grey at 16x16, with mean removed and unit norm (zero if constant).
        textured: bool [N], whether an image's standard deviation is at least 8.
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


def shorten_digests(digests: np.ndarray) -> np.ndarray:
    """Return the first 64 bits of digests of `hash_images`, bytes [N] of 16 hex digits, as stored in shipped models."""
    return digests.astype("S16")


def to_grey(images: np.ndarray) -> np.ndarray:
    """Convert images, uint8 [N, H, W, 1 or 3], to grey, float32 [N, H, W]; RGB becomes its luma of ITU-R BT.601."""
    if images.shape[-1] == 1:
        return images[..., 0].astype(np.float32)
    return images.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def reduce_area(grey: np.ndarray, side: int) -> np.ndarray:
    """Reduce `grey` (float32 [N, H, W]) to float32 [N, side, side] by area means."""
    count, height, width = grey.shape
    if height % side == 0 and width % side == 0:
        return grey.reshape(count, side, height // side, side, width // side).mean(axis=(2, 4))
    resized = [np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX)) for image in grey]
    return np.stack(resized)
