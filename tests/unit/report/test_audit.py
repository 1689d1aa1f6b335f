"""The audit in sentences, and its page."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from dlfer.report.audit import describe_audit, list_shown, write_audit_page
from dlfer.runs.audit_record import AuditRecord, Unreadable
from dlfer.runs.records import DuplicateCounts


def _place(split, name, **more):
    return {"split": split, "id": name, "label": "Happy", **more}


@pytest.fixture
def audit() -> AuditRecord:
    return AuditRecord.build(make_values())


def make_values() -> dict:
    figure = {"value": 0.63, "low": 0.61, "high": 0.65, "n": 40}
    contested = _place("b", "b/7", plurality=["fear"], share=figure, votes={"fear": 4, "anger": 3})
    return {
        "source": "/data/<faces>.csv",
        "notes": ["2 images were resized."],
        "num_images": 50,
        "labels": ["Happy", "Sad", "Fear"],
        "splits": {
            "a": {"num_images": 40, "classes": {"Happy": 30, "Sad": 10, "Fear": 0}, "imbalance": 3.0},
            "b": {"num_images": 10, "classes": {"Happy": 5, "Sad": 5, "Fear": 0}, "imbalance": 1.0},
        },
        "unreadable": {"n": 1, "examples": ["row 3: <cut>"]},
        "distinct_images": 44,
        "duplicate_groups": 4,
        "conflicting_groups": 2,
        "near_groups": 6,
        "near_conflicting_groups": 3,
        "largest_group": 5,
        "groups_across_splits": {"exact": 1, "near": 2},
        "constant_images": 1,
        "near_constant_images": 3,
        "flat": [_place("a", "a/8", std=0.0)],
        "leaks": {"a->b": {"exact": 2, "augmented": 1, "any": 5}},
        "outliers": {
            "rule": "an outlier is far",
            "brightness": {
                "n": 1,
                "median": 120,
                "low": 10,
                "high": 200,
                "images": [_place("a", "a/8", value=0), _place("a", "a/9", value=3)],
            },
            "contrast": {"n": 0, "median": 50, "low": 5, "high": 99, "images": []},
            "size": None,
        },
        "probably_no_face": {"n": 1, "threshold": 0.3, "images": [_place("a", "a/4", distance=0.5)], "measured": "So."},
        "votes": {
            "file": "votes.csv",
            "definition": "Most say.",
            "n": 40,
            "agreement": figure,
            "ceiling": {**figure, "value": 0.7},
            "splits": {"a": {"agreement": figure, "ceiling": figure}},
            "labels": {"Happy": figure, "Sad": {"value": None, "low": None, "high": None, "n": 0}},
            "contested": [contested],
        },
        "samples": {
            "exact": [[_place("a", "a/1"), _place("b", "b/1")]],
            "near": [],
            "flipped": [[_place("a", "a/2"), _place("a", "a/3")]],
            "conflicting": [[_place("a", "a/1"), {**_place("b", "b/1"), "label": "Sad"}]],
        },
    }


def test_each_finding_is_a_sentence_with_its_numbers(audit):
    text = "\n".join(describe_audit(audit))
    for sentence in (
        "50 images (a 40, b 10) with 3 labels.",
        "5 of 10 images of b (50.0 %) have a duplicate in a (2 an exact copy, 1 an augmented copy).",
        "Distinct images: 44; of these, 4 occur more than once, 2 under different labels.",
        "duplicates make 6 groups, the largest of 5 images; groups with different labels in them: 3.",
        "a has no image of Fear.",
        "The largest class of a (Happy, 30) is 3.0 times the smallest (Sad, 10).",
        "1 image is of one colour, 2 more are nearly so",
        "Outliers: 1 in brightness.",
        "1 image is unlike the other faces",
        "63.0 % of 40 images (61.0 to 65.0)",
        "agrees with the plurality of the others on 70.0 %",
    ):
        assert sentence in text
    assert "The largest class of b" not in text


def test_clean_data_is_said_to_be_clean(audit):
    changed = {"leaks": {"a->b": DuplicateCounts(exact=0, augmented=0, any=0)}, "unreadable": Unreadable()}
    changed |= dict.fromkeys(("duplicate_groups", "near_groups", "constant_images", "near_constant_images"), 0)
    changed |= dict.fromkeys(("votes", "probably_no_face", "outliers"))
    lines = describe_audit(audit.model_copy(update=changed))
    assert "No image of b has a duplicate in a." in lines
    assert "No image occurs more than once." in lines
    assert len(lines) == 6


def test_a_file_of_votes_without_any_vote_is_said_to_have_none(audit):
    votes = audit.votes.model_copy(update={"n": 0})
    lines = describe_audit(audit.model_copy(update={"votes": votes}))
    assert lines[-1] == "votes.csv has no vote for any of these images: all counts are 0."


def test_audits_of_older_runs_and_of_streams_are_described():
    old = {
        "num_images": 3,
        "labels": ["x"],
        "splits": {"train": {"num_images": 3, "classes": {"x": 3}}},
        "distinct_images": 3,
        "duplicate_groups": 0,
        "conflicting_groups": 0,
        "constant_images": 0,
        "leaks": {},
    }
    assert describe_audit(AuditRecord.parse(old, "audit.json")) == [
        "3 images (train 3) with 1 label.",
        "No image occurs more than once.",
    ]
    streamed = {"num_images": 9, "labels": ["x", "y"], "splits": {"train": {"num_images": 9}}}
    assert (
        describe_audit(AuditRecord.build(streamed))[-1]
        == "The images are streamed, so their contents were not audited."
    )


def test_the_page_shows_each_image_once_named_and_nothing_from_outside(tmp_path, audit):
    shown = list(list_shown(audit))
    assert set(shown) == {("a", f"a/{row}") for row in (1, 2, 3, 4, 9)} | {("b", "b/1"), ("b", "b/7")}
    images = {place: np.full((150, 300, 3), 40 * row, np.uint8) for row, place in enumerate(sorted(set(shown)))}
    page = write_audit_page(tmp_path / "a.html", audit, images).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "&lt;faces&gt;.csv" in page
    assert "<cut>" not in page
    tags = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page)
    assert len(tags) == 4 + 1 + 1 + 1 + 1  # two pairs, a contradiction, contested, no face, an outlier
    assert all("labelled Happy" in alt for _, alt in tags)
    picture = Image.open(io.BytesIO(base64.b64decode(tags[0][0])))
    assert picture.size == (96, 48)
    assert "Most say." in page
    assert "fear&nbsp;4, anger&nbsp;3" in page


def test_a_streamed_audit_has_a_page_too(tmp_path):
    streamed = {
        "source": "a.yaml",
        "notes": [],
        "num_images": 9,
        "labels": ["x", "y"],
        "splits": {"train": {"num_images": 9}},
        "unreadable": {"n": 0, "examples": []},
    }
    page = write_audit_page(tmp_path / "a.html", AuditRecord.build(streamed), {}).read_text()
    assert "not audited" in page
