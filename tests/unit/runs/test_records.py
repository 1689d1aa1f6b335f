"""Records that an earlier version wrote are read with the present names of their keys."""

from __future__ import annotations

import json

import pytest

from dlfer.errors import ModelError
from dlfer.runs.evaluations import read_metrics
from dlfer.runs.records import read_audit, upgrade_audit, upgrade_metrics
from dlfer.runs.run import Run

SCORES = {"n": 60, "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6}}
OLD = {
    "protocol": "official",
    "selected_on": "0.1 of Training (twins kept together)",
    "test": SCORES,
    "test_without_twins": {**SCORES, "n": 54},
    "twins": {"exact": 4, "near_or_mirrored": 6},
    "validation": SCORES,
}


def test_metrics_of_an_earlier_version_have_the_present_keys(tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(OLD))
    for found in (read_metrics(tmp_path), Run(tmp_path).read_metrics()):
        assert found["test_without_duplicates"]["n"] == 54
        assert found["duplicates"] == {
            "split": "test",
            "n": 60,
            "in_train": {"exact": 4, "augmented": None, "any": 6},
            "in_selection": None,
            "in_either": None,
        }
        assert found["selected_on"] == "0.1 of Training (duplicates kept together)"
        assert not [key for key in found if "twins" in key]
        assert found["validation"] == SCORES


def test_exact_copies_of_protocol_paper_included_augmented_ones_and_are_not_known():
    assert upgrade_metrics({**OLD, "protocol": "paper"})["duplicates"]["in_train"] == {
        "exact": None,
        "augmented": None,
        "any": 6,
    }


def test_a_run_that_was_not_judged_on_test_has_no_counts():
    old = {**OLD, "test": None, "test_without_twins": None, "twins": None}
    found = upgrade_metrics(old)
    assert found["duplicates"] is found["test_without_duplicates"] is None
    for damaged in (3, [], {"exact": 1}):
        assert upgrade_metrics({**OLD, "twins": damaged})["duplicates"] is None


def test_present_metrics_stay_as_they_are():
    present = upgrade_metrics(OLD)
    assert upgrade_metrics(present) == present
    assert upgrade_metrics({"banner": None, "test_opened": 1}) == {"banner": None, "test_opened": 1}


def test_the_audit_of_an_earlier_version_has_the_present_keys(tmp_path):
    leaks = {
        "a->b": {"exact": 4, "near_or_mirrored": 6},
        "a->c": {"exact": 5, "near_or_mirrored": 9, "from_source": 2},
    }
    (tmp_path / "audit.json").write_text(json.dumps({"leaks": leaks, "samples": {"near": [], "mirrored": [1]}}))
    found = read_audit(tmp_path)
    assert found["leaks"] == {
        "a->b": {"exact": 4, "augmented": 0, "any": 6},
        "a->c": {"exact": None, "augmented": 2, "any": 9},
    }
    assert found["samples"] == {"near": [], "flipped": [1]}
    assert upgrade_audit(found) == found


def test_files_that_are_absent_or_damaged(tmp_path):
    assert read_metrics(tmp_path) is read_audit(tmp_path) is None
    with pytest.raises(ModelError, match=r"metrics\.json: there is no such file"):
        Run(tmp_path).read_metrics()
    (tmp_path / "metrics.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"metrics\.json: not JSON"):
        Run(tmp_path).read_metrics()
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"metrics\.json: the file: found '\[1\]', expected an object"):
        read_metrics(tmp_path)
