"""Records of an earlier version are read with the present names of their keys; damaged ones are refused by their place."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from dlfer.errors import ModelError
from dlfer.runs.audit_record import AuditRecord
from dlfer.runs.comparison_record import ComparisonRecord
from dlfer.runs.metrics_record import Estimate, Metrics
from dlfer.runs.records import SCHEMA, ArtifactRecord, DataRecord, DuplicateCounts, DuplicatesRecord, RunRecord
from dlfer.runs.run_records import read_metrics, require_metrics

SCORES = {"n": 60, "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
OLD = {
    "protocol": "official",
    "selected_on": "0.1 of Training (twins kept together)",
    "test": SCORES,
    "test_without_twins": {**SCORES, "n": 54},
    "twins": {"exact": 4, "near_or_mirrored": 6},
    "validation": SCORES,
}
ABSTAIN = {"threshold": 0.55, "target_accuracy": 0.8, "chosen_on": "PublicTest", "n": 20}

MATRIX = {
    "n": 10,
    "accuracy": {"value": 0.5},
    "labels": ["a", "b"],
    "per_class": {"a": {"n": 3}, "b": {"n": 7}},
    "confusion": [[1, 2], [3, 4]],
}


def write(folder, values, name="metrics.json"):
    (folder / name).write_text(json.dumps(values))
    return folder


def test_metrics_of_an_earlier_version_have_the_present_keys(tmp_path):
    write(tmp_path, OLD)
    for found in (read_metrics(tmp_path), require_metrics(tmp_path), Metrics.require(tmp_path)):
        assert found.test_without_duplicates.n == 54
        assert found.duplicates == DuplicatesRecord(
            split="test",
            n=60,
            in_train=DuplicateCounts(exact=4, augmented=None, any=6),
            in_selection=None,
            in_either=None,
        )
        assert found.selected_on == "0.1 of Training (duplicates kept together)"
        assert not [key for key in found.as_json() if "twins" in key]
        assert found.validation.as_json() == SCORES
        assert (found.judged, found.judged_split) == (found.test, "test")


def test_exact_copies_of_protocol_paper_included_augmented_ones_and_are_not_known(tmp_path):
    found = read_metrics(write(tmp_path, {**OLD, "protocol": "paper"}))
    assert found.duplicates.in_train == DuplicateCounts(exact=None, augmented=None, any=6)


@pytest.mark.parametrize("twins", [None, 3, [], {"exact": 1}])
def test_counts_that_are_not_known_are_none(tmp_path, twins):
    old = {**OLD, "twins": twins}
    if twins is None:
        old |= {"test": None, "test_without_twins": None}
    found = read_metrics(write(tmp_path, old))
    assert found.duplicates is None
    if twins is None:
        assert (found.test_without_duplicates, found.judged_split, found.judged) == (
            None,
            "validation",
            found.validation,
        )


def test_a_significant_pair_of_an_earlier_version_is_one(tmp_path):
    pair = {"a": "a", "b": "b", "difference": {"value": 0.1}, "mcnemar": {"b": 9, "c": 1, "p": 0.02}, "sentence": "A."}
    view = {**SCORES, "macro_f1": {"value": None}, "paired": {**pair, "told_apart": True}}
    found = read_metrics(write(tmp_path, {**OLD, "views": {"mirror": {"test": view}}}))
    assert found.views["mirror"]["test"].paired.is_significant


def test_what_is_read_is_written_with_the_present_schema_and_read_again(tmp_path):
    found = read_metrics(write(tmp_path, OLD))
    found.write(tmp_path)
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert values["schema"] == SCHEMA
    assert values["test"] == SCORES
    assert Metrics.require(tmp_path) == found


def test_numbers_of_numpy_become_plain_ones_and_nan_none():
    found = Estimate.build({"value": np.float32(0.5), "low": math.nan, "high": math.inf})
    assert found == Estimate(value=0.5, low=None, high=None)
    with pytest.raises(ValueError, match="finite"):
        Estimate(value=math.nan)


def test_files_that_are_absent_or_damaged(tmp_path):
    assert read_metrics(tmp_path) is Metrics.read(tmp_path) is DataRecord.read(tmp_path) is None
    with pytest.raises(ModelError, match=r"metrics\.json: there is no such file"):
        require_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"metrics\.json: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "2", True, None])
def test_a_later_schema_is_refused(tmp_path, schema):
    with pytest.raises(ModelError, match=r"metrics\.json: found schema .*, expected 2 or an earlier one.*update dlfer"):
        read_metrics(write(tmp_path, {"schema": schema, "test": SCORES}))


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        (RunRecord, "Run the experiment again."),
        (ComparisonRecord, "Run the experiment again."),
        (AuditRecord, "Audit the data again."),
        (ArtifactRecord, "Get the model again."),
    ],
)
@pytest.mark.parametrize("values", [[], {"schema": 2, "status": 3, "table": 3, "labels": 3, "format": []}])
def test_a_damaged_file_says_how_to_get_it_again(tmp_path, record, advice, values):
    with pytest.raises(ModelError, match=rf"{record.FILE}: .*found .*, expected .*\. {advice}$"):
        record.require(write(tmp_path, values, record.FILE))


def test_keys_that_a_record_does_not_know_are_left_out(tmp_path):
    found = RunRecord.require(write(tmp_path, {"schema": 2, "status": "finished", "of_tomorrow": 1}, "run.json"))
    assert found.as_json() == {"status": "finished"}


@pytest.mark.parametrize(
    ("metrics", "where"),
    [
        ([], "the file"),
        ([1], "the file"),
        ({"banner": 3}, "banner"),
        ({"abstain": 3}, "abstain"),
        ({"abstain": [1]}, "abstain"),
        ({"abstain": {"x": 1}}, r"abstain\.threshold"),
        ({"abstain": ABSTAIN | {"threshold": "high"}}, r"abstain\.threshold"),
        ({"abstain": ABSTAIN | {"threshold": True}}, r"abstain\.threshold"),
        ({"abstain": ABSTAIN | {"threshold": float("nan")}}, r"abstain\.threshold"),
        ({"abstain": ABSTAIN | {"target_accuracy": None}}, r"abstain\.target_accuracy"),
        ({"abstain": ABSTAIN | {"chosen_on": 1}}, r"abstain\.chosen_on"),
        ({"abstain": ABSTAIN | {"n": 1.5}}, r"abstain\.n"),
        ({"test": SCORES | {"accuracy": {"value": "high"}}}, r"test\.accuracy\.value"),
        ({"test": SCORES | {"per_class": {"Happy": {"n": None}}}}, r"test\.per_class\.Happy\.n"),
        ({"test": SCORES | {"n": 0}}, r"test\.n"),
        ({"test": SCORES | {"accuracy": {"value": None}}}, r"test\.accuracy"),
        ({"test": SCORES | {"accuracy": {"value": 0.5, "low": None, "high": 0.6}}}, r"test\.accuracy"),
        ({"test": SCORES | {"per_class": {"a": {"n": 3, "intervals": {"recall": [0.5]}}}}}, "test.*recall"),
        ({"test": SCORES | {"per_class": {"a": {"n": 3, "intervals": {"recall": [None, 0.5]}}}}}, "test.*recall"),
        ({"test": MATRIX | {"confusion": [[1, 2]]}}, "test"),
        ({"test": MATRIX | {"confusion": [[1], [2]]}}, "test"),
        ({"test": MATRIX | {"confusion": [[1, 2], [3, 5]]}}, "test"),
        ({"test": MATRIX | {"confusion": [[-1, 2], [3, 6]]}}, "test"),
        ({"test": MATRIX | {"labels": ["a"]}}, "test"),
        ({"test": MATRIX | {"labels": []}}, "test"),
        ({"test": MATRIX | {"per_class": {"a": {"n": 3}}}}, "test"),
        ({"test": SCORES | {"selective": {"aurc": {"value": None}}}}, r"test\.selective\.aurc"),
    ],
)
def test_damaged_metrics_are_refused_by_their_place(tmp_path, metrics, where):
    with pytest.raises(ModelError, match=rf"metrics\.json: {where}: found .*, expected .*Get the model again"):
        read_metrics(write(tmp_path, metrics))


@pytest.mark.parametrize("data", [[], {"splits": []}, {"splits": {"train": 3}}])
def test_damaged_descriptions_of_data_are_refused_by_their_place(tmp_path, data):
    with pytest.raises(ModelError, match=r"data\.json: (the file|splits|splits\.train): found .*, expected an object"):
        DataRecord.read(write(tmp_path, data, "data.json"))


def test_what_was_chosen_for_abstaining_is_read(tmp_path):
    write(tmp_path, {"banner": "Published", "abstain": ABSTAIN | {"threshold": 0}})
    found = read_metrics(tmp_path)
    assert (found.banner, found.abstain.threshold, found.abstain.n) == ("Published", 0, 20)
    write(tmp_path, {"splits": {"train": {"name": "Training", "fingerprint": "a"}}}, "data.json")
    assert DataRecord.require(tmp_path).splits["train"].fingerprint == "a"


def test_a_confusion_matrix_that_fits_its_labels_is_read(tmp_path):
    assert read_metrics(write(tmp_path, {"test": MATRIX})).test.confusion == [[1, 2], [3, 4]]
