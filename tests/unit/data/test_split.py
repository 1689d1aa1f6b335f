"""Protocols: what trains, selects and judges, and what each forbids."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from dlfer.config.sections import DataConfig, SubjectsConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.duplicates import find_duplicates
from dlfer.data.split import apply_protocol, draw_fraction, draw_indices, draw_subset, drop_duplicates, find_subjects
from dlfer.errors import DataError, ProtocolError

CLASSES = 4


def _split(name: str, count: int, *, seed: int = 0, copies: int = 0) -> Split:
    """Return `count` images of four unequal classes; the last `copies` repeat the first ones."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    targets = np.minimum(rng.geometric(0.5, count) - 1, CLASSES - 1)
    if copies:
        images[-copies:], targets[-copies:] = images[:copies], targets[:copies]
    return Split(name, images, targets, np.array([f"{name}/{row}" for row in range(count)]))


def _bundle(*, copies: int = 0, parts: tuple[str, ...] = ("train", "validation", "test")) -> DataBundle:
    splits = {
        "train": _split("Training", 400, seed=1, copies=copies),
        "validation": _split("PublicTest", 80, seed=2),
        "test": _split("PrivateTest", 80, seed=3),
    }
    if copies:  # and some of them across the splits
        splits["validation"].images[:10] = splits["train"].images[:10]
    kept = {part: split if part in parts else None for part, split in splits.items()}
    return DataBundle("fer2013", tuple("abcd"), **kept)


def _apply(bundle: DataBundle, balance: str = "none", **keys) -> DataBundle:
    return apply_protocol(bundle, DataConfig(source="fer2013", path="x", **keys), balance=balance)


def _ids(*splits: Split) -> set[str]:
    return {name for split in splits for name in split.ids.tolist()}


def _pixels(*splits: Split) -> set[bytes]:
    return {image.tobytes() for split in splits for image in split.images}


def test_official_keeps_the_parts_of_the_source():
    bundle = _bundle()
    found = _apply(bundle)
    assert (found.train, found.validation, found.test) == (bundle.train, bundle.validation, bundle.test)
    assert (found.protocol, found.selected_on) == ("official", "PublicTest")


def test_select_on_makes_the_validation_part_a_true_test():
    bundle = _bundle(copies=60, parts=("train", "validation"))
    found = _apply(bundle, select_on=0.1)
    assert found.test is bundle.validation
    assert _ids(found.train, found.validation) == _ids(bundle.train)
    assert not _ids(found.train) & _ids(found.validation)
    assert not _pixels(found.train) & _pixels(found.validation)
    assert len(found.validation) == pytest.approx(40, abs=6)
    assert found.selected_on == "0.1 of Training (duplicates kept together)"
    assert found.train.name == "Training"


def test_select_on_beside_a_test_part_leaves_the_validation_part_out_and_says_so():
    bundle = _bundle()
    found = _apply(bundle, select_on=0.1)
    assert found.test is bundle.test
    assert "PublicTest (80 images) is not used" in found.notes[0]


def test_without_a_validation_part_a_fifth_of_train_selects():
    found = _apply(_bundle(parts=("train", "test")))
    assert len(found.validation) == pytest.approx(80, abs=3)
    assert found.test.name == "PrivateTest"
    assert "no validation split: 20% of Training serves" in found.notes[0]


def test_without_any_parts_the_data_is_split_as_by_resplit_and_says_so():
    bundle = _bundle(copies=60, parts=("train",))
    found, resplit = _apply(bundle), _apply(bundle, protocol="resplit")
    assert found.protocol == "resplit"
    assert "no splits of its own" in found.notes[0]
    assert found.test.ids.tolist() == resplit.test.ids.tolist()


def test_resplit_is_80_20_and_80_20_stratified_with_copies_on_one_side():
    bundle = _bundle(copies=60)
    found = _apply(bundle, protocol="resplit", balance="augment")
    parts = (found.train, found.validation, found.test)
    assert [split.name for split in parts] == ["train", "validation", "test"]
    assert sum(map(len, parts)) == 560
    assert _ids(*parts) == _ids(bundle.train, bundle.validation, bundle.test)
    assert sum(len(_pixels(split)) for split in parts) == len(_pixels(*parts)) == 490
    assert [len(split) / 560 for split in parts] == pytest.approx([0.64, 0.16, 0.2], abs=0.02)
    shares = [np.bincount(split.targets, minlength=CLASSES) / len(split) for split in parts]
    assert np.ptp(shares, axis=0).max() < 0.04
    assert not any("#" in name for name in _ids(*parts))


