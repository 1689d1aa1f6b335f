"""The ablation: arms share EF-FER1, seeds and data; it resumes; its files say what they must."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import keras
import pytest

from dlfer.errors import ConfigError, TrainingStopped
from dlfer.experiment.run import run_experiment
from dlfer.runs.listeners import RunOptions
from dlfer.study.ablation import ABLATION, EQUAL_COMPUTE, WITH, WITHOUT
from tests.integration.conftest import SMALL, command, dlfer, environment

FAST = {"experiment.deterministic": False, "experiment.checkpoint_minutes": 5.0, "finetune.ema": None}


def read_members(path: Path) -> list[dict]:
    with open(path / "members.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    """Two seeds, three arms: six runs, one EF-FER1."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "small.yaml").write_text(SMALL)
    overrides = {**FAST, "ablation.equal_compute": True, "finetune.epochs": 1}
    options = RunOptions(overrides=overrides, out=folder / "runs", argv=("dlfer", "ablate", "small.yaml"))
    return ABLATION.start(folder / "small.yaml", options, seeds=[0, 1], workers=2)


@pytest.mark.slow
def test_members_are_ordinary_runs(ablation):
    members = read_members(ablation)
    assert [(m["arm"], m["seed"]) for m in members] == [
        (arm, s) for s in "01" for arm in (WITH, WITHOUT, EQUAL_COMPUTE)
    ]
    assert {m["status"] for m in members} == {"finished"}
    for member in members:
        path = Path(member["path"])
        for name in [
            "run.json",
            "config.yaml",
            "data.json",
            "audit.json",
            "log.jsonl",
            "metrics.json",
            "report.html",
            "finetune/history.csv",
            "model/artifact.json",
            "predictions/test.npz",
            "predictions/validation.npz",
            "figures/augmented.png",
        ]:
            assert (path / name).exists(), name
        metrics = json.loads((path / "metrics.json").read_text())
        assert metrics["test"]["n"] == 64
        assert float(member["test_accuracy"]) == metrics["test"]["accuracy"]["value"]


@pytest.mark.slow
def test_one_ef_fer1_is_shared_by_arms_and_seeds(ablation):
    cache = ablation.parent.parent / ".cache" / "pretrain"
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
    digests = set()
    for member in read_members(ablation):
        record = Path(member["path"]) / "transfer.json"
        assert record.exists() == (member["arm"] == WITH)
        if record.exists():
            transfer = json.loads(record.read_text())
            assert transfer["missing"] == transfer["unexpected"] == []
            assert transfer["feature_difference"] <= 1e-5
            digests.add((Path(member["path"]) / "pretrain" / "backbone.json").read_text())
    assert len(digests) == 1


@pytest.mark.slow
def test_equal_compute_gets_the_cost_of_ef_fer1_as_epochs(ablation):
    """EF-FER1 saw 64 images of 32 px once, an epoch of EF-FER2 is 160 images of 32 px: one epoch more."""
    epochs = {}
    for member in read_members(ablation):
        rows = (Path(member["path"]) / "finetune" / "history.csv").read_text().splitlines()
        epochs[member["arm"]] = len(rows) - 1
    assert epochs == {WITH: 1, WITHOUT: 1, EQUAL_COMPUTE: 2}


@pytest.mark.slow
def test_comparison_has_table_differences_and_sentences(ablation):
    comparison = json.loads((ablation / "comparison.json").read_text())
    assert [row["arm"] for row in comparison["table"]] == [WITH, WITHOUT, EQUAL_COMPUTE]
    for row in comparison["table"]:
        assert row["seeds"] == [0, 1]
        for part in ("train", "validation", "test"):
            assert row[part]["low"] <= row[part]["value"] <= row[part]["high"]
        per_seed = [float(m["test_accuracy"]) for m in read_members(ablation) if m["arm"] == row["arm"]]
        assert row["test"]["value"] == pytest.approx(sum(per_seed) / 2)
    assert [(pair["a"], pair["b"]) for pair in comparison["paired"]] == [(WITH, WITHOUT), (WITH, EQUAL_COMPUTE)]
    assert all("95 %" in pair["sentence"] for pair in comparison["paired"])
    assert comparison["judged_on"] == "test"
    page = (ablation / "report.html").read_text()
    assert comparison["paired"][0]["sentence"][:40] in page
    assert comparison["paired"][0]["unit"] == "percentage points"
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ablation_that_is_stopped_goes_on_with_the_members_that_were_running(small, tmp_path, workers, number):
    process = subprocess.Popen(
        command("ablate", small, "--seeds", "0", "--workers", workers, "--out", tmp_path / "runs"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/small/*/finetune/checkpoint.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], said
    path = next((tmp_path / "runs" / "small").glob("*-ablation"))
    assert f"Continue with: dlfer ablate --resume {path}" in said
    before = read_members(path)
    assert "stopped" in {m["status"] for m in before}
    done = dlfer("ablate", "--resume", path)
    assert done.returncode == 0, done.stderr
    after = read_members(path)
    assert [m["status"] for m in after] == ["finished", "finished"]
    assert all(new["path"] == old["path"] for new, old in zip(after, before, strict=True) if old["path"])


@pytest.mark.slow
def test_a_member_whose_process_is_killed_goes_on_from_its_checkpoint(small, tmp_path):
    process = subprocess.Popen(
        command("ablate", small, "--seeds", "0", "--set", "finetune.epochs=4", "--out", tmp_path / "runs"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/small/*/finetune/checkpoint.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    run = next(tmp_path.glob("runs/small/*/finetune/checkpoint.npz")).parents[1]
    os.kill(json.loads((run / "run.json").read_text())["pid"], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "was ended by SIGKILL; it may have run out of memory; it continues from its last checkpoint" in said
    events = [json.loads(line)["event"] for line in (run / "log.jsonl").open()]
    assert events.count("finished") == 1


@pytest.mark.slow
def test_max_hours_ends_before_the_first_member(small, tmp_path):
    options = RunOptions(overrides=FAST, out=tmp_path / "runs", max_hours=1e-9)
    with pytest.raises(TrainingStopped):
        ABLATION.start(small, options, seeds=[0])
    path = next((tmp_path / "runs" / "small").glob("*-ablation"))
    assert json.loads((path / "run.json").read_text())["status"] == "stopped"
    assert {m["status"] for m in read_members(path)} <= {"stopped", "pending"}
    assert ABLATION.resume(path, RunOptions(out=tmp_path / "runs")) == path
    assert [m["status"] for m in read_members(path)] == ["finished", "finished"]


def test_without_ef_fer1_there_is_nothing_to_leave_out(small, tmp_path):
    with pytest.raises(ConfigError, match="no EF-FER1 to leave out"):
        ABLATION.start(small, RunOptions(overrides={"pretrain": None}, out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_that_did_not_learn_says_so_in_the_terminal_and_on_its_page(small, tmp_path, capsys):
    overrides = {**FAST, "pretrain": None, "finetune.epochs": 1, "finetune.optimizer.learning_rate": 1e-12}
    path = run_experiment(small, RunOptions(overrides=overrides, out=tmp_path / "runs"))
    (warning,) = [text for text in json.loads((path / "run.json").read_text())["warnings"] if "did not learn" in text]
    assert "training images" in warning
    assert "did not learn" in " ".join(capsys.readouterr().err.split())
    assert warning.replace("'", "&#39;") in (path / "report.html").read_text()
    keras.backend.clear_session()
