"""Trainings and studies tell the trackers that experiment.track names, from every process; pip install 'dlfer[mlflow,wandb]'."""

import json

import pytest

from tests.integration.conftest import command, dlfer, environment

pytestmark = pytest.mark.slow


def test_an_ablation_is_a_group_in_both_trackers(tmp_path, small):
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'dlfer[mlflow]'")
    pytest.importorskip("wandb", reason="needs pip install 'dlfer[wandb]'")
    import subprocess

    store = f"sqlite:///{tmp_path}/mlflow.db"
    words = command("ablate", small, "--smoke", "--seeds", "1", "--set", "experiment.track=[mlflow, wandb]")
    done = subprocess.run(
        words,
        cwd=tmp_path,
        env=environment(MLFLOW_TRACKING_URI=store, WANDB_MODE="offline"),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed in" not in done.stderr
    client = mlflow.MlflowClient(tracking_uri=store)
    runs = {run.info.run_id: run for run in client.search_runs([client.get_experiment_by_name("small").experiment_id])}
    members = [run for run in runs.values() if "mlflow.parentRunId" in run.data.tags]
    assert len(members) == 2
    assert len(runs) == 3
    for run in members:
        assert runs[run.data.tags["mlflow.parentRunId"]].info.run_name.endswith("-ablation")
        assert run.info.status == "FINISHED"
        assert run.data.tags["dlfer.smoke"] == "true"
        metrics = json.loads((tmp_path / "saved_models/runs" / run.data.tags["dlfer.run"] / "metrics.json").read_text())
        accuracy = metrics["test"]["accuracy"]
        assert run.data.metrics["test/accuracy"] == pytest.approx(accuracy["value"])
        assert run.data.metrics["test/accuracy_high"] == pytest.approx(accuracy["high"])
        assert "finetune/validation_loss" in run.data.metrics
        assert "finetune.epochs" in run.data.params
    assert len(list(tmp_path.glob("saved_models/runs/small/*/wandb/offline-run-*/*.wandb"))) == 2


def test_a_tracker_that_is_away_changes_nothing_but_a_warning(tmp_path, small, monkeypatch):
    pytest.importorskip("mlflow", reason="needs pip install 'dlfer[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = dlfer("run", small, "--smoke", "--set", "experiment.track=[mlflow]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MlflowTracker failed") == 1
    assert list(tmp_path.glob("saved_models/runs/small/*/report.html"))