def test_resplit_depends_on_the_data_seed():
    bundle = _bundle()
    first, again, other = (_apply(bundle, protocol="resplit", seed=seed) for seed in (0, 0, 1))
    assert first.test.ids.tolist() == again.test.ids.tolist()
    assert _ids(first.test) != _ids(other.test)


def test_resplit_with_select_on_takes_that_fraction_for_selection():
    found = _apply(_bundle(), protocol="resplit", select_on=0.1)
    assert len(found.validation) / (len(found.validation) + len(found.train)) == pytest.approx(0.1, abs=0.01)


def test_ids_that_recur_in_several_parts_are_told_apart_when_pooled():
    bundle = _bundle(parts=("train", "validation"))
    splits = [
        Split(s.name, s.images, s.targets, np.array([str(row) for row in range(len(s))]))
        for s in (bundle.train, bundle.validation)
    ]
    found = _apply(DataBundle("arrays", bundle.labels, *splits, None), protocol="resplit")
    ids = _ids(found.train, found.validation, found.test)
    assert len(ids) == 480
    assert {"Training/3", "PublicTest/3"} <= ids


def test_parts_of_different_sizes_cannot_be_pooled():
    bundle = _bundle(parts=("train",))
    other = Split("test", np.zeros((4, 9, 9, 1), np.uint8), np.arange(4), np.array(list("abcd")))
    with pytest.raises(DataError, match="expected one shape"):
        _apply(DataBundle("arrays", bundle.labels, bundle.train, other, None), protocol="resplit")


def test_paper_official_trains_on_four_fifths_and_judges_on_all_other_splits():
    bundle = _bundle(copies=60)
    found = _apply(bundle, "augment", protocol="paper", split="official_80_20")
    assert (found.protocol, found.test.name) == ("paper", "PublicTest+PrivateTest")
    assert _ids(found.test) == _ids(bundle.validation, bundle.test)
    assert _ids(found.train, found.validation) == _ids(bundle.train)
    assert len(found.validation) == pytest.approx(80, abs=8)


def test_paper_official_says_when_a_third_part_is_absent_and_needs_a_second():
    found = _apply(_bundle(parts=("train", "validation")), protocol="paper", split="official_80_20")
    assert "no third split, so 400 / 80 images (83%) stand for" in found.notes[0]
    with pytest.raises(ProtocolError, match="judges on the splits beside train"):
        _apply(_bundle(parts=("train",)), protocol="paper", split="official_80_20")


def test_paper_after_balance_splits_copies_without_regard_to_duplicates():
    bundle = _bundle(copies=60)
    found = _apply(bundle, "augment", protocol="paper", split="after_balance")
    parts = (found.train, found.validation, found.test)
    counts = np.bincount(np.concatenate([s.targets for s in (bundle.train, bundle.validation, bundle.test)]))
    total = CLASSES * counts.max()
    assert sum(map(len, parts)) == total
    assert [len(split) / total for split in parts] == pytest.approx([0.64, 0.16, 0.2], abs=0.01)
    for split in parts:
        assert np.ptp(np.bincount(split.targets)) <= 2
    pool = {
        name: image.tobytes()
        for split in (bundle.train, bundle.validation, bundle.test)
        for name, image in zip(split.ids.tolist(), split.images, strict=True)
    }
    sources = {pool[name.split("#")[0]] for name in found.train.ids.tolist()}
    expected = sum(pool[name.split("#")[0]] in sources for name in found.test.ids.tolist())
    assert expected > len(found.test) / 4
    assert f"balanced to {total} by augmented copies before the split" in found.notes[0]


@pytest.mark.parametrize("balance", ["none", "class_weight", "sampler"])
def test_paper_after_balance_needs_a_balance_of_all_images(balance):
    with pytest.raises(ProtocolError, match=f"balance: found '{balance}'.*Set balance: augment"):
        _apply(_bundle(), balance, protocol="paper", split="after_balance")


