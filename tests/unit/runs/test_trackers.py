"""Trackers are sent parameters, metrics and files, continue a resumed run, group members, and never disturb a training.

MLflow and W&B are not needed for the other tests: pip install 'dlfer[mlflow,wandb]' (or make extra-mlflow extra-wandb).
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from dlfer.config import names
from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError, ResumeError, TrainingStopped
from dlfer.runs import trackers
from dlfer.runs.listeners import Listeners
from dlfer.runs.metrics_record import Metrics
from dlfer.runs.run import create_run
from dlfer.runs.trackers import TRACKERS, Tracker, describe_run, list_metrics, make_trackers, read_id

ACCURACY = {"value": 0.5, "low": 0.2, "high": 0.8}
METRICS = Metrics.build(
    {
        "banner": "Not a clean test.",
        "test": {
            "n": 9,
            "accuracy": ACCURACY,
            "macro_auc": {"value": None},
            "mcc": {"value": 0.1, "reason": "too few images"},
            "calibration": {"raw": {"ece_equal_mass": {"value": 0.25, "low": 0.1, "high": 0.4}}},
        },
        "validation": {"n": 8, "accuracy": ACCURACY},
    }
)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Return a function that makes a run with some keys set; it has the files of a finished one."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "a.yaml").write_text(
        "experiment: {name: small, seed: 7}\nfinetune: {data: {source: synthetic_faces}}\n"
    )

    def make(**keys):
        config = load_experiment("a.yaml", {key.replace("__", "."): value for key, value in keys.items()})
        run = create_run(tmp_path / "runs", config, argv=["dlfer"])
        run.update(git={"commit": "c0ffee", "dirty": False})
        for name in ("report.html", "metrics.json", "model/MODEL_CARD.md", "model/network.onnx"):
            (run.path / name).parent.mkdir(exist_ok=True)
            (run.path / name).write_text(name)
        return run, config

    return make


def test_parameters_are_flat_and_tags_identify_the_run(make):
    run, config = make(experiment__track=["mlflow"], search={"space": {"finetune.epochs": {"choice": [1]}}})
    found = describe_run(run.path, config)
    assert found.parameters["finetune.epochs"] == str(config.finetune.epochs)
    assert found.parameters["finetune.data.source"] == "synthetic_faces"
    assert found.parameters["pretrain"] == "null"
    assert found.parameters["model.branches"] == "[]"
    assert not [key for key in found.parameters if key.startswith(("search", "sweep", "experiment.track"))]
    assert found.tags["digest"] == run.path.name.rpartition("-")[2]
    assert {"seed": "7", "protocol": "official", "commit": "c0ffee"}.items() <= found.tags.items()
    assert "smoke" not in found.tags
    assert found.study is None
    run.update(smoke=True, study="small/X-ablation", git=None)
    member = describe_run(run.path, config)
    assert (member.tags["smoke"], member.study) == ("true", run.path.parent / "X-ablation")
    assert "commit" not in member.tags


def test_metrics_have_n_and_the_ends_of_their_intervals():
    assert list_metrics(METRICS) == {
        "test/n": 9.0,
        "test/accuracy": 0.5,
        "test/accuracy_low": 0.2,
        "test/accuracy_high": 0.8,
        "test/mcc": 0.1,
        "test/ece": 0.25,
        "test/ece_low": 0.1,
        "test/ece_high": 0.4,
        "validation/n": 8.0,
        "validation/accuracy": 0.5,
        "validation/accuracy_low": 0.2,
        "validation/accuracy_high": 0.8,
    }
    assert list_metrics(None) == {}


class Recorder(Tracker):
    """A tracker that records what it is sent; `broken` names the method that fails."""

    name = "recorder"

    def __init__(self, broken=None):
        super().__init__()
        self.calls, self.broken = [], broken

    def note(self, *call):
        self.calls.append(call)
        if call[0] == self.broken:
            raise OSError("connection refused")

    def open(self, run, known):
        self.note("open", run.name, known)
        return known or "id1"

    def log_epoch(self, stage, epoch, values):
        self.note("log_epoch", epoch, values)

    def close(self, values, banner, files, model):
        self.note("close", len(values), banner, [path.name for path in files], model)

    def abandon(self, *, is_stopped):
        self.note("abandon", is_stopped)


def tell_all(tracker, run, config, *, warn):
    listeners = Listeners([tracker], warn)
    listeners.start(run.path, config)
    listeners.step("finetune", 1, 1, 1, {"loss": 1.0})
    listeners.epoch("finetune", 1, {"train_loss": 2, "validation_accuracy": 0.5})
    listeners.finish(METRICS, run.path)


@pytest.mark.parametrize("stores_model", [False, True])
def test_a_tracker_is_sent_the_epochs_the_metrics_and_the_files(make, stores_model):
    run, config = make(experiment__track_model=stores_model)
    tracker, warnings = Recorder(), []
    tell_all(tracker, run, config, warn=warnings.append)
    assert warnings == []
    assert tracker.calls == [
        ("open", f"small/{run.path.name}", None),
        ("log_epoch", 1, {"finetune/train_loss": 2.0, "finetune/validation_accuracy": 0.5}),
        (
            "close",
            12,
            "Not a clean test.",
            ["report.html", "metrics.json", "MODEL_CARD.md"],
            run.path / "model" if stores_model else None,
        ),
    ]
    again = Recorder()
    again.start(run.path, config)
    assert again.calls == [("open", f"small/{run.path.name}", "id1")]


@pytest.mark.parametrize(
    ("method", "called"),
    [
        ("open", ["open"]),
        ("log_epoch", ["open", "log_epoch", "close"]),
        ("close", ["open", "log_epoch", "log_epoch", "close"]),
    ],
)
def test_a_tracker_that_fails_is_one_warning_and_is_sent_no_further_epochs(make, method, called):
    run, config = make()
    tracker, warnings = Recorder(broken=method), []
    listeners = Listeners([tracker], warnings.append)
    listeners.start(run.path, config)
    for epoch in (1, 2):
        listeners.epoch("finetune", epoch, {"train_loss": 2.0})
    listeners.finish(METRICS, run.path)
    assert len(warnings) == 1
    assert "Recorder failed" in warnings[0]
    assert "connection refused" in warnings[0]
    assert [call[0] for call in tracker.calls] == called


@pytest.mark.parametrize(
    ("error", "is_stopped"),
    [
        (TrainingStopped("stopped", reason="Ctrl-C"), True),
        (KeyboardInterrupt(), True),
        (ResumeError("the data has changed"), True),
        (ValueError("x"), False),
        (MemoryError(), False),
    ],
)
def test_a_run_that_can_be_resumed_is_stopped_and_another_has_failed(make, error, is_stopped):
    tracker = Recorder()
    run, config = make()
    tracker.start(run.path, config)
    tracker.fail(error)
    assert tracker.calls[1:] == [("abandon", is_stopped)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"mlflow": 3}', '{"wandb": "a"}', '"mlflow"'])
def test_damaged_ids_are_as_none(make, text):
    run, _ = make()
    (run.path / "trackers.json").write_text(text)
    assert read_id(run.path, "mlflow") is None
    trackers.write_id(run.path, "mlflow", "b")
    assert read_id(run.path, "mlflow") == "b"


def test_each_name_has_a_tracker_and_an_extra():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert set(TRACKERS) == set(names.TRACKERS) <= set(extras)


def test_names_are_validated_and_each_tracker_is_made_once(make):
    assert [tracker.name for tracker in make_trackers(["wandb", "mlflow", "wandb"])] == ["wandb", "mlflow"]
    assert make_trackers(()) == []
    _, config = make(experiment__track=["mlflow", "wandb"])
    assert config.experiment.track == ("mlflow", "wandb")
    for wrong in (["mlfow"], "mlflow", ["tensorboard"]):
        with pytest.raises(ConfigError, match=r"experiment\.track"):
            make(experiment__track=wrong)


def need(package):
    return pytest.importorskip(package, reason=f"needs pip install 'dlfer[{package}]'")


def stop_and_resume(name, run, config):
    """Tell a tracker of a run that is stopped after an epoch and resumed; return its id."""
    for epoch in (1, 2):
        warnings = []
        listeners = Listeners(make_trackers([name]), warnings.append)
        listeners.start(run.path, config)
        listeners.epoch("finetune", epoch, {"train_loss": 3.0 - epoch})
        if epoch == 1:
            listeners.fail(KeyboardInterrupt())
        else:
            listeners.finish(METRICS, run.path)
        assert warnings == []
    return read_id(run.path, name)


def test_mlflow_has_one_run_for_a_training_that_was_resumed(make):
    mlflow = need("mlflow")
    run, config = make(experiment__track_model=True)
    found = stop_and_resume("mlflow", run, config)
    client = mlflow.MlflowClient()
    [only] = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert only.info.run_id == found
    assert (only.info.status, only.info.run_name) == ("FINISHED", run.path.name)
    assert only.data.params["experiment.seed"] == "7"
    assert {"test/n": 9.0, "test/accuracy_low": 0.2}.items() <= only.data.metrics.items()
    history = [(point.step, point.value) for point in client.get_metric_history(found, "finetune/train_loss")]
    assert history == [(1, 2.0), (2, 1.0)]
    assert only.data.tags["dlfer.banner"] == "Not a clean test."
    assert only.data.tags["mlflow.source.git.commit"] == "c0ffee"
    files = {artifact.path for artifact in client.list_artifacts(found)}
    assert files == {"report.html", "metrics.json", "MODEL_CARD.md", "model"}
    # Where the tracker has the run no more, there is a new one.
    client.delete_run(found)
    assert stop_and_resume("mlflow", run, config) != found


def test_mlflow_groups_the_members_of_a_study(make, monkeypatch):
    mlflow = need("mlflow")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    study = create_run(make()[0].path.parents[1], make()[1], argv=[], kind="ablation")
    members = []
    for seed in (0, 1):
        run, config = make(experiment__seed=seed)
        run.update(study=f"small/{study.path.name}")
        members.append(stop_and_resume("mlflow", run, config))
    client = mlflow.MlflowClient()
    runs = {run.info.run_id: run for run in client.search_runs([client.get_experiment_by_name("mine").experiment_id])}
    parent = read_id(study.path, "mlflow")
    assert set(runs) == {*members, parent}
    assert {runs[member].data.tags["mlflow.parentRunId"] for member in members} == {parent}
    assert runs[parent].info.run_name == study.path.name


def test_an_mlflow_server_that_is_away_is_one_warning(make, monkeypatch):
    need("mlflow")
    for name, value in {"TRACKING_URI": "http://127.0.0.1:9", "HTTP_REQUEST_MAX_RETRIES": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    run, config = make()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warnings = []
    tell_all(TRACKERS["mlflow"](), run, config, warn=warnings.append)
    assert len(warnings) == 1
    assert "MlflowTracker failed in start()" in warnings[0]
    assert read_id(run.path, "mlflow") is None


def test_wandb_has_one_run_for_a_training_that_was_resumed(make):
    wandb = need("wandb")
    run, config = make(experiment__track_model=True)
    run.update(study="small/20260101T000000Z-abcd1234-ablation")
    found = stop_and_resume("wandb", run, config)
    wandb.teardown()  # as at the end of the process: W&B's own process writes the last lines a moment after the run is finished
    logs = sorted(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in logs] == [f"run-{found}.wandb"] * 2
    first, second = (path.read_bytes() for path in logs)
    for word in ("finetune.data.source", "finetune/train_loss", "seed: 7", "20260101T000000Z-abcd1234-ablation"):
        assert word.encode() in first, word
    for word in ("test/accuracy_low", "test/n", "not a clean test", "report.html", "network.onnx", "MODEL_CARD.md"):
        assert word.encode() in second, word
        assert word.encode() not in first, word


def test_wandb_without_a_key_is_one_warning_and_asks_nobody(make, monkeypatch, tmp_path):
    wandb = need("wandb")
    run, config = make()
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    monkeypatch.setattr(wandb.setup().settings, "mode", "online")
    warnings = []
    tell_all(TRACKERS["wandb"](), run, config, warn=warnings.append)
    assert len(warnings) == 1
    assert "wandb login" in warnings[0]
    assert json.loads((run.path / "run.json").read_text())["status"] == "running"
