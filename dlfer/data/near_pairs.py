"""All pairs of vectors that correlate, as they are or after a flip of one, without a look at most of the others.

Nothing is approximate. The signatures are projected on the few directions in which they spread most, the part that is
even under a left-right flip and the odd one apart; the odd coordinates lose their sign, so that an image and its mirror
image fall on one point, and the length of what the projection leaves out is one more coordinate. This brings no two
signatures, nor one and the flipped other, further apart than they are: those that correlate by 0.98 are within 0.2 of
each other. The points are halved by a k-d tree (Bentley 1975, https://doi.org/10.1145/361002.361007) down to small
leaves; a point goes along with a box only while it is within 0.2 of it. What meets in a leaf is compared by matrix
products, of the few coordinates first, and of the whole signatures where these leave it open.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

SIGNATURE_SIDE = 16
NEAR_CORRELATION = 0.98
_LOOSE = NEAR_CORRELATION - 1e-3
"""What the coordinates must correlate by: what is left out is a root, which rounding moves by as much as 3e-4."""
_DOUBT = 2e-5
"""More than rounding moves a product of two signatures by in single precision (256 terms of 6e-8 each)."""
_DIRECTIONS = 32
_LEAF = 64
_BLOCK = 4096
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
        for start in range(0, len(close), _BLOCK):
            chosen = close[start : start + _BLOCK]
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
        alike[doubtful] = _correlate(own[row[doubtful]], signatures[column[doubtful]]) >= NEAR_CORRELATION
        left, right = leaf[row[alike]], chosen[column[alike]]
        if len(left) and within:
            yield np.minimum(left, right), np.maximum(left, right), flipped
        elif len(left):
            yield left, right, flipped


def _correlate(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return float64 [P], the correlations of signatures (float32 [P, 256]) row by row."""
    return (left.astype(np.float64) * right).sum(axis=1)


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
    for start in range(0, len(signatures), _BLOCK):
        rows = slice(start, start + _BLOCK)
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