def test_paper_after_balance_by_undersampling_has_each_class_alike_and_no_image_twice():
    bundle = _bundle(copies=60)
    found = _apply(bundle, "undersample", protocol="paper", split="after_balance")
    parts = (found.train, found.validation, found.test)
    counts = np.bincount(np.concatenate([s.targets for s in (bundle.train, bundle.validation, bundle.test)]))
    assert sum(map(len, parts)) == CLASSES * counts.min()
    ids = np.concatenate([split.ids for split in parts])
    assert len(set(ids.tolist())) == len(ids)
    for split in parts:
        assert np.ptp(np.bincount(split.targets)) <= 2
    assert "down to the smallest class before the split" in found.notes[0]


def test_a_draw_keeps_shares_and_every_class():
    targets = np.array([0] * 900 + [1] * 90 + [2] * 10)
    ids = np.array([str(row) for row in range(1000)])
    rows = draw_indices(targets, ids, 100, seed=0)
    assert np.bincount(targets[rows]).tolist() == [90, 9, 1]
    assert np.bincount(targets[draw_indices(targets, ids, 20, seed=0)]).tolist() == [18, 1, 1]
    assert len(draw_indices(targets, ids, 2, seed=0)) == 2
    assert np.array_equal(draw_indices(targets, ids, None, seed=0), np.arange(1000))


def test_a_subset_is_deterministic_and_follows_the_seed():
    split = _split("Training", 200)
    assert draw_subset(split, 500, 0) is split
    assert draw_subset(split, None, 0) is split
    first = draw_subset(split, 50, 0)
    assert first.ids.tolist() == draw_subset(split, 50, 0).ids.tolist()
    assert _ids(first) != _ids(draw_subset(split, 50, 1))


def _with_flipped_duplicates(count: int) -> DataBundle:
    """Return a bundle of smooth, mutually unlike images; the last `count` of validation are flips of train's first."""
    rng = np.random.default_rng(5)
    parts = {}
    for name, number in (("Training", 300), ("PublicTest", 100)):
        images = rng.integers(0, 256, (number, 16, 16, 1), dtype=np.uint8)
        ids = np.array([f"{name}/{row}" for row in range(number)])
        parts[name] = Split(name, images, np.arange(number) % CLASSES, ids)
    parts["PublicTest"].images[-count:] = parts["Training"].images[:count, :, ::-1]
    return DataBundle("fer2013", tuple("abcd"), parts["Training"], parts["PublicTest"], None)


def test_resplit_keeps_flipped_duplicates_on_one_side():
    found = _apply(_with_flipped_duplicates(60), protocol="resplit")
    sides = {name: part for part in ("train", "validation", "test") for name in getattr(found, part).ids.tolist()}
    where = [(sides[f"Training/{row}"], sides[f"PublicTest/{40 + row}"]) for row in range(60)]
    assert all(left == right for left, right in where)
    assert {left for left, _ in where} == {"train", "validation", "test"}


def test_fraction_draws_duplicates_together_across_parts_and_keeps_the_shares_of_classes():
    bundle = _with_flipped_duplicates(60)
    found = draw_fraction(bundle, 0.25, seed=3)
    drawn = _ids(found.train, found.validation)
    assert len(drawn) == pytest.approx(100, abs=8)
    assert {name.split("/")[0] for name in found.train.ids.tolist()} == {"Training"}
    pairs = [(f"Training/{row}" in drawn, f"PublicTest/{40 + row}" in drawn) for row in range(60)]
    assert all(left == right for left, right in pairs)
    assert any(left for left, _ in pairs)
    counts = np.bincount(np.concatenate([found.train.targets, found.validation.targets]))
    assert counts.max() - counts.min() <= 6
    assert "data.fraction 0.25" in found.notes[-1]


def test_fraction_does_not_depend_on_the_order_of_rows():
    bundle = _with_flipped_duplicates(60)
    shuffled = bundle.train.take(np.random.default_rng(0).permutation(len(bundle.train)))
    other = DataBundle("fer2013", bundle.labels, shuffled, bundle.validation, None)
    found = [draw_fraction(some, 0.5, seed=1) for some in (bundle, other)]
    assert _ids(found[0].train) == _ids(found[1].train)
    assert _ids(draw_fraction(bundle, 0.5, seed=2).train) != _ids(found[0].train)


