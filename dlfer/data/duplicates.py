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

Near duplicates are all pairs of signatures that correlate, as they are or after a flip of one, found without comparing
most of the others. Nothing is approximate. The signatures are projected on the few directions in which they spread most, the part that is
even under a left-right flip and the odd one apart; the odd coordinates lose their sign, so that an image and its mirror
image fall on one point, and the length of what the projection leaves out is one more coordinate. This brings no two
signatures, nor one and the flipped other, further apart than they are: those that correlate by 0.98 are within 0.2 of
each other. The points are halved by a k-d tree (Bentley 1975, https://doi.org/10.1145/361002.361007) down to small
leaves; a point goes along with a box only while it is within 0.2 of it. What meets in a leaf is compared by matrix
products, of the few coordinates first, and of the whole signatures where these leave it open.
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
"""What the coordinates must correlate by: what is left out is a root, which rounding moves by as much as 3e-4."""
_DOUBT = 2e-5
"""More than rounding moves a product of two signatures by in single precision (256 terms of 6e-8 each)."""
_DIRECTIONS = 32
_LEAF = 64
_PAIR_BLOCK = 4096
_SAMPLE = 16384
"""Points of a leaf and points compared with it at a time; signatures that the directions are drawn from."""


def iterate_pairs(pool: np.ndarray, queries: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield all pairs of signatures that correlate by at least 0.98, as they are or after a flip of one.

    A correlation that single precision leaves in doubt is computed again in double precision, pair by
    pair, so that blocks and neighbours do not change the answer.

    Args:
        pool: float32 [N, 256], of unit norm or zero, as `dlfer.data.duplicates.compute_signatures` returns them.
        queries: float32 [M, 256], that are compared with the pool; None: the pool with itself.

    Yields:
        left: int64 [P], rows of the pool, and
        right: int64 [P], rows of the queries; without queries left < right, and no pair comes twice, but once
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
    """Return the signatures (float32 [N, 256]) of the images flipped left to right."""
    side = SIGNATURE_SIDE
    return np.ascontiguousarray(signatures.reshape(-1, side, side)[:, :, ::-1]).reshape(-1, side * side)


def _compare(
    pool: np.ndarray, leaf: np.ndarray, others: np.ndarray, chosen: np.ndarray, *, within: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield the pairs of pool[leaf] and others[chosen]; of one pool, those of two in the leaf only as left < right."""
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
    """Return float32 [N, 128] twice, orthonormal coordinates that a flip does not change, and whose sign it changes."""
    images = signatures.reshape(-1, SIGNATURE_SIDE, SIGNATURE_SIDE)
    half = SIGNATURE_SIDE // 2
    left, right = images[:, :, :half], images[:, :, : half - 1 : -1]
    scale = np.float32(np.sqrt(0.5))
    return ((left + right) * scale).reshape(len(images), -1), ((left - right) * scale).reshape(len(images), -1)


def _find_directions(signatures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 [128, E] and [128, O], the even and odd principal directions that spread most, E + O = 32."""
    step = -(-len(signatures) // _SAMPLE)
    even, odd = _split_halves(signatures[::step])
    even = even - even.mean(axis=0)  # the flipped images are as many as the others, so that the odd mean is zero
    spreads, directions = zip(*(np.linalg.eigh(half.T @ half) for half in (even, odd)), strict=True)
    least = np.sort(np.concatenate(spreads))[-_DIRECTIONS]
    even_count = min(int((spreads[0] >= least).sum()), _DIRECTIONS)
    odd_count = _DIRECTIONS - even_count
    return directions[0][:, len(even.T) - even_count :], directions[1][:, len(odd.T) - odd_count :]


def _project(signatures: np.ndarray, directions: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return float32 [N, 33], points whose products are no less than the correlations, flipped or not."""
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
    """Yield small boxes of points with all that can be near one of them.

    Args:
        points: float32 [N, D], of norm 1 at most.
        queries: float32 [M, D]; None: the points themselves, and what has met in one leaf does not meet in a later one.

    Yields:
        leaf: int64 [1 to 64], rows of the points, in order; each row comes in one leaf.
        close: int64 [C], rows of the queries, in order; without queries those of the leaf among them.
    """
    columns = np.ascontiguousarray(points.T)
    query_columns = columns if queries is None else np.ascontiguousarray(queries.T)
    done = None if queries is not None else np.zeros(len(points), bool)
    reach = np.float32(2 * (1 - _LOOSE))  # the squared distance of unit vectors that correlate so
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
    """Return float32 [N], squared distances of coordinates from an interval."""
    return np.square(np.maximum(np.maximum(bounds[0] - coordinates, coordinates - bounds[1]), 0))


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


def shorten_digests(digests: np.ndarray) -> np.ndarray:
    """Return the first 64 bits of each digest of `hash_images`, bytes [N] of 16 hexadecimal digits, as shipped models keep them."""
    return digests.astype("S16")


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
