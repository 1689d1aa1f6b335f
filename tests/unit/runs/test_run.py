"""The run directory, the lookup of runs, and files that are whole or absent."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from dlfer.config.load import compute_digest, load_experiment
from dlfer.errors import ConfigError, ModelError
from dlfer.runs.files import copy_folder, write_atomically
from dlfer.runs.find import list_runs, open_run
from dlfer.runs.records import to_json
from dlfer.runs.run import create_run, format_duration


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("experiment: {name: small, seed: 7}\nfinetune: {data: {source: synthetic_faces}}\n")
    return load_experiment(path)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def make(folder, config, **kwargs):
    return create_run(folder, config, argv=["dlfer", "run", "a.yaml"], **kwargs)


def test_a_new_run_says_what_it_is(folder, config):
    run = make(folder, config)
    values = run.read_json("run.json")
    assert run.path.parent == folder / "small"
    assert run.path.name.endswith("Z-" + compute_digest(config)[:8])
    assert (values["status"], values["kind"], values["seed"]) == ("running", "run", 7)
    assert values["argv"] == ["dlfer", "run", "a.yaml"]
    assert values["config_digest"] == compute_digest(config)
    assert values["packages"]["numpy"] == np.__version__
    assert values["device"] is None
    assert set(values) >= {"started", "git", "python", "platform", "host", "pid", "dlfer"}
    assert run.config() == config
    assert (run.status, run.kind, run.is_smoke) == ("running", "run", False)


def test_runs_of_the_same_second_do_not_overwrite_one_another(folder, config):
    made = [make(folder, config, kind=kind) for kind in ("run", "run", "run", "ablation", "ablation")]
    assert len({run.path for run in made}) == 5
    assert made[3].path.name.split("-")[2] == "ablation"
    assert [run.kind for run in made] == ["run"] * 3 + ["ablation"] * 2


def test_status_goes_from_running_to_its_end_and_back(folder, config):
    run = make(folder, config)
    run.stop("SIGTERM")
    assert (run.status, run.read_json("run.json")["reason"]) == ("stopped", "SIGTERM")
    run.fail(ValueError("no such thing"))
    values = run.read_json("run.json")
    assert (values["status"], values["error"]) == ("failed", "ValueError: no such thing")
    assert values["finished"].endswith("Z")
    run.update(status="running")
    values = run.read_json("run.json")
    assert (values["status"], values["error"], values["finished"], values["pid"]) == (
        "running",
        None,
        None,
        os.getpid(),
    )
    run.finish()
    assert run.status == "finished"
    events = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["created", "stopped", "failed", "finished"]
    assert all(event["time"].endswith("Z") for event in events)


def test_a_run_whose_process_is_gone_is_interrupted(folder, config):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run = make(folder, config)
    run.update(pid=process.pid)
    assert run.status == "interrupted"
    run.update(host=socket.gethostname() + "-elsewhere")
    assert run.status == "running"


def test_json_takes_numpy_and_has_no_nan(folder, config):
    given = {"a": np.float32(0.5), "b": [math.nan, math.inf], "c": np.arange(2), "d": (np.int64(3),), 4: 5}
    assert to_json(given) == {"a": 0.5, "b": [None, None], "c": [0, 1], "d": [3], "4": 5}
    run = make(folder, config)
    run.log("step", loss=np.float64("nan"))
    assert json.loads((run.path / "log.jsonl").read_text().splitlines()[-1])["loss"] is None


def test_json_that_is_absent_or_damaged(folder, config):
    run = make(folder, config)
    with pytest.raises(ModelError, match=r"metrics\.json: there is no such file"):
        run.read_json("metrics.json")
    (run.path / "metrics.json").write_text('{"a": ')
    with pytest.raises(ModelError, match=r"metrics\.json: expected JSON"):
        run.read_json("metrics.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "a.txt"
    write_atomically(path, "old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_a_written_file_can_be_read_by_others_as_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_open_run_by_path_and_by_the_beginning_of_its_name(folder, config):
    run, other = make(folder, config), make(folder, config, kind="ablation")
    name = f"small/{run.path.name}"
    assert open_run(run.path).path == run.path
    assert open_run(str(run.path / "config.yaml")).path == run.path
    # The ablation's name begins with the run's: the whole name counts alone.
    assert open_run(name, folder).path == run.path
    assert open_run(other.path.name, folder).path == other.path
    with pytest.raises(ModelError, match=r"2 runs in .* begin so: .*Give more of the name"):
        open_run("small/2", folder)
    with pytest.raises(ModelError) as caught:
        open_run("other", folder)
    assert name in str(caught.value)
    with pytest.raises(ModelError, match="There are no runs there yet"):
        open_run("x", folder / "nowhere")


def test_list_runs_tells_damaged_ones_and_passes_over_the_cache(folder, config):
    first, second = make(folder, config), make(folder, config)
    first.fail(ValueError("bad\nsecond line"))
    (second.path / "run.json").write_text("{")
    cached = folder / ".cache" / "pretrain"
    cached.mkdir(parents=True)
    (cached / "run.json").write_text("{}")
    found = list_runs(folder)
    assert [(item.status, item.path) for item in found] == [("failed", first.path), ("damaged", second.path)]
    assert found[0].error == "ValueError: bad"
    assert list_runs(folder / "nowhere") == []


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose a folder by --out"):
        make(tmp_path / "file", config)


def test_a_run_is_held_by_one_process_at_a_time(folder, config):
    run = create_run(folder, config, argv=[])
    assert not run.is_held()
    with run.hold():
        assert run.is_held()
        with pytest.raises(ModelError, match=rf"another process works on it \(process {os.getpid()} on "), run.hold():
            pass
    with run.hold():
        assert run.is_held()
    assert not run.is_held()


@pytest.mark.parametrize(
    ("seconds", "text", "estimate"),
    [
        (None, "–", "–"),
        (4.25, "4.2 s", "4 s"),
        (59.94, "59.9 s", "60 s"),
        (60, "1 min 00 s", "1 min"),
        (1085, "18 min 05 s", "18 min"),
        (11220, "3 h 07 min", "3 h 07 min"),
    ],
)
def test_durations(seconds, text, estimate):
    assert format_duration(seconds) == text
    assert format_duration(seconds, is_estimate=True) == estimate


@pytest.mark.parametrize("mode", [0o555, 0o500, 0o755])
def test_the_copy_of_a_read_only_folder_can_be_written(tmp_path, mode):
    source = tmp_path / "model" / "members" / "a"
    source.mkdir(parents=True)
    for path in (source / "x.json", tmp_path / "model" / "card.md"):
        path.write_text("{}")
        path.chmod(mode & 0o444)
    for folder in (source, source.parent, tmp_path / "model"):
        folder.chmod(mode)
    copy_folder(tmp_path / "model", tmp_path / "copy", without="card.md")
    found = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*"))
    assert found == ["members", "members/a", "members/a/x.json"]
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "copy", *(tmp_path / "copy").rglob("*")))
    for folder in (tmp_path / "model", source.parent, source):
        assert folder.stat().st_mode & 0o777 == mode
        folder.chmod(0o755)
