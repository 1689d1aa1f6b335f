"""The audit: exact, near and mirrored twins between parts, copies and contradictions within the data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import ndimage

from dlfer.data import audit
from dlfer.data.audit import audit_bundle, compute_signatures, find_twins, group_copies
from dlfer.data.bundle import DataBundle, Split


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
    monkeypatch.setattr(audit, "_BLOCK", 3)
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


def _bundle() -> DataBundle:
    train = _faces(6)
    train[1], train[2], train[5] = train[0], train[0], 7
    validation = np.stack([train[0], train[3][:, ::-1], _faces(1, seed=9)[0]])
    test = np.stack([validation[2], _faces(1, seed=10)[0]])
    splits = []
    for name, images, targets in (
        ("Training", train, [0, 0, 1, 0, 1, 1]),
        ("PublicTest", validation, [0, 0, 1]),
        ("PrivateTest", test, [1, 0]),
    ):
        ids = np.array([f"{name}/{row}" for row in range(len(targets))])
        splits.append(Split(name, images, np.array(targets), ids))
    return DataBundle("fer2013", ("Happy", "Sad"), *splits)


def test_the_audit_counts_what_was_put_in():
    found = json.loads(json.dumps(audit_bundle(_bundle())))
    assert found["num_images"] == 11
    assert found["splits"]["Training"] == {"num_images": 6, "classes": {"Happy": 3, "Sad": 3}}
    assert found["distinct_images"] == 7
    assert found["duplicate_groups"] == 2
    assert found["conflicting_groups"] == 1
    assert found["constant_images"] == 1
    assert found["leaks"] == {
        "Training->PublicTest": {"exact": 1, "near_or_mirrored": 2},
        "Training->PrivateTest": {"exact": 0, "near_or_mirrored": 0},
        "PublicTest->PrivateTest": {"exact": 1, "near_or_mirrored": 1},
    }


def test_streamed_parts_are_counted_only():
    class Stream:
        name = "train"

        def __len__(self) -> int:
            return 1000

    bundle = _bundle()
    streamed = DataBundle("tfds", ("a", "b"), Stream(), Stream(), None)
    assert audit_bundle(streamed)["num_images"] == 2000
    assert "leaks" not in audit_bundle(streamed)
    mixed = DataBundle("tfds", ("a", "b"), Stream(), bundle.validation, bundle.test)
    assert list(audit_bundle(mixed)["leaks"]) == ["PublicTest->PrivateTest"]
