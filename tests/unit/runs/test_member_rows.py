"""members.csv: what is written is read back, and so are files of earlier versions."""

from __future__ import annotations

import json

import pytest

from dlfer.errors import ModelError
from dlfer.runs.member_rows import MEMBERS_FILE, MemberRow, read_member_rows, write_member_rows

ROWS = [
    MemberRow(
        arm="with, of course",
        seed=3,
        digest="1e400000",
        path="/runs/small/a",
        status="finished",
        test_accuracy=0.1 + 0.2,
        seconds=3.0,
        settings={
            "pretrain": None,
            "model.head.hidden": [8, 4],
            "finetune.optimizer.name": "sgd",
            "model.dropout": 0.1,
        },
    ),
    MemberRow(
        arm="search", trial="0007", status="failed", error="first\nsecond", kind="DataError", is_users=True, rung=3
    ),
]


def test_rows_are_read_as_they_were_written_but_for_the_first_line_of_an_error(tmp_path):
    write_member_rows(tmp_path, ROWS)
    assert read_member_rows(tmp_path) == [ROWS[0], ROWS[1].change(error="first")]
    header = (tmp_path / MEMBERS_FILE).read_text().splitlines()[0]
    assert "model.dropout" in header
    assert header.endswith(",schema")


def test_no_file_means_no_members(tmp_path):
    assert read_member_rows(tmp_path) == []


def test_a_comparison_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / MEMBERS_FILE).write_text(
        "arm,seed,digest,path,status,train_accuracy,validation_accuracy,test_accuracy,macro_f1,seconds,pretrain_seconds,"
        "error\nwith EF-FER1,0,abcd,/runs/a,finished,0.9,0.8,0.7,0.6,12.5,,\nwithout,0,,,pending,,,,,,,\n"
    )
    first, second = read_member_rows(tmp_path)
    assert (first.arm, first.seed, first.test_accuracy, first.pretrain_seconds) == ("with EF-FER1", 0, 0.7, None)
    assert (second.status, second.path, second.settings) == ("pending", "", {})


def test_a_search_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / MEMBERS_FILE).write_text(
        "arm,trial,seed,digest,path,status,score,low,high,epochs,seconds,error,model.dropout,finetune.optimizer.name\n"
        "search,1,0,abcd,/runs/a,rung,0.5,,,3,7.5,,0.25,adam\n"
    )
    (row,) = read_member_rows(tmp_path)
    assert (row.trial, row.score, row.epochs) == ("1", 0.5, 3)
    assert row.settings == {"model.dropout": 0.25, "finetune.optimizer.name": "adam"}


def test_an_ensemble_of_an_earlier_version_is_read(tmp_path):
    members = [{"name": "one", "path": "/runs/a", "digest": "ab", "status": "finished", "note": "it saw them"}]
    (tmp_path / "members.json").write_text(json.dumps(members))
    (row,) = read_member_rows(tmp_path)
    assert (row.arm, row.path, row.digest, row.note) == ("one", "/runs/a", "ab", "it saw them")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arm,seed\nwith,x\n", r"line 2: seed: found 'x'"),
        ("seed\n1\n", r"line 2: arm"),
        ("arm,schema\nwith,2\n", r"line 2: found schema 2, expected 1; a later dlfer"),
    ],
)
def test_a_damaged_or_later_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / MEMBERS_FILE).write_text(text)
    with pytest.raises(ModelError, match=message):
        read_member_rows(tmp_path)


def test_a_member_is_found_where_it_was_or_beside_its_study(tmp_path):
    study, moved = tmp_path / "runs" / "small" / "x-sweep", tmp_path / "runs" / "small" / "a"
    study.mkdir(parents=True)
    row = MemberRow(arm="with", path="/elsewhere/small/a")
    assert row.find_folder(study) is None
    moved.mkdir()
    assert row.find_folder(study) == moved
    assert MemberRow(arm="with").find_folder(study) is None
