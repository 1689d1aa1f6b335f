"""The duplicate finder against brute force, on duplicates that were planted."""

from __future__ import annotations

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from dlfer.data.bundle import Split
from dlfer.data.duplicates import find_duplicates, group_duplicates
from dlfer.data.survey import survey_images


def draw_face(seed: int, side: int) -> np.ndarray:
    """Return a smooth image, uint8 [side, side, 1], unlike those of other seeds."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), side / 16)
    return np.clip(128 + 45 * noise / noise.std(), 0, 255).astype(np.uint8)[..., None]


def encode_again(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))[..., None]


PLANTS = {
    "exact": lambda image: image,
    "contrast": lambda image: np.clip(image * 0.7 + 30, 0, 255).astype(np.uint8),
    "flipped": lambda image: image[:, ::-1],
    "jpeg": lambda image: encode_again(image, 75),
    "flipped_jpeg": lambda image: encode_again(np.ascontiguousarray(image[:, ::-1]), 60),
    "shifted": lambda image: np.roll(image, 2, axis=1),
    "flat": lambda image: np.full_like(image, 7),
    "faint": lambda image: (image // 16 + 100).astype(np.uint8),
    "new": lambda image: 255 - image,
}


IDS = ["0.png", "1.png", "0.png#1", "0.png#2", "1.png#1#1", "2.png"]


def is_duplicate(first: np.ndarray, second: np.ndarray) -> bool:
    """Say it as the definition does, one pair at a time, in double precision."""
    if first.shape == second.shape and (first == second).all():
        return True
    if first.std() < 8 or second.std() < 8:
        return False
    small = []
    for image in (first, second, second[:, ::-1]):
        step = image.shape[0] // 16
        small.append(
            [
                image[y : y + step, x : x + step].mean()
                for y in range(0, 16 * step, step)
                for x in range(0, 16 * step, step)
            ]
        )
    return max(np.corrcoef(small[0], small[1])[0, 1], np.corrcoef(small[0], small[2])[0, 1]) >= 0.98


planted = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(sorted(PLANTS))), min_size=1, max_size=9)


@settings(max_examples=25)
@given(planted, planted, st.sampled_from([32, 48]))
def test_duplicates_are_those_of_brute_force(first, second, side):
    left, right = (np.stack([PLANTS[kind](draw_face(seed, side)) for seed, kind in rows]) for rows in (first, second))
    found = find_duplicates(right, left)
    assert found.exact.tolist() == [any((image == other).all() for other in left) for image in right]
    assert found.any.tolist() == [any(is_duplicate(image, other) for other in left) for image in right]
    assert (found.any | ~found.exact).all()


@settings(max_examples=25)
@given(planted, st.sampled_from([32, 48]), st.randoms(use_true_random=False))
def test_groups_are_the_components_of_brute_force(rows, side, random):
    images = np.stack([PLANTS[kind](draw_face(seed, side)) for seed, kind in rows])
    groups = {row: {row} for row in range(len(images))}
    for a in range(len(images)):
        for b in range(a):
            if is_duplicate(images[a], images[b]):
                merged = groups[a] | groups[b]
                for row in merged:
                    groups[row] = merged
    order = list(range(len(images)))
    random.shuffle(order)
    found = group_duplicates(images[order])
    for place, row in enumerate(order):
        assert {order[other] for other in np.flatnonzero(found == found[place])} == groups[row]


named = st.tuples(st.integers(0, 2), st.sampled_from(["exact", "contrast", "flipped", "new"]), st.sampled_from(IDS))


@settings(max_examples=25)
@given(st.lists(st.lists(named, min_size=1, max_size=5, unique_by=lambda row: row[2]), min_size=2, max_size=3))
def test_the_audit_counts_by_the_same_relation(parts):
    """Ids may recur among splits, as those of two folders with a "0.png" each, and may be those of augmented copies."""
    splits = []
    for number, rows in enumerate(parts):
        images = np.stack([PLANTS[kind](draw_face(seed, 32)) for seed, kind, _ in rows])
        ids = np.array([name for _, _, name in rows])
        splits.append(Split(str(number), images, np.zeros(len(rows), np.int64), ids))
    survey = survey_images(splits)
    for left in range(len(splits)):
        for right in range(len(splits)):
            reference, split = splits[left], splits[right]
            if left == right:
                continue
            expected = find_duplicates(split.images, reference.images, ids=split.ids, reference_ids=reference.ids)
            found = survey.find_duplicates(left, right)
            for kind in ("exact", "augmented", "any"):
                assert getattr(found, kind).tolist() == getattr(expected, kind).tolist(), kind


def test_the_planted_duplicates_are_what_their_names_say():
    image = draw_face(0, 48)
    found = {kind for kind, plant in PLANTS.items() if is_duplicate(plant(image), image)}
    assert found >= {"exact", "contrast", "flipped", "jpeg", "flipped_jpeg"}
    assert found.isdisjoint({"flat", "faint", "new"})
