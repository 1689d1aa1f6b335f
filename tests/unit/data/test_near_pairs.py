"""The search for near pairs: how much it looks at and holds; what it finds is held against all pairs by a property."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dlfer.data import duplicates as near_pairs
from dlfer.data.duplicates import flip_signatures, iterate_pairs


def draw_signatures(count: int, seed: int = 0, smooth: float = 3.0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(count, 16, 16))
    images = (
        ndimage.gaussian_filter(noise, (0, smooth, smooth)).reshape(count, 256) if smooth else noise.reshape(-1, 256)
    )
    images = images - images.mean(axis=1, keepdims=True)
    return (images / np.linalg.norm(images, axis=1, keepdims=True)).astype(np.float32)


def count_compared(signatures: np.ndarray) -> int:
    directions = near_pairs._find_directions(signatures)
    points = near_pairs._project(signatures, directions)
    return sum(len(leaf) * len(close) for leaf, close in near_pairs._iterate_leaves(points, None))


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 3), (3, 0)])
def test_none_have_no_pairs(left, right):
    signatures = draw_signatures(3)
    assert list(iterate_pairs(signatures[:left], signatures[:right])) == []
    assert list(iterate_pairs(signatures[:left])) == []


def test_one_image_is_no_pair_with_itself_and_one_with_the_same_query():
    one = draw_signatures(1)
    assert list(iterate_pairs(one)) == []
    ((left, right, mirrored),) = iterate_pairs(one, one)
    assert (left.tolist(), right.tolist(), mirrored) == ([0], [0], False)


def test_a_symmetric_image_and_its_copy_are_near_and_mirrored():
    one = draw_signatures(1) + flip_signatures(draw_signatures(1))
    one /= np.linalg.norm(one)
    found = [(left.tolist(), right.tolist(), kind) for left, right, kind in iterate_pairs(np.concatenate([one, one]))]
    assert found == [([0], [1], False), ([0], [1], True)]


def test_mirroring_is_a_flip_of_left_and_right():
    signatures = draw_signatures(4)
    images = signatures.reshape(4, 16, 16)
    assert (flip_signatures(signatures).reshape(4, 16, 16) == images[:, :, ::-1]).all()


def test_points_bring_no_two_further_apart_than_they_are():
    signatures = draw_signatures(300)
    points = near_pairs._project(signatures, near_pairs._find_directions(signatures))
    correlations = np.maximum(signatures @ signatures.T, signatures @ flip_signatures(signatures).T)
    assert (points @ points.T >= correlations - 1e-6).all()
    assert np.linalg.norm(points, axis=1) == pytest.approx(1, abs=1e-5)


def test_rows_are_leaves_once_and_meet_all_that_is_near():
    points = np.random.default_rng(0).uniform(0, 0.5, (700, 3)).astype(np.float32)
    met = np.zeros((700, 700), int)
    leaves = []
    for leaf, close in near_pairs._iterate_leaves(points, None):
        met[np.ix_(leaf, close)] += 1
        leaves.append(leaf)
    assert sorted(np.concatenate(leaves).tolist()) == list(range(700))
    near = np.linalg.norm(points[:, None] - points, axis=2) <= 0.2
    assert ((met + met.T) >= near).all()
    assert met.max() == 1
    assert met.sum() < 700 * 700 * 0.6


def test_few_pairs_are_looked_at_and_a_smaller_share_of_more():
    shares = [count_compared(draw_signatures(count)) / count**2 for count in (500, 2000, 8000)]
    assert shares[2] < 0.1
    assert shares[1] < 0.75 * shares[0]
    assert shares[2] < 0.75 * shares[1]


def test_images_that_are_all_alike_come_in_blocks(monkeypatch):
    monkeypatch.setattr(near_pairs, "_PAIR_BLOCK", 50)
    frames = np.repeat(draw_signatures(1), 700, axis=0)
    sizes = [len(left) for left, _, mirrored in iterate_pairs(frames) if not mirrored]
    assert sum(sizes) == 700 * 699 // 2
    assert max(sizes) <= near_pairs._LEAF * 50
