"""Files beside a model come from others, too: what dlfer did not write is told by its place."""

import json

import pytest

from dlfer.errors import ModelError
from dlfer.experiment.records import read_metrics, read_parts

ABSTAIN = {"threshold": 0.55, "target_accuracy": 0.8, "chosen_on": "PublicTest", "n": 20}


def test_what_is_not_there_is_empty(tmp_path):
    assert read_metrics(tmp_path) == read_parts(tmp_path) == {}


def test_what_dlfer_writes_is_returned(tmp_path):
    for metrics in ({"banner": None, "abstain": None}, {"banner": "Published", "abstain": ABSTAIN | {"threshold": 0}}):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        assert read_metrics(tmp_path) == metrics
    parts = {"train": {"name": "Training", "fingerprint": "a"}}
    (tmp_path / "data.json").write_text(json.dumps({"splits": parts}))
    assert read_parts(tmp_path) == parts


@pytest.mark.parametrize(
    ("metrics", "where"),
    [
        ([], "the file"),
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
    ],
)
def test_damaged_metrics_are_refused_by_their_place(tmp_path, metrics, where):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ModelError, match=rf"metrics\.json: {where}: found .*, expected .*Get the model again"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("data", [[], {"splits": []}, {"splits": {"train": 3}}])
def test_damaged_descriptions_of_data_are_refused_by_their_place(tmp_path, data):
    (tmp_path / "data.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"data\.json: (the file|splits|splits\.train): found .*, expected an object"):
        read_parts(tmp_path)
