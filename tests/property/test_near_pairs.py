"""The search for near pairs against all pairs in double precision, at the threshold too, and on what a tree is bad at."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlfer.data import duplicates as near_pairs
from dlfer.data.duplicates import flip_signatures, iterate_pairs

CORRELATIONS = [0.9, 0.97, 0.98 - 1e-3, 0.98 - 1e-6, 0.98 - 3e-8, 0.98, 0.98 + 3e-8, 0.98 + 1e-6, 0.98 + 1e-3, 1.0]


def draw_units(count: int, rng: np.random.Generator, *, decay: float, kind: str = "both") -> np.ndarray:
    """Return float64 [N, 256] of unit norm, whose spread falls from cosine to cosine: 0 none, 2 as fast as of faces."""
    place = (np.arange(16) + 0.5) * np.pi / 16
    waves = np.cos(np.arange(16)[:, None] * place)
    weights = (1.0 + np.arange(16)[:, None] + np.arange(16)) ** -decay
    weights[0, 0] = 0
    weights[:, 1::2] *= kind != "even"  # every other cosine is odd under a left-right flip
    weights[:, ::2] *= kind != "odd"
    vectors = (waves.T @ (rng.normal(size=(count, 16, 16)) * weights) @ waves).reshape(count, 256)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def plant(units: np.ndarray, plants: list[tuple[float, bool, float]], rng: np.random.Generator) -> np.ndarray:
    """Return `units` and for each plant one more that correlates so with one of them, perhaps flipped: float32."""
    rows = [units]
    for correlation, flipped, decay in plants:
        source, other = units[rng.integers(len(units))], draw_units(1, rng, decay=decay)[0]
        apart = other - (other @ source) * source
        apart /= np.linalg.norm(apart)
        near = correlation * source + np.sqrt(1 - correlation**2) * apart
        rows.append((near.reshape(16, 16)[:, ::-1].reshape(256) if flipped else near)[None])
    return np.concatenate(rows)[rng.permutation(sum(map(len, rows)))].astype(np.float32)


def collect(pool: np.ndarray, queries: np.ndarray | None = None) -> list[tuple[int, int, bool]]:
    found = iterate_pairs(pool, queries)
    return sorted(
        (int(a), int(b), mirrored) for left, right, mirrored in found for a, b in zip(left, right, strict=True)
    )


def compare_all(pool: np.ndarray, queries: np.ndarray | None = None) -> list[tuple[int, int, bool]]:
    """Return what `collect` is to return, from all correlations in double precision."""
    pairs = []
    for mirrored in (False, True):
        others = (pool if queries is None else queries).astype(np.float64).reshape(-1, 16, 16)
        alike = pool.astype(np.float64) @ (others[:, :, ::-1] if mirrored else others).reshape(-1, 256).T >= 0.98
        rows, columns = np.nonzero(np.triu(alike, 1) if queries is None else alike)
        pairs += [(int(a), int(b), mirrored) for a, b in zip(rows, columns, strict=True)]
    return sorted(pairs)


plants = st.lists(
    st.tuples(st.sampled_from(CORRELATIONS), st.booleans(), st.sampled_from([0.0, 1.0, 2.0])), max_size=40
)
decays = st.sampled_from([0.0, 0.5, 1.0, 2.0])
kinds = st.sampled_from(["both", "even", "odd"])
leaves = st.sampled_from([(1, 3), (2, 5), (8, 4096), (64, 4096)])


@pytest.mark.slow
@settings(max_examples=120)
@given(st.integers(0, 2**32 - 1), st.integers(1, 120), plants, decays, kinds, leaves, st.booleans())
def test_pairs_are_those_of_all_pairs(seed, count, planted, decay, kind, sizes, apart):
    rng = np.random.default_rng(seed)
    signatures = plant(draw_units(count, rng, decay=decay, kind=kind), planted, rng)
    pool, queries = (signatures[::2], signatures[1::2]) if apart else (signatures, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_pairs, "_LEAF", sizes[0])
        patch.setattr(near_pairs, "_BLOCK", sizes[1])
        assert collect(pool, queries) == compare_all(pool, queries)


@pytest.mark.slow
@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0, 0.4), st.sampled_from([1, 7, 64]), st.booleans())
def test_images_that_are_all_alike_are_compared_in_full(seed, noise, leaf, faded):
    rng = np.random.default_rng(seed)
    frames = draw_units(1, rng, decay=1.0) + noise * draw_units(90, rng, decay=0.5)
    frames /= np.linalg.norm(frames, axis=1, keepdims=True)
    frames[:: 9 if faded else 90] = 0  # textured in full size, and flat at 16x16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_pairs, "_LEAF", leaf)
        assert collect(frames.astype(np.float32)) == compare_all(frames.astype(np.float32))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("block", [1, 2, 4096])
def test_a_correlation_at_the_threshold_is_decided_alike_wherever_it_stands(monkeypatch, flipped, block):
    # The floats next to 0.98 are 0.98 + 1.9e-8 and 0.98 - 4.1e-8.
    above, below = np.float32(0.98), np.nextafter(np.float32(0.98), np.float32(0))
    assert float(below) < 0.98 <= float(above)
    rng = np.random.default_rng(0)
    rows = draw_units(100, rng, decay=0.0).astype(np.float32)
    rows[:3] = 0
    rows[:3, 5] = 1, above, below
    rows[1, 200], rows[2, 200] = (np.sqrt(1 - float(value) ** 2) for value in (above, below))
    if flipped:
        rows[0] = flip_signatures(rows[:1])[0]
    monkeypatch.setattr(near_pairs, "_BLOCK", block)
    for _ in range(5):
        order = rng.permutation(len(rows))
        back = np.argsort(order)
        expected = {(frozenset((back[0], back[1])), flipped), (frozenset((back[1], back[2])), False)}
        assert {(frozenset((a, b)), mirrored) for a, b, mirrored in collect(rows[order])} == expected
