"""audit.json: files of an earlier version are read with the present names of their keys."""

from __future__ import annotations

import json

import pytest

from dlfer.errors import ModelError
from dlfer.runs.audit_record import AuditRecord, ListedImage
from dlfer.runs.records import DuplicateCounts

IMAGE = {"split": "a", "id": "a/1", "label": "Happy"}
OLD = {
    "num_images": 9,
    "labels": ["Happy"],
    "splits": {"a": {"num_images": 9, "classes": {"Happy": 9}}},
    "distinct_images": 8,
    "duplicate_groups": 1,
    "leaks": {
        "a->b": {"exact": 4, "near_or_mirrored": 6},
        "a->c": {"exact": 5, "near_or_mirrored": 9, "from_source": 2},
    },
    "samples": {"near": [], "mirrored": [[IMAGE, IMAGE]]},
}


def test_the_audit_of_an_earlier_version_has_the_present_keys(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(OLD))
    found = AuditRecord.require(tmp_path)
    assert found.leaks == {
        "a->b": DuplicateCounts(exact=4, augmented=0, any=6),
        "a->c": DuplicateCounts(exact=None, augmented=2, any=9),
    }
    assert (found.samples.near, found.samples.flipped) == ([], [[ListedImage(**IMAGE)] * 2])
    assert not found.is_streamed
    assert found.near_groups is found.groups_across_splits is None


def test_what_is_written_is_read_back_and_upgraded_no_more(tmp_path):
    (tmp_path / "audit.json").write_text(json.dumps(OLD))
    found = AuditRecord.require(tmp_path)
    found.write(tmp_path)
    assert AuditRecord.read(tmp_path) == found
    assert json.loads((tmp_path / "audit.json").read_text())["schema"] == 2


def test_a_damaged_audit_is_refused(tmp_path):
    assert AuditRecord.read(tmp_path) is None
    for changes, message in (
        ({"leaks": {"a->b": 3}}, r"leaks\.a->b: found '3', expected an object"),
        ({"leaks": {"a->b": {"near_or_mirrored": "six"}}}, r"leaks\.a->b\.any: found 'six', expected a whole number"),
        ({"samples": []}, r"samples: found '\[\]', expected an object"),
        ({"num_images": None}, r"num_images: found 'None', expected a whole number"),
    ):
        (tmp_path / "audit.json").write_text(json.dumps(OLD | changes))
        with pytest.raises(ModelError, match=message):
            AuditRecord.read(tmp_path)
