"""One batch over two devices, and over two processes: the training is that of one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.integration.conftest import ROOT, command, environment

SCRIPT = Path(__file__).with_name("distribute_script.py")
JAX = ROOT / ".venv-jax" / "bin" / "python"

# Everything that works on a whole batch, or that a loop of its own might leave out.
STAGE = {
    "epochs": 2,
    "batch_size": 16,
    "image_size": 32,
    "freeze": {"batch_norm": "frozen"},
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "augment": {"rotation": 20.0, "mirror": 0.5, "mixup": 0.2, "erasing": 0.3},
    "loss": {"label_smoothing": 0.1},
    "balance": "class_weight",
    "ema": 0.9,
    "clip": 0.5,
}


def train(folder: Path, *, python=sys.executable, num_train: int = 48, devices=(1, 2), jit="auto", **changes) -> dict:
    """Train on one device and on two; return what the script found."""
    wanted = {"stage": {**STAGE, **changes}, "num_train": num_train, "devices": devices, "jit": jit}
    done = subprocess.run(
        [python, SCRIPT, json.dumps(wanted), folder],
        env=environment(**({"KERAS_BACKEND": "jax"} if python == JAX else {})),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_same(found: dict, tolerance: float) -> None:
    one, two = found["1"], found["2"]
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert len(one["history"]) == len(two["history"])
    for row, other in zip(one["history"], two["history"], strict=True):
        for key in ("train_loss", "validation_loss", "learning_rate"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), key
    assert one["weights"] == pytest.approx(two["weights"], rel=tolerance, abs=tolerance)


def test_two_devices_train_as_one_does(tmp_path):
    """BatchNorm frozen: what is left is the order of sums. Mixup, weights, clipping and the average are in."""
    assert_same(train(tmp_path), 1e-4)


@pytest.mark.slow
def test_two_devices_with_batch_norm_are_close(tmp_path):
    """Statistics of eight images stand for those of sixteen; their moving averages are averaged."""
    found = train(tmp_path, freeze={"batch_norm": "update"}, augment={}, keep="last")
    for row, other in zip(found["1"]["history"], found["2"]["history"], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.25)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not JAX.exists(), reason="make jax makes the environment for this test")
def test_two_devices_of_jax_train_as_one_does_with_batch_norm(tmp_path):
    assert_same(train(tmp_path, python=JAX, num_train=32, jit=False, freeze={"batch_norm": "update"}), 1e-3)


EXPERIMENT = """
experiment: {name: hosts, seed: 1, checkpoint_minutes: 0}
model: {backbone: efficientnet_nano, dropout: 0.0}
pretrain:
  data: {source: synthetic_scenes, num_images: {train: 32, validation: 16}}
  epochs: 1
  batch_size: 16
  image_size: 32
finetune:
  data: {source: synthetic_faces, num_images: {train: 48, validation: 25, test: 24}}
  epochs: 2
  batch_size: 16
  image_size: 32
  freeze: {batch_norm: frozen}
  augment: {rotation: 10, mixup: 0.2}
evaluate: {bootstrap: 100, num_train: 0}
"""


def find_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(folder: Path, *args, slurm: bool = False) -> list[subprocess.Popen]:
    """Start the command in two processes that are to be one training; their talk goes to host0.txt and host1.txt."""
    ports = find_ports(2)
    processes = []
    for index in (0, 1):
        if slurm:
            given = {
                "DLFER_CLUSTER": "slurm",
                "SLURM_PROCID": str(index),
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
            }
        else:
            workers = [f"127.0.0.1:{port}" for port in ports]
            task = {"type": "worker", "index": index}
            given = {"TF_CONFIG": json.dumps({"cluster": {"worker": workers}, "task": task})}
        with open(folder / f"host{index}.txt", "w") as log:
            processes.append(
                subprocess.Popen(command(*args), env=environment(**given), stdout=log, stderr=log, cwd=folder)
            )
    return processes


def read_weights(run: Path) -> np.ndarray:
    found = []
    with h5py.File(run / "model" / "network.weights.h5") as file:
        file.visititems(lambda _, item: found.append(item[...].ravel()) if isinstance(item, h5py.Dataset) else None)
    return np.concatenate(found)


def find_run(folder: Path) -> Path:
    return next(path.parent for path in folder.glob("hosts/*/run.json"))


def wait_for_checkpoint(run_folder: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 900
    while not any(run_folder.glob("hosts/*/finetune/checkpoint.npz")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [False, True])
def test_two_processes_train_as_one_does(tmp_path, slurm):
    (tmp_path / "hosts.yaml").write_text(EXPERIMENT)
    processes = start(tmp_path, "run", "hosts.yaml", "--out", "two", slurm=slurm)
    codes = [process.wait(timeout=1800) for process in processes]
    logs = [(tmp_path / f"host{index}.txt").read_text() for index in (0, 1)]
    assert codes == [0, 0], logs
    assert "host 1 of 2: follows the chief; writes nothing." in logs[1]
    assert len(list((tmp_path / "two" / "hosts").iterdir())) == 1
    run = find_run(tmp_path / "two")
    device = json.loads((run / "run.json").read_text())["device"]
    assert (device["replicas"], device["workers"]) == (2, 2)
    alone = subprocess.run(command("run", "hosts.yaml", "--out", "one"), env=environment(), cwd=tmp_path, check=False)
    assert alone.returncode == 0
    other = find_run(tmp_path / "one")
    np.testing.assert_allclose(read_weights(run), read_weights(other), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_process_killed_stops_the_other_and_resume_goes_on(tmp_path, lost):
    (tmp_path / "hosts.yaml").write_text(EXPERIMENT.replace("epochs: 2", "epochs: 6"))
    processes = start(tmp_path, "run", "hosts.yaml", "--out", "two")
    wait_for_checkpoint(tmp_path / "two", processes)
    os.kill(processes[lost].pid, signal.SIGKILL)
    assert processes[1 - lost].wait(timeout=60) != 0
    assert processes[lost].wait(timeout=10) == -signal.SIGKILL
    text = (tmp_path / f"host{1 - lost}.txt").read_text()
    assert "another process of the training is gone" in text
    run = find_run(tmp_path / "two")
    codes = [process.wait(timeout=1800) for process in start(tmp_path, "run", "--resume", str(run))]
    assert codes == [0, 0], [(tmp_path / f"host{index}.txt").read_text() for index in (0, 1)]
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
