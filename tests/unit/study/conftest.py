"""A sweep whose members do not train: each process writes the files of a run as the cell's dropout tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlfer.runs.options import RunOptions

EXPERIMENT = """\
experiment: {name: small}
finetune:
  data: {source: synthetic_faces}
sweep:
  seeds: [0]
  grid:
    model.dropout: [0.1, 0.2]
"""

CHILD = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from dlfer.errors import DataError, NonFiniteError
from dlfer.metrics.predictions import Predictions, write_predictions
from dlfer.metrics.scores import compute_metrics_file
from dlfer.runs.run import Run

run, plan = Run(Path(sys.argv[1])), json.loads(sys.argv[2])
config = run.config()
what = plan.get(f"{config.model.dropout:g}", {})
with (run.path / "begun.txt").open("a") as file:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), file=file)
with run.hold():
    run.update(status="running")
    if what.get("do") == "fail":
        run.fail(NonFiniteError("the loss became nan.\\nsecond line"))
        sys.exit(1)
    if what.get("do") == "refuse":
        run.fail(DataError("no such file."))
        sys.exit(2)
    if what.get("do") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what.get("do") == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (run.stop("SIGTERM"), os._exit(143)))
        (run.path / "waits").touch()
        time.sleep(60)
    rng = np.random.default_rng(config.experiment.seed)
    right = {"train": 55, "validation": 40, "test": 30} | what.get("right", {})
    parts = {}
    for part in plan.get("parts", ["train", "validation", "test"]):
        targets = np.arange(60) % 2
        hit = np.arange(60) < right[part] + rng.integers(0, 3)
        probabilities = np.full((60, 2), 0.2)
        probabilities[np.arange(60), np.where(hit, targets, 1 - targets)] = 0.8
        parts[part] = Predictions([f"{part}/{i}" for i in range(60)], ("a", "b"), targets, probabilities)
        write_predictions(parts[part], run.path / "predictions" / f"{part}.npz")
    metrics = compute_metrics_file(parts, protocol="official", banner=None, selected_on="PublicTest")
    metrics.write(run.path)
    run.update(cost={"finetune_seconds": 3.0, "pretrain_seconds": None})
    (run.path / "finetune").mkdir(exist_ok=True)
    (run.path / "finetune" / "history.csv").write_text(
        "epoch,phase,train_loss,train_accuracy,validation_loss,validation_accuracy\\n1,all,1,0.5,1,0.5\\n2,all,1,0.6,1,0.6\\n"
    )
    run.finish()
"""


@pytest.fixture
def plan(monkeypatch) -> dict:
    """What the members do, by dropout: {"0.1": {"do": "fail" | "refuse" | "die" | "wait", "right": {part: images}}}."""
    plan: dict = {}

    def start(run: Path, place, *, hint, require_gpu, log):
        command = [sys.executable, "-c", CHILD, str(run), json.dumps(plan)]
        root = str(Path(__file__).parents[3])
        return subprocess.Popen(command, env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", **place.environment})

    monkeypatch.setattr("dlfer.study.parallel.start_child", start)
    monkeypatch.setattr("dlfer.study.parallel.POLL_SECONDS", 0.02)
    return plan


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
