"""Any split is disjoint and complete, keeps copies together, and does not depend on the order of rows."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from dlfer.config.sections import DataConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.split import apply_protocol, assign_folds, draw_held_out, draw_indices
from dlfer.errors import DataError

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
            {"protocol": "resplit", "subjects": {"pattern": "([0-9])$"}},
            {"protocol": "cross_validation", "folds": 2, "fold": 1, "num_images": {"train": 60}},
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
    try:
        found = apply_protocol(bundle, config, balance="augment")
    except DataError:
        assume(False)  # images that are all duplicates of each other make no folds
    ids = np.concatenate([part.ids for part in (found.train, found.validation, found.test)]).tolist()
    assert len(ids) == len(set(ids))
    assert {name.split("#")[0] for name in ids} == set(split.ids.tolist()) | set(other.ids.tolist())
    source_target = dict(zip([*split.ids.tolist(), *other.ids.tolist()], [*split.targets] * 2, strict=True))
    for part in (found.train, found.validation, found.test):
        for name, target in zip(part.ids.tolist(), part.targets.tolist(), strict=True):
            assert target == source_target[name.split("#")[0]]


@st.composite
def grouped(draw) -> tuple[Split, np.ndarray]:
    """Draw a split and groups of its rows, of one class each or of several."""
    count = draw(st.integers(2, 80))
    groups = np.array(draw(st.lists(st.integers(0, 60), min_size=count, max_size=count)))
    if draw(st.booleans()):
        targets = groups % 4
    else:
        targets = np.array(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count)))
    images = np.zeros((count, 8, 8, 1), np.uint8)
    return Split("Training", images, targets, np.array([f"Training/{row}" for row in range(count)])), groups


@given(grouped(), st.integers(2, 20), SEEDS, st.randoms(use_true_random=False))
def test_no_group_is_in_two_folds_and_the_order_of_rows_does_not_matter(drawn, folds, seed, random):
    split, groups = drawn
    found = assign_folds(split, folds, seed=seed, groups=groups)
    assert found.shape == (len(split),)
    assert set(found.tolist()) <= set(range(folds))
    assert all(len(np.unique(found[groups == group])) == 1 for group in np.unique(groups))
    assert np.array_equal(found, assign_folds(split, folds, seed=seed, groups=groups))
    order = list(range(len(split)))
    random.shuffle(order)
    turned = assign_folds(split.take(np.array(order)), folds, seed=seed, groups=groups[order])
    assert np.array_equal(turned, found[order])


@given(grouped(), st.integers(2, 20), SEEDS)
def test_folds_differ_in_a_class_by_at_most_its_largest_group(drawn, folds, seed):
    split, groups = drawn
    found = assign_folds(split, folds, seed=seed, groups=groups)
    of_one_class = all(len(np.unique(split.targets[groups == group])) == 1 for group in np.unique(groups))
    for label in np.unique(split.targets):
        rows = split.targets == label
        counts = np.bincount(found[rows], minlength=folds)
        if of_one_class:
            assert np.ptp(counts) <= np.unique(groups[rows], return_counts=True)[1].max()


@given(st.integers(2, 300), st.integers(2, 20), SEEDS)
def test_without_duplicates_folds_differ_by_at_most_one_image_in_each_class_and_in_total(count, folds, seed):
    targets = np.random.default_rng(seed).choice(7, count, p=[0.3, 0.02, 0.1, 0.25, 0.1, 0.1, 0.13])
    images = np.zeros((count, 8, 8, 1), np.uint8)
    split = Split("Training", images, targets, np.array([str(row) for row in range(count)]))
    found = assign_folds(split, folds, seed=seed, groups=np.arange(count))
    assert np.ptp(np.bincount(found, minlength=folds)) <= 1
    for label in np.unique(targets):
        assert np.ptp(np.bincount(found[targets == label], minlength=folds)) <= 1


@given(splits(), st.integers(2, 6), SEEDS)
def test_over_all_folds_each_image_is_judged_once_by_a_model_that_saw_no_copy_of_it(split, folds, seed):
    """What leaks here leaks in every accuracy: no copy of a test image is in train or validation, in any fold."""
    bundle = DataBundle("fer2013", tuple("abcde"), split, None, None)
    judged = []
    for fold in range(folds):
        keys = {"protocol": "cross_validation", "folds": folds, "fold": fold, "num_images": {"train": len(split)}}
        try:
            found = apply_protocol(bundle, DataConfig(source="fer2013", path="x", seed=seed, **keys), balance="none")
        except DataError:
            assume(False)
        values = [set(part.images[:, 0, 0, 0].tolist()) for part in (found.train, found.validation, found.test)]
        assert not (values[0] | values[1]) & values[2]
        assert not values[0] & values[1]
        ids = np.concatenate([part.ids for part in (found.train, found.validation, found.test)])
        assert sorted(ids.tolist()) == sorted(split.ids.tolist())
        assert len(found.test_groups) == len(found.test)
        judged += found.test.ids.tolist()
    assert sorted(judged) == sorted(split.ids.tolist())