def _chain() -> np.ndarray:
    """Return uint8 [3, 48, 48, 1]: the first and the last are duplicates of the second, but not of each other."""
    rng = np.random.default_rng(0)
    smooth = [ndimage.gaussian_filter(rng.normal(size=(48, 48)), 3) for _ in range(2)]
    start, other = (128 + 45 * noise / noise.std() for noise in smooth)
    images = [np.clip((1 - share) * start + share * other, 0, 255).astype(np.uint8) for share in (0, 0.14, 0.26)]
    return np.stack(images)[..., None]


def _unlike(name: str, count: int, seed: int, ids: list[str] | None = None) -> Split:
    images = np.random.default_rng(seed).integers(0, 256, (count, 48, 48, 1), dtype=np.uint8)
    named = ids or [f"{name}/{row}" for row in range(count)]
    return Split(name, images, np.arange(count) % 2, np.array(named))


def test_the_ends_of_the_chain_are_not_duplicates_of_each_other():
    a, b, c = (image[None] for image in _chain())
    assert find_duplicates(a, b).any[0]
    assert find_duplicates(b, c).any[0]
    assert not find_duplicates(a, c).any[0]


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("between", ["train", "validation", "test"])
def test_train_images_that_a_chain_connects_to_validation_or_test_are_dropped(part, between):
    """A is in train and C is judged on; B, a duplicate of both, is in train or is judged on itself."""
    splits = {"train": _unlike("train", 6, 0), "validation": _unlike("validation", 4, 1), "test": _unlike("test", 4, 2)}
    a, b, c = _chain()
    splits["train"].images[0], splits[between].images[1], splits[part].images[2] = a, b, c
    found = drop_duplicates(DataBundle("arrays", ("a", "b"), **splits))
    dropped = {"train/0", "train/1"} if between == "train" else {"train/0"}
    assert set(found.train.ids.tolist()) == set(splits["train"].ids.tolist()) - dropped
    assert (found.validation, found.test) == (splits["validation"], splits["test"])
    assert f"train: {len(dropped)} of 6 images were left out" in found.notes[-1]


def test_copies_by_id_are_dropped_and_ids_that_merely_recur_are_not():
    train = _unlike("train", 3, 0, ["0.png", "1.png", "2.png#1"])
    validation = _unlike("validation", 2, 1, ["0.png", "2.png"])
    found = drop_duplicates(DataBundle("arrays", ("a", "b"), train, validation, None))
    assert found.train.ids.tolist() == ["0.png", "1.png"]


def test_a_chain_within_train_alone_is_kept():
    train = _unlike("train", 4, 0)
    train.images[:3] = _chain()
    bundle = DataBundle("arrays", ("a", "b"), train, _unlike("validation", 2, 1), None)
    assert drop_duplicates(bundle).train.ids.tolist() == train.ids.tolist()


def _cross_validate(bundle: DataBundle, fold: int, **keys) -> DataBundle:
    return _apply(bundle, protocol="cross_validation", folds=5, fold=fold, **keys)


def test_cross_validation_pools_all_parts_and_judges_each_image_once():
    bundle = _bundle(copies=60)
    found = [_cross_validate(bundle, fold) for fold in range(5)]
    assert sorted(name for one in found for name in one.test.ids.tolist()) == sorted(
        _ids(*(split for split in bundle.splits.values()))
    )
    for fold, one in enumerate(found):
        assert (one.protocol, one.test.name) == ("cross_validation", f"fold {fold}")
        assert not _pixels(one.train, one.validation) & _pixels(one.test)
        assert not _pixels(one.train) & _pixels(one.validation)
        assert len(_ids(*one.splits.values())) == 560
        assert abs(len(one.test) - 112) <= 2
        assert abs(len(one.validation) - 0.2 * 448) <= 8
        assert f"Fold {fold} of 0 to 4 is the test" in one.notes[-1]


def test_folds_depend_on_the_data_seed_alone():
    bundle = _bundle(copies=60)
    first, again, other = (_cross_validate(bundle, 2, seed=seed) for seed in (0, 0, 1))
    assert first.test.ids.tolist() == again.test.ids.tolist()
    assert first.validation.ids.tolist() == again.validation.ids.tolist()
    assert _ids(first.test) != _ids(other.test)


