"""The audit: what is counted, named and cached."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from dlfer.data import audit as audit_module
from dlfer.data.audit import audit_bundle, audit_data, audit_splits, list_places, number_groups
from dlfer.data.bundle import DataBundle, Reading, Split
from dlfer.data.pipeline import add_copies
from dlfer.data.survey import survey_images
from dlfer.errors import DataError
from dlfer.runs.audit_record import (
    AuditedSplit,
    AuditRecord,
    FlatImage,
    GroupsAcrossSplits,
    OutlierImage,
    Samples,
    Unreadable,
)
from dlfer.runs.records import DuplicateCounts


def _faces(count: int, seed: int = 0, side: int = 48, channels: int = 1) -> np.ndarray:
    """Return smooth images that differ clearly from one another."""
    noise = np.random.default_rng(seed).normal(size=(count, side, side, channels))
    smooth = ndimage.gaussian_filter(noise, (0, side / 16, side / 16, 0))
    return np.clip(128 + 45 * smooth / smooth.std(axis=(1, 2, 3), keepdims=True), 0, 255).astype(np.uint8)


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
    found = audit_bundle(_bundle())
    assert found.num_images == 11
    assert found.splits["Training"] == AuditedSplit(num_images=6, classes={"Happy": 3, "Sad": 3}, imbalance=1.0)
    assert found.distinct_images == 7
    assert found.duplicate_groups == 2
    assert found.conflicting_groups == 1
    assert found.constant_images == found.near_constant_images == 1
    assert found.flat == [FlatImage(split="Training", id="Training/5", label="Sad", std=0.0)]
    assert found.as_json()["leaks"] == {
        "Training->PublicTest": {"exact": 1, "augmented": 0, "any": 2},
        "Training->PrivateTest": {"exact": 0, "augmented": 0, "any": 0},
        "PublicTest->PrivateTest": {"exact": 1, "augmented": 0, "any": 1},
    }
    assert (found.near_groups, found.near_conflicting_groups, found.largest_group) == (3, 1, 4)
    assert found.groups_across_splits == GroupsAcrossSplits(exact=2, near=3)
    assert found.unreadable == Unreadable()
    assert found.probably_no_face is None
    assert found.votes is None


def test_streamed_splits_are_counted_only():
    class Stream:
        name = "train"

        def __len__(self) -> int:
            return 1000

        def count_classes(self) -> np.ndarray:
            return np.array([900, 100])

    bundle = _bundle()
    streamed = DataBundle("tfds", ("a", "b"), Stream(), Stream(), None)
    assert audit_bundle(streamed).num_images == 2000
    assert audit_bundle(streamed).splits["train"].classes == {"a": 900, "b": 100}
    assert audit_bundle(streamed).splits["train"].imbalance == 9
    assert audit_bundle(streamed).is_streamed
    assert "leaks" not in audit_bundle(streamed).as_json()
    mixed = DataBundle("tfds", ("a", "b"), Stream(), bundle.validation, bundle.test)
    assert list(audit_bundle(mixed).leaks) == ["PublicTest->PrivateTest"]


def test_the_samples_are_the_duplicates_that_were_planted():
    samples = audit_bundle(_bundle()).samples
    ids = {kind: [[image.id for image in group] for group in groups] for kind, groups in samples}
    assert sorted(ids["exact"]) == [["PublicTest/2", "PrivateTest/0"], ["Training/0", "PublicTest/0"]]
    assert ids["flipped"] == [["Training/3", "PublicTest/1"]]
    assert ids["near"] == []
    assert ids["conflicting"] == [["Training/0", "Training/1", "Training/2", "PublicTest/0"]]
    assert [image.label for image in samples.conflicting[0]] == ["Happy", "Happy", "Sad", "Happy"]


def test_augmented_copies_are_leaks_of_their_source_by_their_ids():
    whole = Split("all", _faces(8), np.array([0, 0, 0, 0, 0, 0, 1, 1]), np.array(list("abcdefgh")))
    copied = add_copies(whole, seed=0)
    train, test = copied.take(np.arange(8), "train"), copied.take(np.arange(8, 12), "test")
    leak = audit_splits([train, test], ("x", "y")).leaks["train->test"]
    assert leak == DuplicateCounts(exact=0, augmented=4, any=4)
    half = train.take(np.array([0, 1, 6]), "train")
    sources = [name.split("#")[0] for name in test.ids.tolist()]
    assert audit_splits([half, test], ("x", "y")).leaks["train->test"].augmented == sources.count("g") < 4


def test_of_ids_that_recur_only_those_with_copies_are_one_source():
    train = Split("train", _faces(3), np.array([0, 1, 1]), np.array(["0", "1", "2"]))
    test = Split("test", _faces(3, seed=5), np.array([0, 1, 1]), np.array(["0", "1#1", "7"]))
    leak = audit_splits([train, test], ("x", "y")).leaks["train->test"]
    assert leak == DuplicateCounts(exact=0, augmented=1, any=1)


def test_ids_that_recur_among_splits_without_copies_are_no_leak():
    parts = [
        Split(name, _faces(3, seed), np.array([0, 1, 1]), np.array(["0", "1", "2"])) for seed, name in enumerate("ab")
    ]
    found = audit_splits(parts, ("x", "y"))
    assert found.leaks["a->b"] == DuplicateCounts(exact=0, augmented=0, any=0)
    assert found.near_groups == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_one_image_is_audited(channels):
    part = Split("train", _faces(1, channels=channels), np.array([1]), np.array(["a"]))
    found = audit_splits([part], ("x", "y"))
    assert (found.num_images, found.distinct_images, found.duplicate_groups) == (1, 1, 0)
    assert found.leaks == {}
    assert found.samples == Samples()
    assert found.outliers.brightness.n == 0


def test_splits_of_other_sizes_are_compared_by_what_they_show():
    small, large = _faces(4), _faces(4, seed=7, side=96)
    large[2] = small[1].repeat(2, axis=0).repeat(2, axis=1)
    parts = [
        Split("train", small, np.array([0, 1, 0, 1]), np.array(list("abcd"))),
        Split("test", large, np.array([0, 1, 0, 1]), np.array(list("efgh"))),
    ]
    assert audit_splits(parts, ("x", "y")).leaks["train->test"] == DuplicateCounts(exact=0, augmented=0, any=1)


def test_what_could_not_be_read_is_named_and_sizes_have_outliers():
    part = Split("train", _faces(9), np.array([0, 1, 0] * 3), np.array(list("abcdefghi")))
    sizes = {name: (50, 48 + row) for row, name in enumerate("abcdefgh")} | {"i": (400, 300)}
    reading = Reading(unreadable=("im0.png: damaged", "im1.png: damaged"), sizes=sizes)
    found = audit_splits([part], ("x", "y"), reading=reading)
    assert found.unreadable == Unreadable(n=2, examples=["im0.png: damaged", "im1.png: damaged"])
    assert found.outliers.size.images == [OutlierImage(split="train", id="i", label="x", value=300.0)]


def test_groups_are_numbered_alike_whatever_the_order_of_rows():
    images = _faces(6)
    images[4] = images[1][:, ::-1]
    part = Split("train", images, np.array([0, 1] * 3), np.array(list("fedcba")))
    turned = part.take(np.array([3, 1, 5, 0, 4, 2]))
    numbers = []
    for one in (part, turned):
        groups = number_groups(survey_images([one]), list_places([one], ("x", "y")))
        numbers.append(dict(zip(one.ids.tolist(), groups.tolist(), strict=True)))
    assert numbers[0] == numbers[1] == {"a": 0, "b": 1, "c": 2, "d": 3, "e": 1, "f": 4}


def test_the_very_same_data_is_audited_once(tmp_path, monkeypatch):
    bundle = _bundle()
    first = audit_data(bundle, cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{first.fingerprint}.json"]
    calls, empty = [], AuditRecord(num_images=-1, labels=[], splits={})
    monkeypatch.setattr(audit_module, "audit_bundle", lambda *args, **kwargs: calls.append(args) or empty)
    assert audit_data(bundle, cache=tmp_path) == first
    order = np.arange(6)[::-1]
    assert audit_data(dataclasses.replace(bundle, train=bundle.train.take(order)), cache=tmp_path) == first
    assert not calls
    images = bundle.train.images.copy()
    images[0, 0, 0] ^= 1
    for other in (
        dataclasses.replace(bundle, train=dataclasses.replace(bundle.train, images=images)),
        dataclasses.replace(bundle, train=dataclasses.replace(bundle.train, targets=1 - bundle.train.targets)),
        dataclasses.replace(bundle, labels=("Sad", "Happy")),
        dataclasses.replace(bundle, reading=Reading(unreadable=("x",))),
        dataclasses.replace(bundle, validation=bundle.test, test=bundle.validation),
    ):
        assert audit_data(other, cache=tmp_path).num_images == -1
    assert len(calls) == 5
    assert audit_data(bundle).num_images == -1


def test_a_damaged_cache_is_made_anew(tmp_path):
    first = audit_data(_bundle(), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    for text in ("{", "[]", "{}", '{"schema": 99}', '{"num_images": "many"}'):
        path.write_text(text)
        assert audit_data(_bundle(), cache=tmp_path) == first
    assert AuditRecord.parse(json.loads(path.read_text()), path) == first


def test_votes_count_for_the_audit_and_its_cache(tmp_path):
    votes = tmp_path / "votes.csv"
    votes.write_text("id,sadness,happiness\n" + "".join(f"Training/{row},3,1\n" for row in range(6)))
    found = audit_data(_bundle(), cache=tmp_path / "cache", votes=votes)
    assert found.votes.agreement.value == 0.5
    votes.write_text(votes.read_text().replace("3,1", "1,3", 1))
    assert audit_data(_bundle(), cache=tmp_path / "cache", votes=votes).votes.agreement.value > 0.5
    with pytest.raises(DataError, match="no such file of votes"):
        audit_data(_bundle(), cache=tmp_path / "cache", votes=tmp_path / "none.csv")
