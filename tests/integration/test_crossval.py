"""A cross-validation with real processes on drawn faces: small, but through every step of a run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dlfer.metrics.predictions import read_predictions
from tests.integration.conftest import dlfer


@pytest.mark.slow
def test_two_folds_are_trained_pooled_and_judged(small, tmp_path):
    pretrain = ("--set", "pretrain=null")
    done = dlfer("crossval", small, "--folds", "2", *pretrain, "--workers", "2", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    path, page = map(Path, done.stdout.split())
    assert page == path / "report.html"
    with open(path / "members.csv", newline="") as file:
        members = list(csv.DictReader(file))
    assert [(m["arm"], m["seed"], m["fold"], m["status"]) for m in members] == [
        ("small", "1", "0", "finished"),
        ("small", "2", "1", "finished"),
    ]
    (row,) = json.loads((path / "comparison.json").read_text())["table"]
    found = row["cross_validated"]
    pooled = read_predictions(path / found["predictions"])
    assert len(pooled) == len(set(pooled.ids.tolist())) == 160 + 48 + 64 == found["n"]
    seen = set()
    for member, fold in zip(members, found["folds"], strict=True):
        run = Path(member["path"])
        metrics = json.loads((run / "metrics.json").read_text())
        assert (metrics["protocol"], metrics["test"]["n"]) == ("cross_validation", fold["n"])
        assert metrics["duplicates"]["in_train"]["any"] == 0
        assert metrics["test"]["accuracy"]["value"] == fold["accuracy"]["value"]
        assert sum(json.loads(line)["event"] == "test_opened" for line in (run / "log.jsonl").open()) == 1
        with np.load(run / "images.npz") as images:
            ids = [set(images[f"{part}_ids"].tolist()) for part in ("train", "validation", "test")]
        assert len(set.union(*ids)) == sum(map(len, ids)) == 272
        assert not seen & ids[2]
        seen |= ids[2]
    assert "Each of 272 images was predicted once" in done.stderr
    again = dlfer("crossval", "--resume", path)
    assert again.returncode == 0, again.stderr
    checked = dlfer(
        "check", small, "--set", "finetune.data.protocol=cross_validation", "--set", "finetune.data.folds=2"
    )
    assert checked.returncode == 0, checked.stderr
    refused = dlfer("run", small, "--set", "finetune.data.protocol=cross_validation", "--set", "finetune.data.folds=2")
    assert refused.returncode == 2
    assert "dlfer crossval trains a model for each fold" in refused.stderr
