"""A chief and two workers on loopback, as several machines would be; one of them is killed in the middle.

The trials are a stand-in that does not train: what is looked at is who runs what, and what is lost.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_CHILD = ROOT / "tests" / "unit" / "search" / "fake_child.py"

TEXT = """
experiment: {name: far, seed: 15}
finetune: {data: {source: synthetic_faces}, epochs: 20}
search:
  trials: 4
  lost_after_seconds: 3
  space:
    model.dropout: {between: [0.0, 0.6]}
"""

DRIVER = """
import sys
import dlfer.study.search.trials
dlfer.study.search.trials.COMMAND = (sys.executable, {child!r})
from dlfer.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path):
    """Start `dlfer search` with stand-ins for the trials; what is left at the end is killed."""
    (tmp_path / "far.yaml").write_text(TEXT)
    started = []

    def begin(name, *arguments):
        log = (tmp_path / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER.format(child=str(FAKE_CHILD)), "search", *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def find_free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError("waited in vain")


def read_records(folder):
    return json.loads((folder / "trials.json").read_text())["arms"][0]["records"]


@pytest.mark.slow
def test_a_worker_and_then_the_chief_are_killed(start, tmp_path):
    address = f"127.0.0.1:{find_free_port()}"
    chief = start("chief", "far.yaml", "--role", "chief", "--chief", address, "--out", "runs")
    workers = [start(f"worker{n}", "--role", "worker", "--chief", address, "--out", "runs") for n in (1, 2)]
    histories = wait_for(lambda: (h := list(tmp_path.glob("runs/far/*/finetune/history.csv")))[1:] and h)
    lost = [path.parent.parent for path in histories]

    workers[0].send_signal(signal.SIGKILL)
    log = tmp_path / "chief.log"
    wait_for(lambda: "is silent; the trial goes to another" in log.read_text())

    chief.send_signal(signal.SIGKILL)
    chief.wait()
    (folder,) = (tmp_path / "runs" / "far").glob("*-search")
    again = start("chief2", "--resume", folder, "--role", "chief", "--chief", address)
    assert again.wait(timeout=240) == 0, (tmp_path / "chief2.log").read_text()
    assert workers[1].wait(timeout=60) == 0, (tmp_path / "worker2.log").read_text()

    records = read_records(folder)
    assert [record["status"] for record in records] == ["finished"] * 4
    assert len({record["run"] for record in records}) == 4
    # The trial of the killed worker was gone on with from where it stood, by the other one.
    logs = [(path / "log.txt").read_text().splitlines() for path in lost]
    assert sorted(map(len, logs)) == [1, 2]
    assert int(max(logs, key=len)[1].split()[-1]) > 0
    assert "best validation" in (tmp_path / "chief2.log").read_text()


@pytest.mark.slow
def test_a_worker_with_another_experiment_is_refused_with_the_difference(start, tmp_path):
    address = f"127.0.0.1:{find_free_port()}"
    start("chief", "far.yaml", "--role", "chief", "--chief", address, "--out", "runs")
    (tmp_path / "near.yaml").write_text(TEXT.replace("0.6", "0.5"))
    worker = start("worker", "near.yaml", "--role", "worker", "--chief", address, "--out", "runs")
    assert worker.wait(timeout=240) == 2
    assert "search.space.model.dropout" in (tmp_path / "worker.log").read_text()


@pytest.mark.slow
def test_a_worker_stays_for_the_other_arm(start, tmp_path):
    address = f"127.0.0.1:{find_free_port()}"
    keys = ["--set", "pretrain={data: {source: synthetic_scenes}}", "--set", "finetune.epochs=2"]
    chief = start("chief", "far.yaml", *keys, "--ablation", "--role", "chief", "--chief", address, "--out", "runs")
    worker = start("worker", "--role", "worker", "--chief", address, "--out", "runs")
    assert worker.wait(timeout=240) == 0, (tmp_path / "worker.log").read_text()
    assert chief.wait(timeout=240) == 0, (tmp_path / "chief.log").read_text()
    (folder,) = (tmp_path / "runs" / "far").glob("*-search")
    arms = json.loads((folder / "trials.json").read_text())["arms"]
    assert [[record["status"] for record in arm["records"]] for arm in arms] == [["finished"] * 4] * 2
    assert json.loads((folder / "comparison.json").read_text())["judged_on"] == "test"
