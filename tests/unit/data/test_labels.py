"""Labels travel as names: known spellings, aliases, drops, and the mapping between data and model."""

from __future__ import annotations

import numpy as np
import pytest

from dlfer.config.names import FER2013_LABELS
from dlfer.config.sections import LabelsConfig
from dlfer.data.bundle import DataBundle, Split
from dlfer.data.labels import (
    compute_label_map,
    describe_merged,
    describe_unknown,
    map_targets,
    match_labels,
    relabel_bundle,
)
from dlfer.errors import DataError, ModelError


def _split(targets: list[int]) -> Split:
    images = np.arange(len(targets), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 1), np.uint8)
    return Split("train", images, np.array(targets), np.array([f"train/{row}" for row in range(len(targets))]))


def test_known_spellings_become_the_seven_labels():
    names = ["ANGER", "disgusted", "fearful", "Happiness", "sorrow", "surprised", "neutral", "contempt"]
    found = match_labels(names, LabelsConfig())
    assert [found[name] for name in names] == [*FER2013_LABELS, "contempt"]


def test_names_that_are_no_expressions_stay_as_they_are():
    names = ["joy", "n01443537", "n01629819", "n01641577"]
    assert match_labels(names, LabelsConfig()) == {name: name for name in names}


def test_aliases_come_before_known_spellings_and_drop_knows_both_names():
    labels = LabelsConfig(aliases={"contempt": "Disgust", "joy": "Smile"}, drop=("smile", "Fearful"))
    found = match_labels(["contempt", "joy", "fearful", "sad"], labels)
    assert found == {"contempt": "Disgust", "joy": None, "fearful": None, "sad": "Sad"}


@pytest.mark.parametrize(
    ("names", "aliases", "expected"),
    [
        # As the folders are spelt: no second class beside Disgust.
        (("anger", "disgust", "contempt"), {"contempt": "disgust"}, ["Angry", "Disgust", "Disgust"]),
        (("anger", "disgust", "smile"), {"smile": "JOY"}, ["Angry", "Disgust", "JOY"]),
        (("anger", "happiness", "smile"), {"smile": "joy"}, ["Angry", "Happy", "Happy"]),
        (("cat", "dog", "puppy"), {"puppy": "Dog"}, ["cat", "dog", "dog"]),
        (("cat", "dog", "puppy"), {"puppy": "Pet", "dog": "pet"}, ["cat", "Pet", "Pet"]),
        (("angry", "happy", "joy"), {"joy": "happy", "happy": "happy"}, ["Angry", "happy", "happy"]),
        (("angry", "happy"), {"happy": "happy"}, ["Angry", "happy"]),
    ],
)
def test_an_alias_that_is_spelt_otherwise_than_the_label_it_means_makes_no_second_class(names, aliases, expected):
    mapping = match_labels(names, LabelsConfig(aliases=aliases))
    assert [mapping[name] for name in names] == expected


@pytest.mark.parametrize("labels", [LabelsConfig(drop=("hapy",)), LabelsConfig(aliases={"hapy": "Happy"})])
def test_unknown_names_are_refused_with_the_nearest(labels):
    with pytest.raises(DataError, match=r"found 'hapy'.*Did you mean 'happy'"):
        match_labels(["happy", "sad"], labels)


def test_dropping_every_class_is_refused():
    with pytest.raises(DataError, match="every class"):
        match_labels(["happy", "sad"], LabelsConfig(drop=("happy", "sad")))


def test_relabel_merges_and_drops_rows_by_name():
    bundle = DataBundle("arrays", ("happiness", "sad", "joy", "fear"), _split([0, 1, 2, 3, 1]), None, None)
    found = relabel_bundle(bundle, LabelsConfig(drop=("fear",)))
    assert found.labels == ("Happy", "Sad")
    assert found.train.targets.tolist() == [0, 1, 0, 1]
    assert found.train.ids.tolist() == ["train/0", "train/1", "train/2", "train/4"]
    assert "1 image of the dropped classes fear left out." in found.notes[0]


def test_targets_are_mapped_by_name_not_by_number():
    folders = ("angry", "disgust", "fear", "happy", "neutral", "sad", "surprise")
    split = map_targets(_split([0, 1, 2, 3, 4, 5, 6]), folders, FER2013_LABELS)
    assert [FER2013_LABELS[target].lower() for target in split.targets] == list(folders)


def test_a_model_with_other_labels_is_refused_with_both_lists():
    with pytest.raises(ModelError, match=r"data has happy, sad; the model knows happy, calm"):
        compute_label_map(("happy", "sad"), ("happy", "calm"))


def test_two_classes_that_are_one_expression_stay_apart():
    assert compute_label_map(("joy", "happy"), ("happy", "joy")).tolist() == [1, 0]
    with pytest.raises(ModelError):
        compute_label_map(("joy", "happy"), ("happy", "Happy"))


def test_names_are_compared_in_nfc_without_case_and_spaces_and_merging_is_said():
    names = ["Cafe\u0301", "caf\u00e9 ", "Stra\u00dfe", "STRASSE", "cat"]
    mapping = match_labels(names, LabelsConfig())
    assert len(set(mapping.values())) == 3
    assert mapping[names[0]] == mapping[names[1]]
    assert mapping["STRASSE"] == mapping["Stra\u00dfe"]
    assert len(describe_merged(mapping, LabelsConfig())) == 2
    dropped = match_labels(names, LabelsConfig(drop=("CAF\u00c9",)))
    assert [name for name in names if dropped[name] is None] == names[:2]
    aliased = match_labels(names, LabelsConfig(aliases={"strasse": "road"}))
    assert [aliased[name] for name in names[2:4]] == ["road", "road"]
    assert len(describe_merged(aliased, LabelsConfig(aliases={"strasse": "road"}))) == 1


def test_data_with_some_of_the_models_labels_is_mapped_and_others_are_refused():
    split = map_targets(_split([1, 0, 1]), ("sad", "happy"), FER2013_LABELS)
    assert [FER2013_LABELS[target] for target in split.targets] == ["Happy", "Sad", "Happy"]
    unused = map_targets(_split([0, 0]), ("happy", "contempt"), FER2013_LABELS)
    assert [FER2013_LABELS[target] for target in unused.targets] == ["Happy", "Happy"]
    with pytest.raises(ModelError, match="no name for contempt"):
        map_targets(_split([0, 1]), ("happy", "contempt"), FER2013_LABELS)


def test_classes_that_are_no_expressions_are_named_beside_those_that_are():
    counts = {"angry": 5, "happy": 6, "contempt": 2, "misc": 3}
    lines = describe_unknown(match_labels(counts, LabelsConfig()), counts)
    assert len(lines) == 1
    assert "as expressions: misc (3 images)." in lines[0]
    assert describe_unknown(match_labels(counts, LabelsConfig(drop=("misc",))), counts) == []
    others = {"cat": 3, "dog": 4, "happy": 1}
    assert describe_unknown(match_labels(others, LabelsConfig()), others) == []
