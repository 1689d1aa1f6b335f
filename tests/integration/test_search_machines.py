"""Three processes with one storage, as three machines would be; one of them is killed in the middle.

The trials are a stand-in that does not train: what is looked at is who runs what, and what is lost.
"""

import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.run import Run

ROOT = Path(__file__).resolve().parents[2]
FAKE_CHILD = ROOT / "tests" / "unit" / "study" / "fake_child.py"

TEXT = """
experiment: {name: far}
finetune: {data: {source: synthetic_faces}, epochs: 9}
search:
  engine: optuna
  pruner: none
  trials: 7
  lost_after_seconds: 4
  space:
    model.dropout: {between: [0.0, 0.6]}
"""

DRIVER = """
import sys
import dlfer.study.child
dlfer.study.child.CHILD_COMMAND = (sys.executable, {child!r})
from dlfer.cli import main
main(sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path):
    """Start `dlfer search` with stand-ins for the trials; what is left at the end is killed."""
    (tmp_path / "far.yaml").write_text(TEXT)
    (tmp_path / "plan.json").write_text(json.dumps({"seconds": 0.5}))
    started = []

    def begin(name, *arguments):
        log = (tmp_path / f"{name}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER.format(child=str(FAKE_CHILD)), "search", *map(str, arguments)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "FAKE_PLAN": str(tmp_path / "plan.json"),
                "CUDA_VISIBLE_DEVICES": "",
            },
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


@pytest.fixture(scope="module")
def database():
    """The URL of a PostgreSQL server of our own, as Debian installs it; it is stopped at the end."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
    if not found:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    pytest.importorskip("psycopg", reason="no driver: pip install 'psycopg[binary]'")
    # Not a folder of pytest's, which only its own user may read: as root the server refuses to run, and the package has a
    # user for it.
    folder, port = Path(tempfile.mkdtemp(prefix="dlfer-postgresql-")), find_free_port()
    user = {"user": "postgres"} if os.getuid() == 0 else {}
    if user:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)

    def call(name, *arguments):
        command = [str(found[-1].with_name(name)), *map(str, arguments)]
        # A server that is started keeps what it gets as stdout, so that it gets a file.
        with (folder / "commands.txt").open("ab") as log:
            subprocess.run(
                command, check=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, timeout=120, **user
            )

    call("initdb", "--pgdata", folder / "data", "--auth", "trust", "--username", "dlfer")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
    call("pg_ctl", "start", "--pgdata", folder / "data", "-o", options, "-w", "-l", folder / "log.txt")
    yield f"postgresql://dlfer:secret@127.0.0.1:{port}/postgres"
    call("pg_ctl", "stop", "--pgdata", folder / "data", "-m", "immediate")
    shutil.rmtree(folder, ignore_errors=True)


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_one_of_three_processes_is_killed(start, tmp_path, request, kind):
    place = "journal.log" if kind == "journal" else request.getfixturevalue("database")
    command = ("far.yaml", "--storage", place, "--out", "runs")
    machines = [start(f"machine{n}", *command) for n in range(3)]

    def find_histories():
        return list(tmp_path.glob("runs/far/*/finetune/history.csv"))

    wait_for(lambda: len(find_histories()) >= 3 or any(machine.poll() is not None for machine in machines))
    assert [machine.poll() for machine in machines] == [None] * 3, (tmp_path / "machine0.log").read_text()
    lost = machines[0]
    (folder,) = (tmp_path / "runs" / "far").glob("shared-*-search")
    lost.send_signal(signal.SIGKILL)
    lost.wait()
    for n, machine in enumerate(machines[1:], start=1):
        assert machine.wait(timeout=240) == 0, (tmp_path / f"machine{n}.log").read_text()

    rows = read_member_rows(folder)
    # Seven trials in all, on whatever machine; none is missing, none is run twice.
    assert [row.status for row in rows] == ["finished"] * 7
    assert len({row.path for row in rows}) == len({row.settings["model.dropout"] for row in rows}) == 7
    logs = [(Path(row.path) / "log.txt").read_text().splitlines() for row in rows]
    # The trial of the killed process was gone on with, from where it stood, by another.
    assert sorted(map(len, logs)) == [1] * 6 + [2]
    assert int(max(logs, key=len)[1].split()[-1]) > 0
    assert len({row.worker.split(".")[0] for row in rows}) == 2
    assert Run(folder).status == "finished"
    assert (folder / "best.yaml").exists()
    assert (folder / "report.html").exists()
    said = "".join(path.read_text() for path in tmp_path.glob("machine*.log"))
    assert "best validation" in said
    # A password is in no file.
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert not any(b"secret" in path.read_bytes() for path in files)


@pytest.mark.slow
def test_one_that_is_stopped_gives_its_trial_back_at_once(start, tmp_path):
    command = (
        "far.yaml",
        "--storage",
        "journal.log",
        "--out",
        "runs",
        "--trials",
        "2",
        "--set",
        "search.lost_after_seconds=600",
    )
    first = start("first", *command)
    wait_for(lambda: list(tmp_path.glob("runs/far/*/finetune/history.csv")))
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 143, (tmp_path / "first.log").read_text()
    second = start("second", *command)
    assert second.wait(timeout=120) == 0, (tmp_path / "second.log").read_text()
    (folder,) = (tmp_path / "runs" / "far").glob("shared-*-search")
    rows = read_member_rows(folder)
    assert [row.status for row in rows] == ["finished"] * 2
    logs = sorted((Path(row.path) / "log.txt").read_text().splitlines() for row in rows)
    assert [len(log) for log in logs] == [1, 2]


@pytest.mark.slow
def test_both_arms_and_the_winners_over_a_storage(start, tmp_path):
    keys = [
        "--set",
        "pretrain={data: {source: synthetic_scenes}}",
        "--set",
        "finetune.epochs=2",
        "--set",
        "ablation.seeds=[0]",
    ]
    command = ("far.yaml", *keys, "--ablation", "--trials", "2", "--storage", "journal.log", "--out", "runs")
    machines = [start(f"machine{n}", *command) for n in range(2)]
    for n, machine in enumerate(machines):
        assert machine.wait(timeout=240) == 0, (tmp_path / f"machine{n}.log").read_text()
    (folder,) = (tmp_path / "runs" / "far").glob("shared-*-search")
    rows = [row for row in read_member_rows(folder) if row.trial is not None]
    assert [(row.arm, row.status) for row in rows] == [
        (arm, "finished") for arm in ("with EF-FER1", "without EF-FER1") for _ in range(2)
    ]
    assert json.loads((folder / "comparison.json").read_text())["judged_on"] == "test"
