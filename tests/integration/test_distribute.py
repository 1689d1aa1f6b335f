"""One batch over two devices, and over two processes: the training is that of one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

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


def make_run(devices: int, **changes) -> dict:
    return {"devices": devices, "stage": {**STAGE, **changes}}


def train(
    folder: Path, *runs: dict, python=sys.executable, num_train: int = 48, jit="auto", **given: str
) -> subprocess.Popen:
    """Start a process that does the runs one after another."""
    wanted = json.dumps({"runs": runs, "num_train": num_train, "jit": jit})
    folder.mkdir(exist_ok=True)
    with open(folder / "talk.txt", "w") as talk:
        return subprocess.Popen(
            [python, SCRIPT, wanted, folder], env=environment(**given), stdout=subprocess.PIPE, stderr=talk, text=True
        )


def read_found(process: subprocess.Popen, folder: Path) -> list[dict]:
    """Wait for the process and return what it found, a dict a run."""
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, (folder / "talk.txt").read_text()
    return json.loads(out.splitlines()[-1])


def assert_same(one: dict, two: dict, tolerance: float) -> None:
    assert (one["replicas"], two["replicas"]) == (1, 2)
    assert len(one["history"]) == len(two["history"])
    for row, other in zip(one["history"], two["history"], strict=True):
        for key in ("train_loss", "validation_loss", "learning_rate"):
            assert row[key] == pytest.approx(other[key], rel=tolerance), key
    assert one["weights"] == pytest.approx(two["weights"], rel=tolerance, abs=tolerance)


def assert_close(one: dict, two: dict) -> None:
    """BatchNorm's statistics of eight images stand for those of sixteen."""
    for row, other in zip(one["history"], two["history"], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=0.25)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=0.1)


# The penalty is added once, whatever the number of devices whose gradients are summed.
PENALISED = {
    "optimizer": {
        "name": "sgd",
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "weight_decay_kind": "l2",
        "weight_decay_scope": "all",
    },
    "epochs": 1,
    "clip_scope": "variable",
}
UPDATED = {"freeze": {"batch_norm": "update"}, "augment": {}, "keep": "last"}


@pytest.mark.slow
def test_two_devices_train_as_one_does(tmp_path):
    """BatchNorm frozen: what is left is the order of sums. Mixup, weights, clipping and the average are in."""
    # Of 49 images 48 are left, which one batch holds.
    small = {"balance": "undersample", "batch_size": 64, "epochs": 1}
    runs = [make_run(devices, **changes) for changes in ({}, PENALISED, small) for devices in (1, 2)]
    found = read_found(train(tmp_path, *runs, num_train=49), tmp_path)
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert_same(one, two, 1e-4)


@pytest.mark.slow
def test_two_devices_with_batch_norm_are_close(tmp_path):
    one, two = read_found(train(tmp_path, make_run(1, **UPDATED), make_run(2, **UPDATED)), tmp_path)
    assert_close(one, two)


@pytest.mark.slow
def test_two_devices_compiled_by_xla(tmp_path):
    """As on GPUs, where it is the default."""
    plain = {"epochs": 1, "augment": {}}
    compiled = read_found(train(tmp_path / "xla", make_run(2, **plain), num_train=16, jit=True), tmp_path / "xla")
    one = read_found(train(tmp_path / "one", make_run(1, **plain), num_train=16, jit=False), tmp_path / "one")
    assert_same(one[0], compiled[0], 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not JAX.exists(), reason="make jax makes the environment for this test")
def test_two_devices_of_jax_train_as_one_does_with_batch_norm(tmp_path):
    # Not compiled: XLA on a CPU takes minutes for what is a second of arithmetic here.
    updated = {"freeze": {"batch_norm": "update"}, "epochs": 1}
    runs = make_run(1, **updated), make_run(2, **updated)
    process = train(tmp_path, *runs, python=JAX, num_train=16, jit=False, KERAS_BACKEND="jax")
    assert_same(*read_found(process, tmp_path), 1e-3)


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights_and_statistics(tmp_path):
    frozen, updated = make_run(1, keep="last"), make_run(1, **UPDATED)
    environments = make_environments()
    processes = [train(tmp_path / str(index), frozen, updated, **given) for index, given in enumerate(environments)]
    chief, follower = (read_found(process, tmp_path / str(index)) for index, process in enumerate(processes))
    assert [run["digest"] for run in chief] == [run["digest"] for run in follower]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["talk.txt"]
    alone = read_found(train(tmp_path / "alone", frozen, updated), tmp_path / "alone")
    assert_same(alone[0], chief[0], 1e-4)
    assert_close(alone[1], chief[1])


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


def make_environments(*, slurm: bool = False) -> list[dict[str, str]]:
    """Return what tells two processes that they are one training."""
    if slurm:
        step = {"NUM_TASKS": "2", "NODELIST": "localhost", "TASKS_PER_NODE": "2"}
        shared = {"DLFER_CLUSTER": "slurm", **{f"SLURM_STEP_{name}": value for name, value in step.items()}}
        return [{**shared, "SLURM_PROCID": str(index)} for index in (0, 1)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in find_ports(2)]}
    tasks = [{"type": "worker", "index": index} for index in (0, 1)]
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks]


def start(folder: Path, *args, slurm: bool = False) -> list[subprocess.Popen]:
    """Start the command in two processes that are one training; their talk goes to host0.txt and host1.txt."""
    processes = []
    for index, given in enumerate(make_environments(slurm=slurm)):
        with open(folder / f"host{index}.txt", "w") as log:
            processes.append(
                subprocess.Popen(command(*args), env=environment(**given), stdout=log, stderr=log, cwd=folder)
            )
    return processes


def find_run(folder: Path) -> Path:
    return next(path.parent for path in folder.glob("hosts/*/run.json"))


def wait_for_checkpoint(run_folder: Path, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 900
    while not any(run_folder.glob("hosts/*/finetune/checkpoint.npz")):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_over_two_tasks_of_slurm(tmp_path):
    (tmp_path / "hosts.yaml").write_text(EXPERIMENT)
    processes = start(tmp_path, "run", "hosts.yaml", "--out", "two", slurm=True)
    codes = [process.wait(timeout=1800) for process in processes]
    logs = [(tmp_path / f"host{index}.txt").read_text() for index in (0, 1)]
    assert codes == [0, 0], logs
    assert "host 1 of 2: follows the chief; writes nothing." in logs[1]
    assert len(list((tmp_path / "two" / "hosts").iterdir())) == 1
    record = json.loads((find_run(tmp_path / "two") / "run.json").read_text())
    assert record["status"] == "finished"
    assert (record["device"]["replicas"], record["device"]["workers"]) == (2, 2)


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
