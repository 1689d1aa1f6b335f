"""Killed in the middle, by SIGKILL and by SIGTERM: the resumed run ends with the very same weights."""

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

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
    # What libraries log is kept back.
    assert not re.search(r"^[IWE]\d{4} |oneDNN|absl", done.stderr, re.MULTILINE), done.stderr
    return read_weights(find_run(folder / "runs"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "at_step", "code"),
    [
        (signal.SIGKILL, None, -9),
        (signal.SIGTERM, 13, 143),
        (signal.SIGINT, 7, 130),
        (signal.SIGKILL, 3, -9),
        (signal.SIGKILL, 15, -9),
    ],
)
def test_resumed_run_ends_with_the_same_weights(small, tmp_path, uninterrupted, by, at_step, code):
    out = tmp_path / "runs"
    run, returned = start_and_interrupt(small, out, at_step=at_step, by=by)
    assert returned == code
    assert (at_step or 0) <= count_steps(run) < STEPS
    status = json.loads((run / "run.json").read_text())["status"]
    assert status == ("running" if by == signal.SIGKILL else "stopped")
    if at_step == 15:  # as the scripts of deploy/ do, which do not know the run
        resumed = dlfer("run", small, "--out", out, "--continue")
    else:  # as the message says: by its path alone, from wherever
        resumed = dlfer("run", "--resume", run, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert [path.parent for path in out.glob("small/*/run.json")] == [run]
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


@pytest.mark.slow
def test_max_hours_stops_cleanly_and_says_how_to_go_on(small, tmp_path):
    stopped = dlfer("run", small, "--out", tmp_path / "runs", "--max-hours", "0.000001")
    assert stopped.returncode == 0, stopped.stderr
    assert "--max-hours" in stopped.stderr
    assert "--resume" in stopped.stderr
    run = find_run(tmp_path / "runs")
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    assert not (run / "model").exists()


FOLDER = """
experiment: {name: small, seed: 1, checkpoint_minutes: 0}
model: {backbone: resnet_nano}
finetune:
  data: {source: folder, path: FACES, protocol: resplit}
  epochs: 2
  batch_size: 16
  image_size: 32
evaluate: {num_train: 0}
"""


def draw_faces(folder: Path) -> None:
    """Write twenty grey pictures for each of two labels."""
    for number, label in enumerate(("happy", "sad")):
        (folder / label).mkdir(parents=True)
        for index in range(20):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (32, 32), np.uint8)
            Image.fromarray(pixels).save(folder / label / f"im{index:02}.png")


@pytest.mark.slow
def test_a_run_whose_data_changed_is_not_resumed_unless_that_is_accepted(tmp_path):
    faces, file, out = tmp_path / "faces", tmp_path / "r.yaml", tmp_path / "runs"
    draw_faces(faces)
    file.write_text(FOLDER.replace("FACES", str(faces)))
    stopped = dlfer("run", file, "--out", out, "--max-hours", "0.000001")
    assert stopped.returncode == 0, stopped.stderr
    # A copy of the run, and of the data at another place, goes on; the run itself does not once its data has changed.
    run = find_run(out)
    copied = tmp_path / "copied" / "small" / run.name
    shutil.copytree(run, copied)
    shutil.copytree(faces, tmp_path / "moved")
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace(str(faces), str(tmp_path / "moved")))
    went_on = dlfer("run", "--resume", copied)
    assert went_on.returncode == 0, went_on.stderr

    shutil.copy(faces / "happy" / "im00.png", faces / "happy" / "new.png")
    (faces / "sad" / "im03.png").unlink()
    refused = dlfer("run", "--resume", run)
    assert refused.returncode == 2
    assert "1 added (happy/new.png)" in refused.stderr
    assert "1 removed (sad/im03.png)" in refused.stderr
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"

    accepted = dlfer("run", "--resume", run, "--accept-changes")
    assert accepted.returncode == 0, accepted.stderr
    record = json.loads((run / "run.json").read_text())
    assert "happy/new.png" in str(record["changes"])
    assert "--accept-changes" in (run / "report.html").read_text()
