"""Commands that are killed leave no partial file, can be repeated, and studies end as if they had not been killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import dlfer as package
from dlfer.predict.engines import load_engine
from dlfer.runs.find import list_models
from dlfer.runs.member_rows import read_member_rows
from tests.integration.conftest import command, dlfer, environment

DIE = """
import os, signal, sys
left = int(sys.argv[1])

def count(event, arguments):
    # Every file and folder of a result gets its name by a rename.
    global left
    if event == "os.rename":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
from dlfer.cli import main
main(sys.argv[2:])
"""
STEPS = (1, 2, 4, 8, 16)


def run_and_kill(step: int, *arguments: object, cwd: Path) -> int:
    """Run `dlfer`, kill it before its rename number `step`, counted from 1, and return the exit code."""
    line = [sys.executable, "-c", DIE, str(step), *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, timeout=600, check=False).returncode


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that has ended."""
    from tests.integration.conftest import SMALL

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(SMALL)
    done = dlfer("run", folder / "small.yaml", "--out", folder / "runs")
    assert done.returncode == 0, done.stderr
    return next(path.parent for path in folder.glob("runs/small/*/run.json"))


def kill_later_and_later(*arguments: object, cwd: Path, look: Callable[[], None]) -> None:
    """Kill a command in its beginning, then later and later, until it ends by itself; `look` at what is there each time."""
    for step in STEPS:
        code = run_and_kill(step, *arguments, cwd=cwd)
        look()
        if code != -signal.SIGKILL:
            assert code == 0
            assert step > 1, "nothing is renamed, so that nothing was killed"
            return
    assert dlfer(*arguments, cwd=cwd).returncode == 0
    look()


@pytest.mark.slow
def test_export(finished, tmp_path):
    target = tmp_path / "exports" / "onnx"

    def look() -> None:
        if target.exists():  # whole: its manifest is compared before it answers
            images = np.zeros((2, 48, 48, 1), np.uint8)
            assert load_engine(str(target), "onnx").predict(images).shape == (2, 7)

    arguments = ["export", finished, "--to", "onnx", "--out", tmp_path / "exports", "--force"]
    kill_later_and_later(*arguments, cwd=tmp_path, look=look)
    assert target.exists()


@pytest.mark.slow
def test_ship(finished, tmp_path, monkeypatch):
    target = tmp_path / "saved_models" / "shipped"
    monkeypatch.chdir(tmp_path)

    def look() -> None:
        assert ("shipped" in list_models()) == target.exists()
        if target.exists():
            assert package.load(str(target)).predict(np.zeros((2, 48, 48, 1), np.uint8)).shape == (2, 7)

    kill_later_and_later("ship", finished, "shipped", cwd=tmp_path, look=look)
    assert target.exists()


@pytest.mark.slow
def test_prepare(tmp_path):
    from tests.unit.data.test_tfds_fer2013 import USAGES, write_csv, write_experiment

    write_csv(tmp_path / "data", USAGES)
    file = write_experiment(tmp_path)
    for step in STEPS:
        if run_and_kill(step, "prepare", file, cwd=tmp_path) == 0:
            break
    done = dlfer("prepare", file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train 14" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_verb_without_checkpoints_leaves_no_temporary_files(finished, tmp_path, number):
    out = tmp_path / "exports"
    process = subprocess.Popen(
        command("export", finished, "--to", "onnx", "--out", out),
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
    )
    while not list(out.glob(".onnx-*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode in (128 + number, -number), error.decode()[-3000:]
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once_and_the_run_goes_on(small, tmp_path):
    process = subprocess.Popen(
        command("run", small, "--out", tmp_path / "runs", "--set", "finetune.epochs=50", "--no-cache"),
        env=environment(),
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob("runs/small/*/finetune/checkpoint.npz")) and process.poll() is None:
        time.sleep(0.05)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (run,) = (path.parent for path in tmp_path.glob("runs/small/*/run.json"))
    assert json.loads((run / "run.json").read_text())["status"] in ("stopped", "interrupted", "failed")
    assert not list(run.rglob(".dlfer-*"))
    assert dlfer("run", "--resume", run, "--max-hours", "0.000001").returncode == 0


GRID = "sweep.grid.rate={low: {finetune.optimizer.learning_rate: 1e-4}, high: {finetune.optimizer.learning_rate: 1e-3}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "options"),
    [("ablate", ["--seeds", "0"]), ("sweep", ["--set", GRID]), ("ablate", ["--seeds", "0", "--workers", "2"])],
)
def test_a_study_killed_with_its_members_running_ends_as_one_that_was_not(small, tmp_path, verb, options):
    def read(out: Path) -> dict[str, np.ndarray]:
        study = next(out.glob(f"small/*-{verb if verb == 'sweep' else 'ablation'}"))
        rows = read_member_rows(study)
        assert [row.status for row in rows] == ["finished", "finished"]
        return {row.arm: np.load(Path(row.path) / "predictions" / "test.npz")["probabilities"] for row in rows}

    whole = dlfer(verb, small, *options, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    process = subprocess.Popen(command(verb, small, *options, "--out", out), env=environment(), stderr=subprocess.PIPE)
    while not list(out.glob("small/*/finetune/checkpoint.npz")) and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    runs = [path.parent for path in out.glob("small/*/finetune")]
    deadline = time.monotonic() + 120
    while any(is_running(run) for run in runs) and time.monotonic() < deadline:
        time.sleep(0.1)  # its members notice that it is gone, and stop at a checkpoint
    assert not any(is_running(run) for run in runs)
    study = next(path for path in out.glob("small/*") if path.name.endswith(("-sweep", "-ablation")))
    workers = options[options.index("--workers") :] if "--workers" in options else []
    resumed = dlfer(verb, "--resume", study, *workers)  # another number of threads would round differently
    assert resumed.returncode == 0, resumed.stderr
    assert "Traceback" not in resumed.stderr
    assert not list(out.rglob(".dlfer-*"))
    expected, found = read(tmp_path / "whole"), read(out)
    assert expected.keys() == found.keys()
    for arm in expected:
        np.testing.assert_array_equal(expected[arm], found[arm])


def is_running(run: Path) -> bool:
    """Return whether the process that a run's record names is alive."""
    try:
        os.kill(json.loads((run / "run.json").read_text())["pid"], 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_two_processes_on_one_run_and_a_run_that_was_moved(small, tmp_path):
    first = subprocess.Popen(
        command("run", small, "--out", tmp_path / "runs", "--set", "finetune.epochs=50"),
        env=environment(),
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.glob("runs/small/*/finetune/checkpoint.npz")) and first.poll() is None:
        time.sleep(0.05)
    (run,) = (path.parent for path in tmp_path.glob("runs/small/*/run.json"))
    second = dlfer("run", "--resume", run)
    assert second.returncode == 2, second.stderr
    assert "Traceback" not in second.stderr
    assert first.poll() is None  # it is not disturbed
    first.kill()
    first.communicate()
    # Moved to another folder, under another name, it goes on from its checkpoint.
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    os.rename(run, moved)
    resumed = dlfer("run", "--resume", moved, "--max-hours", "0.0001", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "Traceback" not in resumed.stderr
