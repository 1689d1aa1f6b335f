"""Duplicates: exact, near, flipped and augmented; their groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dlfer.data import duplicates
from dlfer.data import duplicates as near_pairs
from dlfer.data.duplicates import (
    Components,
    compute_signatures,
    find_copies_by_id,
    find_duplicates,
    flip_signatures,
    group_duplicates,
    iterate_pairs,
    number_sources,
)


def _faces(count: int, seed: int = 0, side: int = 48, channels: int = 1) -> np.ndarray:
    """Return smooth images that differ clearly from one another."""
    noise = np.random.default_rng(seed).normal(size=(count, side, side, channels))
    smooth = ndimage.gaussian_filter(noise, (0, side / 16, side / 16, 0))
    return np.clip(128 + 45 * smooth / smooth.std(axis=(1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("side", "channels"), [(48, 1), (64, 3), (50, 1)])
def test_exact_near_and_flipped_copies_are_duplicates_and_shifted_ones_are_not(side, channels):
    references = _faces(30, side=side, channels=channels)
    images = _faces(6, seed=1, side=side, channels=channels)
    images[0] = references[3]
    images[1] = np.clip(references[4] * 0.8 + 12, 0, 255)
    images[2] = references[5][:, ::-1]
    images[3] = np.clip(references[6][:, ::-1].astype(int) + 3, 0, 255)
    images[4] = np.roll(references[7], side // 4, axis=0)
    found = find_duplicates(images, references)
    assert found.exact.tolist() == [True, False, False, False, False, False]
    assert found.any.tolist() == [True, True, True, True, False, False]
    assert found.count() == {"exact": 1, "augmented": 0, "any": 4}


def test_flat_images_are_no_near_duplicates_but_may_be_exact_ones():
    ramp = np.tile(np.linspace(100, 110, 48), (48, 1)).astype(np.uint8)[None, ..., None]
    assert ramp.std() < 8
    assert not find_duplicates(ramp, ramp + 1).any.any()
    steep = np.rint((ramp.astype(float) - 105) * 4 + 105).astype(np.uint8)
    assert steep.std() > 8
    for image, reference in ((ramp, steep), (steep, ramp)):  # one flat image is enough
        assert not find_duplicates(image, reference).any.any()
    assert find_duplicates(steep, steep + 1).any.all()
    found = find_duplicates(ramp, ramp)
    assert found.exact.all()
    assert found.any.all()


def test_the_threshold_is_a_correlation_of_block_means():
    reference, image = _faces(1, seed=3), _faces(1, seed=4)
    seen = set()
    for share in np.linspace(0, 0.5, 26):
        mixed = np.rint((1 - share) * reference + share * image).astype(np.uint8)
        small = [
            pixels[0, ..., 0].astype(float).reshape(16, 3, 16, 3).mean(axis=(1, 3)) for pixels in (reference, mixed)
        ]
        expected = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] >= 0.98
        assert find_duplicates(mixed, reference).any[0] == expected
        seen.add(bool(expected))
    assert seen == {True, False}


def test_blocks_do_not_change_the_answer(monkeypatch):
    references = _faces(40)
    images = np.concatenate([_faces(5, seed=1), references[[7, 31]][:, :, ::-1], references[39:]])
    whole = find_duplicates(images, references)
    monkeypatch.setattr(duplicates, "_BLOCK", 3)
    monkeypatch.setattr(near_pairs, "_BLOCK", 7)
    monkeypatch.setattr(near_pairs, "_LEAF", 2)
    parts = find_duplicates(images, references)
    assert whole.any.tolist() == parts.any.tolist() == [False] * 5 + [True] * 3
    assert whole.exact.tolist() == parts.exact.tolist() == [False] * 7 + [True]


def test_images_of_other_sizes_and_none_at_all_have_no_duplicates():
    for first, second in ((_faces(2), _faces(2, side=64)), (_faces(2), _faces(2)[:0]), (_faces(2)[:0], _faces(2))):
        found = find_duplicates(first, second)
        assert len(found.exact) == len(first)
        assert found.count() == {"exact": 0, "augmented": 0, "any": 0}


def test_signatures_are_of_unit_norm_and_without_mean():
    images = np.concatenate([_faces(3), np.full((1, 48, 48, 1), 9, np.uint8)])
    signatures, textured = compute_signatures(images)
    assert textured.tolist() == [True, True, True, False]
    assert np.linalg.norm(signatures, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-5)
    assert signatures.mean(axis=1) == pytest.approx(0, abs=1e-6)


def test_groups_are_chains_of_duplicates(monkeypatch):
    base = _faces(4)
    brighter = np.clip(base[0].astype(int) * 0.8 + 20, 0, 255).astype(np.uint8)
    images = np.stack([base[0], base[1], base[0], brighter, base[1][:, ::-1], base[2], brighter[:, ::-1], base[3]])
    expected = [{0, 2, 3, 6}, {1, 4}, {5}, {7}]
    for block, leaf, most_edges in ((1024, 64, 10**6), (2, 3, 10**6), (3, 1, 0)):
        monkeypatch.setattr(duplicates, "_BLOCK", block)
        monkeypatch.setattr(near_pairs, "_BLOCK", block)
        monkeypatch.setattr(near_pairs, "_LEAF", leaf)
        monkeypatch.setattr(duplicates, "_MAX_EDGES", most_edges)
        groups = group_duplicates(images)
        assert [set(np.flatnonzero(groups == groups[row]).tolist()) for row in (0, 1, 5, 7)] == expected


def test_copies_of_one_source_are_one_group():
    images = _faces(5)
    groups = group_duplicates(images, np.array(["a", "b", "a#1", "c#12", "a#2"]))
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups.tolist())) == 3
    assert len(set(group_duplicates(images).tolist())) == 5


def test_one_image_and_none_are_groups_too():
    assert group_duplicates(_faces(1)).tolist() == [0]
    assert group_duplicates(_faces(1)[:0]).tolist() == []


def test_copies_are_found_by_their_ids():
    train = np.array(["a", "b#1", "b#2", "d#1#1", "0.png", "im#1.png"])
    test = np.array(["a#1", "b", "c", "d", "0.png", "im#2.png"])
    # "0.png" is in both parts, but neither is a copy: two parts may have the same names.
    assert find_copies_by_id(test, train).tolist() == [True, True, False, True, False, False]


def test_an_edge_that_comes_256_times_is_one_edge():
    components = Components(3)
    components.join(np.zeros(256, np.int64), np.ones(256, np.int64))
    assert len(set(components.compute_groups().tolist())) == 2


def test_components_of_a_graph_are_the_same_however_they_come(monkeypatch):
    edges = np.tile(np.random.default_rng(0).integers(0, 60, (40, 2)), (4, 1))
    whole = Components(60)
    whole.join(edges[:, 0], edges[:, 1])
    monkeypatch.setattr(duplicates, "_MAX_EDGES", 0)
    parts = Components(60)
    for left, right in edges:
        parts.join(np.array([left]), np.array([right]))
    first, second = whole.compute_groups(), parts.compute_groups()
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(set(first.tolist())) > 10
    assert len(set(second.tolist())) == len(set(first.tolist()))


def test_an_id_that_recurs_without_a_copy_is_two_sources():
    numbers = number_sources(np.array(["0.png", "1.png", "0.png", "1.png", "1.png#3"]))
    assert numbers[1] == numbers[3] == numbers[4]
    assert len({numbers[0], numbers[1], numbers[2]}) == 3


def test_groups_run_through_arrays_of_different_shapes():
    small, large = _faces(3), _faces(2, seed=7, side=96)
    large[1] = small[0].repeat(2, axis=0).repeat(2, axis=1)
    groups = group_duplicates([small, large], np.array(["a", "b", "c", "c#1", "d"]))
    assert groups[0] == groups[4]
    assert groups[2] == groups[3]
    assert len(set(groups.tolist())) == 3


def test_either_of_two_is_their_union():
    images = _faces(4)
    first, second = (find_duplicates(images, images[row : row + 1][:, :, ::-1]) for row in (1, 3))
    assert (first | second).any.tolist() == [False, True, False, True]
    assert (first | second).count() == {"exact": 0, "augmented": 0, "any": 2}


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
