"""Any split is disjoint and complete, keeps copies together, and does not depend on the order of rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.split import apply_protocol, draw_held_out, draw_indices

SEEDS = st.integers(0, 2**31 - 1)


@st.composite
def splits(draw) -> Split:
    """Draw a split of few distinct images, so that most of them have copies, some with other labels."""
    count = draw(st.integers(2, 60))
    values = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    targets = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
    images = np.zeros((count, 8, 8, 1), np.uint8)
    images[:, 0, 0, 0] = values
    return Split("Training", images, np.array(targets), np.array([f"Training/{row}" for row in range(count)]))


def _by_id(split: Split, chosen: np.ndarray) -> set[str]:
    return set(split.ids[chosen].tolist())


@given(splits(), st.floats(0.05, 0.95), SEEDS)
def test_groups_of_copies_stay_on_one_side(split, fraction, seed):
    chosen = draw_held_out(split, fraction, seed=seed, purpose="test")
    values = split.images[:, 0, 0, 0]
    assert not set(values[chosen].tolist()) & set(values[~chosen].tolist())


@given(splits(), st.floats(0.05, 0.95), SEEDS, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(split, fraction, seed, random):
    order = list(range(len(split)))
    random.shuffle(order)
    turned = split.take(np.array(order))
    held = (draw_held_out(part, fraction, seed=seed, purpose="test") for part in (split, turned))
    assert _by_id(split, next(held)) == _by_id(turned, next(held))


@given(splits(), st.integers(1, 70), SEEDS, st.randoms(use_true_random=False))
def test_a_draw_has_its_size_no_row_twice_and_does_not_follow_the_order(split, num, seed, random):
    rows = draw_indices(split.targets, split.ids, num, seed=seed)
    assert len(rows) == len(set(rows.tolist())) == min(num, len(split))
    order = list(range(len(split)))
    random.shuffle(order)
    turned = split.take(np.array(order))
    again = draw_indices(turned.targets, turned.ids, num, seed=seed)
    assert _by_id(split, rows) == _by_id(turned, again)
    exact = np.bincount(split.targets, minlength=5) * min(1, num / len(split))
    if num >= 5:
        found = np.bincount(split.targets[rows], minlength=5)
        assert np.all(found[np.bincount(split.targets, minlength=5) > 0] > 0)
        assert np.all(found >= np.minimum(np.floor(exact) - 4, 1))


@given(st.integers(2, 300), st.floats(0.1, 0.9), SEEDS)
def test_without_copies_each_class_gives_its_share_to_within_one_image(count, fraction, seed):
    targets = np.arange(count) % 3
    images = np.zeros((count, 8, 8, 1), np.uint8)
    split = Split("Training", images, targets, np.array([str(row) for row in range(count)]))
    chosen = draw_held_out(split, fraction, seed=seed, purpose="test", groups=np.arange(count))
    for label in range(3):
        size = int(np.sum(targets == label))
        if size >= 2:
            assert abs(np.sum(chosen & (targets == label)) - fraction * size) <= 1
            assert 0 < np.sum(chosen & (targets == label)) < size


@given(
    splits(),
    SEEDS,
    st.sampled_from(
        [
            {"protocol": "resplit"},
            {"select_on": 0.3},
            {"protocol": "paper", "split": "official_80_20"},
            {"protocol": "paper", "split": "after_balance"},
        ]
    ),
)
def test_the_parts_of_every_protocol_are_disjoint_and_complete(split, seed, keys):
    other = Split("PublicTest", split.images, split.targets, np.char.replace(split.ids, "Training", "PublicTest"))
    bundle = DataBundle("fer2013", tuple("abcde"), split, other, None)
    config = DataConfig(source="fer2013", path="x", seed=seed, **keys)
    found = apply_protocol(bundle, config, balance="augment")
    ids = np.concatenate([part.ids for part in (found.train, found.validation, found.test)]).tolist()
    assert len(ids) == len(set(ids))
    assert {name.split("#")[0] for name in ids} == set(split.ids.tolist()) | set(other.ids.tolist())
    source_target = dict(zip([*split.ids.tolist(), *other.ids.tolist()], [*split.targets] * 2, strict=True))
    for part in (found.train, found.validation, found.test):
        for name, target in zip(part.ids.tolist(), part.targets.tolist(), strict=True):
            assert target == source_target[name.split("#")[0]]
