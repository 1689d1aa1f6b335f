"""What a run records of its training, and what an earlier version recorded."""

from __future__ import annotations

import json

import pytest

from dlfer.errors import ModelError
from dlfer.runs.run import Run
from dlfer.runs.run_records import (
    BoostedLevel,
    BoostingRecord,
    Epoch,
    Event,
    TransferRecord,
    count_openings,
    read_events,
    read_history,
)


def test_the_transfer_of_an_earlier_version_has_the_present_keys(tmp_path):
    old = {
        "carried": ["stem/kernel"],
        "fresh": ["head/kernel", "head/bias"],
        "missing": [],
        "unexpected": [],
        "feature_difference": 2e-7,
        "source": "pretrain",
    }
    (tmp_path / "transfer.json").write_text(json.dumps(old))
    found = TransferRecord.require(tmp_path)
    assert found == TransferRecord(
        loaded=["stem/kernel"],
        newly_initialised=["head/kernel", "head/bias"],
        missing=[],
        unexpected=[],
        feature_difference=2e-7,
        source="pretrain",
    )
    assert found.describe()[0] == (
        "weights: 1 loaded, 2 newly initialised (head/kernel, head/bias), 0 missing, 0 unexpected; "
        "features differ by 2.0e-07"
    )
    found.write(tmp_path)
    assert TransferRecord.require(tmp_path) == found
    assert "carried" not in (tmp_path / "transfer.json").read_text()


def test_trees_are_written_and_read(tmp_path):
    level = BoostedLevel(name="last", features=30, used=28, splits=90, gain=1.0)
    record = BoostingRecord(rounds=20, rounds_an_epoch=5, trees=140, levels=[level, level], row_weights=None)
    record.write(tmp_path)
    assert BoostingRecord.require(tmp_path) == record
    assert record.num_features == 60
    (tmp_path / "boosting.json").write_text(json.dumps({"rounds": "many"}))
    with pytest.raises(ModelError, match=r"boosting\.json: rounds: found .*, expected a whole number"):
        BoostingRecord.read(tmp_path)


def test_events_pass_over_half_a_line(tmp_path):
    assert read_events(tmp_path) == []
    lines = ['{"time": "t", "event": "finetune_end", "kept_epoch": 2, "more": 1}', "", "[1]", '{"event": "fini']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert read_events(tmp_path) == [Event(time="t", event="finetune_end", kept_epoch=2)]
    Run(tmp_path).log("test_opened")
    assert [event.event for event in read_events(tmp_path)] == ["finetune_end", "test_opened"]
    (tmp_path / "log.jsonl").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"log\.jsonl: the log cannot be read"):
        read_events(tmp_path)


def test_openings_of_the_test_split_are_counted_and_those_of_other_data_on_their_own(tmp_path):
    splits = {"train": {"name": "Training"}, "validation": {"name": "PublicTest"}}
    test = {"name": "PrivateTest", "fingerprint": "own"}
    opened = [("PrivateTest", None), ("PublicTest", None), ("copy of it", "own"), ("PrivateTest", "x"), ("other", "x")]
    lines = [{"event": "test_opened", "split": split, "fingerprint": mark} for split, mark in opened]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"event": "created"}])))
    assert count_openings(tmp_path) == 5
    (tmp_path / "data.json").write_text(json.dumps({"splits": splits}))
    assert (count_openings(tmp_path), count_openings(tmp_path, "x")) == (1, 2)
    (tmp_path / "data.json").write_text(json.dumps({"splits": {**splits, "test": test}}))
    assert (count_openings(tmp_path), count_openings(tmp_path, "own"), count_openings(tmp_path, "x")) == (2, 2, 2)
    assert count_openings(tmp_path, "never opened") == 0


def test_a_history_is_read_as_numbers(tmp_path):
    path = tmp_path / "history.csv"
    assert read_history(path) == []
    path.write_text("epoch,phase,train_loss,validation_loss,extra\n1,head,2.5,,7\n2.0,all,nan,1.5,\n")
    assert read_history(path) == [
        Epoch(epoch=1, phase="head", train_loss=2.5),
        Epoch(epoch=2, phase="all", validation_loss=1.5),
    ]
    path.write_text("epoch,phase,train_loss\n1,all,low\n")
    with pytest.raises(ModelError, match=r"history\.csv: expected a number in each cell"):
        read_history(path)