def test_the_validation_splits_of_two_folds_are_drawn_independently():
    bundle = _bundle()
    first, second = _cross_validate(bundle, 0), _cross_validate(bundle, 1)
    common = _ids(first.validation) - _ids(second.test)
    assert 0.05 < len(_ids(first.validation) & _ids(second.validation)) / len(common) < 0.4


def test_cross_validation_without_a_fold_says_what_trains_all():
    with pytest.raises(ProtocolError, match=r"data\.fold: found null.*dlfer crossval"):
        _apply(_bundle(), protocol="cross_validation", folds=5)


def test_a_class_whose_images_are_all_in_one_fold_is_refused_in_every_fold():
    split = _split("Training", 60)
    targets = np.minimum(split.targets, 1)
    targets[7] = 2
    lone = DataBundle("fer2013", tuple("abc"), Split("Training", split.images, targets, split.ids), None, None)
    for fold in range(5):
        with pytest.raises(DataError, match=r"all images of c are in one of the groups of duplicates"):
            _cross_validate(lone, fold)


def test_more_folds_than_groups_are_refused():
    images = np.repeat(np.arange(3, dtype=np.uint8), 8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    split = Split("Training", images, np.arange(24) % 2, np.array([str(row) for row in range(24)]))
    with pytest.raises(DataError, match=r"found 3 groups of duplicates for 5 folds"):
        _cross_validate(DataBundle("fer2013", tuple("ab"), split, None, None), 0)


def _with_subjects(count: int = 240, subjects: int = 12) -> DataBundle:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
    ids = np.array([f"c{row % 4}/S{row % subjects:03}_{row}.png" for row in range(count)])
    return DataBundle("folder", tuple("abcd"), Split("train", images, np.arange(count) % 4, ids), None, None)


def _subjects(*splits: Split) -> set[str]:
    return {name.split("/")[1].split("_")[0] for split in splits for name in split.ids.tolist()}


@pytest.mark.parametrize(
    "keys", [{"protocol": "resplit"}, {"protocol": "cross_validation", "folds": 4, "fold": 1}, {"select_on": 0.3}]
)
@pytest.mark.parametrize("by_file", [False, True])
def test_a_subject_stays_on_one_side_of_every_drawn_split(keys, by_file, tmp_path):
    bundle = _with_subjects()
    if by_file:
        rows = [f"{name},{name.split('/')[1].split('_')[0]}" for name in bundle.train.ids.tolist()]
        (tmp_path / "subjects.csv").write_text("\n".join(["id,subject", *rows]))
        subjects = {"file": str(tmp_path / "subjects.csv")}
    else:
        subjects = {"pattern": "/(S[0-9]+)_"}
    found = _apply(bundle, **keys, subjects=subjects)
    sides = [_subjects(part) for part in (found.train, found.validation, found.test)]
    assert sum(map(len, sides)) == 12 == len(set().union(*sides))
    for part in (found.train, found.validation, found.test):
        assert len(np.unique(part.targets)) > 0


def test_subjects_and_duplicates_are_chained():
    """If a picture of one subject is a copy of one of another, both subjects stay together."""
    bundle = _with_subjects(240, 12)
    bundle.train.images[1] = bundle.train.images[0]  # of S000 and S001
    for fold in range(4):
        found = _apply(bundle, protocol="cross_validation", folds=4, fold=fold, subjects={"pattern": "/(S[0-9]+)_"})
        of_both = {"S000", "S001"} & _subjects(found.test)
        assert len(of_both) in (0, 2)


def test_an_image_without_a_subject_is_refused(tmp_path):
    bundle = _with_subjects(24, 4)
    with pytest.raises(DataError, match=r"found no subject for 24 of 24 images, e\.g\. 'c0/S000_0\.png'"):
        _apply(bundle, protocol="resplit", subjects={"pattern": "^(person[0-9])"})
    (tmp_path / "subjects.csv").write_text("id,subject\nc0/S000_0.png,S000\n")
    with pytest.raises(DataError, match=r"subjects\.csv: found no subject for 23 of 24 images"):
        _apply(bundle, protocol="resplit", subjects={"file": str(tmp_path / "subjects.csv")})
    (tmp_path / "subjects.csv").write_text("id,person\nc0/S000_0.png,S000\n")
    with pytest.raises(DataError, match=r"found the columns id, person; expected id and subject"):
        _apply(bundle, protocol="resplit", subjects={"file": str(tmp_path / "subjects.csv")})


@pytest.mark.parametrize(
    ("count", "keys", "message"),
    [
        (1, {}, r"found 1 subject, and test and validation got no image"),
        (1, {"protocol": "resplit"}, r"found 1 subject, and test and validation got no image"),
        (2, {"protocol": "resplit"}, r"found 2 subjects, and validation got no image"),
        (1, {"protocol": "paper", "split": "official_80_20"}, r"found 1 subject, and validation got no image"),
        (3, {"protocol": "cross_validation", "folds": 5, "fold": 0}, r"subjects \(3 subjects\) for 5 folds"),
        (2, {"protocol": "cross_validation", "folds": 2, "fold": 0}, r"found 2 subjects, and validation got no image"),
        (
            1,
            {"protocol": "cross_validation", "folds": 2, "fold": 0},
            r"subjects \(1 subject\) for 2 folds.*Correct data\.subjects",
        ),
    ],
)
def test_too_few_subjects_are_counted(count, keys, message):
    bundle = _with_subjects(24, 1)
    ids = np.array([f"c{row % 4}/S{row // 4 % count}_{row}.png" for row in range(24)])
    train = dataclasses.replace(bundle.train, ids=ids)
    bundle = dataclasses.replace(bundle, train=train)
    if keys.get("protocol") == "paper":
        bundle = dataclasses.replace(
            bundle, train=train.take(np.arange(16)), test=train.take(np.arange(16, 24), "test")
        )
    with pytest.raises(DataError, match=message) as caught:
        _apply(bundle, **keys, subjects={"pattern": "/(S[0-9]+)_"})
    assert "different images" not in str(caught.value)


@pytest.mark.parametrize("header", ["id,subject", "ID,Subject", " Id , SUBJECT "])
def test_columns_of_a_csv_of_subjects_are_found_in_any_case(tmp_path, header):
    (tmp_path / "subjects.csv").write_text(f"{header}\na.png,S1\nb.png,S2\n")
    config = SubjectsConfig(file=str(tmp_path / "subjects.csv"))
    assert find_subjects(config, np.array(["b.png", "a.png"])).tolist() == ["S2", "S1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no such file; expected a csv with the columns id,subject"),
        ("", r"line 1: found the columns '', expected id,subject"),
        ("name,subject\na.png,S1\n", r"line 1: found the columns 'name,subject', expected id,subject"),
        ("id,subject,Subject\na.png,S1,S2\n", r"found the columns id, subject, Subject; expected id and subject"),
    ],
)
def test_a_wrong_csv_of_subjects_is_told_its_columns(tmp_path, text, message):
    if text is not None:
        (tmp_path / "subjects.csv").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        find_subjects(SubjectsConfig(file=str(tmp_path / "subjects.csv")), np.array(["a.png"]))
    assert "gender" not in str(caught.value)


