"""Studies whose members do not train: fake_child.py writes the files of a run as the plan tells it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dlfer.config.load import load_experiment
from dlfer.runs.listeners import RunOptions

FAKE_CHILD = Path(__file__).with_name("fake_child.py")

EXPERIMENT = """\
experiment: {name: small}
finetune:
  data: {source: synthetic_faces}
  epochs: 2
sweep:
  seeds: [0]
  grid:
    model.dropout: [0.1, 0.2]
"""

SPACE = {
    "finetune.optimizer.learning_rate": {"log": [1e-4, 1e-2]},
    "finetune.optimizer.momentum": {"between": [0.8, 0.9], "when": {"finetune.optimizer.name": ["sgd"]}},
    "finetune.optimizer.name": {"choice": ["adam", "sgd"]},
    "finetune.early_stopping": {"choice": [None, {"patience": 3}]},
    "finetune.batch_size": {"between": [8, 32], "step": 8},
}


class Plan(dict):
    """What the members do, kept in a file that their processes read."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.write()

    def write(self) -> None:
        self.path.write_text(json.dumps(self))

    def __ior__(self, values):
        self.update(values)
        self.write()
        return self

    def clear(self) -> None:
        super().clear()
        self.write()


@pytest.fixture
def fake_child(tmp_path, monkeypatch) -> Plan:
    """Members are run by fake_child.py instead of a training; returns what they do, by dropout."""
    monkeypatch.setattr("dlfer.study.child.CHILD_COMMAND", (sys.executable, str(FAKE_CHILD)))
    monkeypatch.setattr("dlfer.study.runner.POLL_SECONDS", 0.02)
    monkeypatch.setenv("FAKE_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return Plan(tmp_path / "plan.json")


@pytest.fixture
def plan(fake_child) -> Plan:
    """The same, with figures for the members of which the plan says nothing."""
    fake_child |= {"right": {"train": 55, "validation": 40, "test": 30}}
    return fake_child


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """An experiment with a sweep of two cells; the runs go to saved_models/runs beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture
def options() -> RunOptions:
    return RunOptions(out=Path("runs"), argv=("dlfer", "sweep", "small.yaml"))


@pytest.fixture
def make_config(tmp_path):
    """Return a function that gives a small experiment with a search space."""
    path = tmp_path / "a.yaml"
    path.write_text("experiment: {name: a}\nfinetune: {data: {source: synthetic_faces}, epochs: 9}\n")

    def make(engine="random", space=SPACE, **given):
        return load_experiment(path, {"search": {"engine": engine, "space": space, **given}})

    return make
