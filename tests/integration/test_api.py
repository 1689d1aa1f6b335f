"""A run from Python: its listeners, its results, a stop by max_hours, and what a broken listener does."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import dlfer
from tests.integration.conftest import environment


class Recorder(dlfer.Listener):
    def __init__(self) -> None:
        self.calls = []

    def start(self, run_folder, config):
        self.calls.append(("start", run_folder, config.finetune.epochs))

    def step(self, stage, epoch, step, steps, values):
        self.calls.append(("step", stage, epoch, step))

    def epoch(self, stage, epoch, values):
        self.calls.append(("epoch", stage, epoch, values["validation_accuracy"]))

    def finish(self, metrics, folder):
        self.calls.append(("finish", folder, metrics.test.accuracy.value))

    def fail(self, error):
        self.calls.append(("fail", type(error).__name__))


class Broken(dlfer.Listener):
    def step(self, *given):
        raise ValueError("of the listener")


@pytest.mark.slow
def test_a_run_is_stopped_resumed_and_read(small, tmp_path, capfd):
    recorder, keys = Recorder(), {"pretrain": None, "finetune.epochs": 1}
    stopped = dlfer.run(small, keys, out=tmp_path / "runs", max_hours=1e-9, callbacks=[recorder], progress=False)
    assert stopped.status == "stopped"
    assert recorder.calls[0] == ("start", stopped.folder, 1)
    assert recorder.calls[-1] == ("fail", "TrainingStopped")
    recorder.calls.clear()
    run = stopped.resume(callbacks=[Broken(), recorder], progress=False)
    err = capfd.readouterr().err
    assert err.count("The listener Broken failed in step(): ValueError: of the listener") == 1
    assert "EF-FER2" not in err, "without progress only warnings are shown"
    assert (run.status, run.folder) == ("finished", stopped.folder)
    assert recorder.calls[0][0] == "start"
    assert recorder.calls[-1] == ("finish", run.folder, run.metrics.test.accuracy.value)
    epochs = [call for call in recorder.calls if call[0] == "epoch"]
    assert epochs == [("epoch", "finetune", 1, run.history["finetune"]["validation_accuracy"][0])]
    assert run.report.is_file()
    images = np.zeros((2, 40, 40), np.uint8)
    assert run.classifier.predict(images).shape == (2, 7)
    found = dlfer.evaluate(run, (images, [0, 6]))
    assert (found.test.n, found.judged_on.file) == (2, "arrays in memory")
    assert dlfer.evaluate(run.folder, (images, ["Angry", "Sad"])).test.labels == run.metrics.test.labels
    with pytest.raises(dlfer.DlferError, match="expected indices 0 to 6"):
        dlfer.evaluate(run, (images, [0, 7]))


ENSEMBLE = """
import dlfer

class Count(dlfer.Listener):
    started, finished = [], []

    def start(self, run_folder, config):
        self.started.append(run_folder)

    def finish(self, metrics, folder):
        self.finished.append(folder)

members = [{"name": name, "set": {"experiment.seed": seed}} for name, seed in (("a", 1), ("b", 2))]
keys = {"model.family": "ensemble", "ensemble": {"members": members}, "pretrain": None}
run = dlfer.run("small.yaml", keys, smoke=True, callbacks=[Count()])
assert len(Count.started) == len(Count.finished) == 3, Count.started
assert Count.started[0] == Count.finished[-1] == run.folder
assert run.history == {}
print("once")
"""

ABLATION = """
import dlfer

study = dlfer.ablate("small.yaml", seeds=[0], smoke=True)
assert [run.status for run in study.runs] == ["finished"] * 2
print("once")
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [ENSEMBLE, ABLATION], ids=["ensemble", "ablation"])
def test_a_script_needs_no_main_guard(small, tmp_path, text):
    """An ensemble's members are told to the callbacks; an ablation's are processes that do not import the script."""
    script = tmp_path / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"
