"""Killed in the middle, by SIGKILL and by SIGTERM: the resumed run ends with the very same weights."""

import json
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.integration.conftest import command, dlfer, environment

STEPS = 20  # 2 epochs of 10


def find_run(folder: Path) -> Path:
    return next(path.parent for path in folder.glob("small/*/run.json"))


def read_weights(run: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(run / "model" / "network.weights.h5") as file:
        file.visititems(lambda name, item: found.update({name: item[...]}) if isinstance(item, h5py.Dataset) else None)
    return found


def count_steps(run: Path) -> int:
    """Return the steps of EF-FER2 that the checkpoint holds."""
    try:
        with np.load(run / "finetune" / "checkpoint.npz", allow_pickle=False) as file:
            state = json.loads(file["record"].tobytes())["state"]
    except FileNotFoundError:
        return 0
    return state["epoch"] * STEPS // 2 + state["step"]


def has_come_so_far(out: Path, at_step: int | None) -> bool:
    """Tell whether EF-FER2 has done `at_step` steps; None asks whether EF-FER1 has begun."""
    if at_step is None:
        return any(out.glob(".cache/pretrain/*.partial/checkpoint.npz"))
    runs = list(out.glob("small/*/run.json"))
    return bool(runs) and count_steps(runs[0].parent) >= at_step


def start_and_interrupt(file: Path, out: Path, *, at_step: int | None, by: signal.Signals) -> tuple[Path, int]:
    """Run `file` until it has come so far, send the signal; return the run and the exit code."""
    process = subprocess.Popen(
        command("run", file, "--out", out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if has_come_so_far(out, at_step):
            process.send_signal(by)
            break
        time.sleep(0.02)
    process.communicate(timeout=120)
    return find_run(out), process.returncode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, np.ndarray]:
    from tests.integration.conftest import SMALL

    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(SMALL)
    done = dlfer("run", folder / "small.yaml", "--out", folder / "runs")
    assert done.returncode == 0, done.stderr
    return read_weights(find_run(folder / "runs"))


@pytest.mark.parametrize(
    ("by", "at_step", "code"),
    [
        (signal.SIGKILL, None, -9),
        (signal.SIGTERM, 13, 143),
        pytest.param(signal.SIGINT, 7, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 3, -9, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 15, -9, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_with_the_same_weights(small, tmp_path, uninterrupted, by, at_step, code):
    out = tmp_path / "runs"
    run, returned = start_and_interrupt(small, out, at_step=at_step, by=by)
    assert returned == code
    assert (at_step or 0) <= count_steps(run) < STEPS
    status = json.loads((run / "run.json").read_text())["status"]
    assert status == ("running" if by == signal.SIGKILL else "stopped")
    # As the message says: by its path alone, from wherever.
    resumed = dlfer("run", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert len(list((out / ".cache" / "pretrain").glob("*/pretrain.json"))) == 1
    weights = read_weights(run)
    assert weights.keys() == uninterrupted.keys()
    assert all(np.array_equal(weights[name], uninterrupted[name]) for name in weights)


@pytest.mark.slow
def test_the_resolved_config_runs_again_to_the_same_result(small, tmp_path, uninterrupted):
    """config.yaml of a run is an experiment file like any other."""
    out = tmp_path / "runs"
    run, _ = start_and_interrupt(small, out, at_step=1, by=signal.SIGKILL)
    again = dlfer("run", run / "config.yaml", "--out", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    weights = read_weights(find_run(tmp_path / "again"))
    assert all(np.array_equal(weights[name], uninterrupted[name]) for name in uninterrupted)


def test_max_hours_stops_cleanly_and_says_how_to_go_on(small, tmp_path):
    stopped = dlfer("run", small, "--out", tmp_path / "runs", "--max-hours", "0.000001")
    assert stopped.returncode == 0, stopped.stderr
    assert "--max-hours" in stopped.stderr
    assert "--resume" in stopped.stderr
    run = find_run(tmp_path / "runs")
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert not (run / "model").exists()