def test_subjects_in_two_official_parts_are_counted_in_a_note():
    bundle = _with_subjects(240, 12)
    train, test = bundle.train.take(np.arange(200)), bundle.train.take(np.arange(200, 240), "test")
    parts = DataBundle("folder", tuple("abcd"), train, test, None)
    found = _apply(parts, subjects={"pattern": "/(S[0-9]+)_"})
    assert "40 of 40 images of test show one of 12 subjects that are in train as well" in found.notes[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"folds": 5}, r"folds: found 5 under protocol official"),
        ({"protocol": "resplit", "fold": 0}, r"fold: found 0 under protocol resplit"),
        ({"protocol": "cross_validation"}, r"needs their number, 2 to 20"),
        ({"protocol": "cross_validation", "folds": 5, "fold": 5}, r"fold: found 5 with folds: 5; expected 0 to 4"),
        ({"subjects": {}}, r"expected one of file .* and pattern"),
        ({"subjects": {"pattern": "S[0-9]+"}}, r"found 0 groups"),
        ({"subjects": {"pattern": "(S["}}, r"not a regular expression"),
        (
            {"protocol": "paper", "split": "after_balance", "subjects": {"pattern": "(S)"}},
            r"subjects: found with split: after_balance",
        ),
    ],
)
def test_keys_of_folds_and_subjects_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(source="fer2013", path="x", **keys)
