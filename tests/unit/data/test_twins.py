"""Twins: exact, near, mirrored and of one source; their groups."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from dlfer.data import near_pairs, twins
from dlfer.data.twins import Components, compute_signatures, find_copies, find_twins, group_copies, group_twins


def _faces(count: int, seed: int = 0, side: int = 48, channels: int = 1) -> np.ndarray:
    """Return smooth images that differ clearly from one another."""
    noise = np.random.default_rng(seed).normal(size=(count, side, side, channels))
    smooth = ndimage.gaussian_filter(noise, (0, side / 16, side / 16, 0))
    return np.clip(128 + 45 * smooth / smooth.std(axis=(1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("side", "channels"), [(48, 1), (64, 3), (50, 1)])
def test_exact_near_and_mirrored_copies_are_told_apart(side, channels):
    references = _faces(30, side=side, channels=channels)
    images = _faces(6, seed=1, side=side, channels=channels)
    images[0] = references[3]
    images[1] = np.clip(references[4] * 0.8 + 12, 0, 255)
    images[2] = references[5][:, ::-1]
    images[3] = np.clip(references[6][:, ::-1].astype(int) + 3, 0, 255)
    images[4] = np.roll(references[7], side // 4, axis=0)
    exact, near = find_twins(images, references)
    assert exact.tolist() == [True, False, False, False, False, False]
    assert near.tolist() == [True, True, True, True, False, False]


def test_flat_images_are_no_near_twins_but_may_be_exact_ones():
    ramp = np.tile(np.linspace(100, 110, 48), (48, 1)).astype(np.uint8)[None, ..., None]
    assert ramp.std() < 8
    exact, near = find_twins(ramp, ramp + 1)
    assert not exact.any()
    assert not near.any()
    steep = np.rint((ramp.astype(float) - 105) * 4 + 105).astype(np.uint8)
    assert steep.std() > 8
    for image, reference in ((ramp, steep), (steep, ramp)):  # one flat image is enough
        assert not find_twins(image, reference)[1].any()
    assert find_twins(steep, steep + 1)[1].all()
    exact, near = find_twins(ramp, ramp)
    assert exact.all()
    assert near.all()


def test_the_threshold_is_a_correlation_of_block_means():
    reference, image = _faces(1, seed=3), _faces(1, seed=4)
    seen = set()
    for share in np.linspace(0, 0.5, 26):
        mixed = np.rint((1 - share) * reference + share * image).astype(np.uint8)
        small = [
            pixels[0, ..., 0].astype(float).reshape(16, 3, 16, 3).mean(axis=(1, 3)) for pixels in (reference, mixed)
        ]
        expected = np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] >= 0.98
        assert find_twins(mixed, reference)[1][0] == expected
        seen.add(bool(expected))
    assert seen == {True, False}


def test_blocks_do_not_change_the_answer(monkeypatch):
    references = _faces(40)
    images = np.concatenate([_faces(5, seed=1), references[[7, 31]][:, :, ::-1], references[39:]])
    whole = find_twins(images, references)
    monkeypatch.setattr(twins, "_BLOCK", 3)
    monkeypatch.setattr(near_pairs, "_BLOCK", 7)
    monkeypatch.setattr(near_pairs, "_LEAF", 2)
    parts = find_twins(images, references)
    assert whole[1].tolist() == [False] * 5 + [True] * 3
    assert [found.tolist() for found in whole] == [found.tolist() for found in parts]


def test_images_of_other_sizes_and_none_at_all_have_no_twins():
    for first, second in ((_faces(2), _faces(2, side=64)), (_faces(2), _faces(2)[:0]), (_faces(2)[:0], _faces(2))):
        exact, near = find_twins(first, second)
        assert len(exact) == len(first)
        assert not exact.any()
        assert not near.any()


def test_signatures_are_of_unit_norm_and_without_mean():
    images = np.concatenate([_faces(3), np.full((1, 48, 48, 1), 9, np.uint8)])
    signatures, textured = compute_signatures(images)
    assert textured.tolist() == [True, True, True, False]
    assert np.linalg.norm(signatures, axis=1) == pytest.approx([1, 1, 1, 0], abs=1e-5)
    assert signatures.mean(axis=1) == pytest.approx(0, abs=1e-6)


def test_copies_are_grouped():
    images = _faces(5)[[0, 1, 0, 2, 1, 0]]
    groups = group_copies(images)
    assert [groups.tolist().count(group) for group in groups] == [3, 2, 3, 1, 2, 3]
    assert groups[0] == groups[2] == groups[5]


def test_groups_are_chains_of_twins(monkeypatch):
    base = _faces(4)
    brighter = np.clip(base[0].astype(int) * 0.8 + 20, 0, 255).astype(np.uint8)
    images = np.stack([base[0], base[1], base[0], brighter, base[1][:, ::-1], base[2], brighter[:, ::-1], base[3]])
    expected = [{0, 2, 3, 6}, {1, 4}, {5}, {7}]
    for block, leaf, most_edges in ((1024, 64, 10**6), (2, 3, 10**6), (3, 1, 0)):
        monkeypatch.setattr(twins, "_BLOCK", block)
        monkeypatch.setattr(near_pairs, "_BLOCK", block)
        monkeypatch.setattr(near_pairs, "_LEAF", leaf)
        monkeypatch.setattr(twins, "_MOST_EDGES", most_edges)
        groups = group_twins(images)
        assert [set(np.flatnonzero(groups == groups[row]).tolist()) for row in (0, 1, 5, 7)] == expected


def test_copies_of_one_source_are_one_group():
    images = _faces(5)
    groups = group_twins(images, np.array(["a", "b", "a#1", "c#12", "a#2"]))
    assert groups[0] == groups[2] == groups[4]
    assert len(set(groups.tolist())) == 3
    assert len(set(group_twins(images).tolist())) == 5


def test_one_image_and_none_are_groups_too():
    assert group_twins(_faces(1)).tolist() == [0]
    assert group_twins(_faces(1)[:0]).tolist() == []


def test_copies_are_found_by_their_ids():
    train = np.array(["a", "b#1", "b#2", "d#1#1", "0.png", "im#1.png"])
    test = np.array(["a#1", "b", "c", "d", "0.png", "im#2.png"])
    # "0.png" is in both parts, but neither is a copy: two parts may have the same names.
    assert find_copies(test, train).tolist() == [True, True, False, True, False, False]


def test_an_edge_that_comes_256_times_is_one_edge():
    components = Components(3)
    components.join(np.zeros(256, np.int64), np.ones(256, np.int64))
    assert len(set(components.compute_groups().tolist())) == 2


def test_components_of_a_graph_are_the_same_however_they_come(monkeypatch):
    edges = np.tile(np.random.default_rng(0).integers(0, 60, (40, 2)), (4, 1))
    whole = Components(60)
    whole.join(edges[:, 0], edges[:, 1])
    monkeypatch.setattr(twins, "_MOST_EDGES", 0)
    parts = Components(60)
    for left, right in edges:
        parts.join(np.array([left]), np.array([right]))
    first, second = whole.compute_groups(), parts.compute_groups()
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(set(first.tolist())) > 10
    assert len(set(second.tolist())) == len(set(first.tolist()))
