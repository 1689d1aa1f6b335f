"""Searches as a user starts them, with real trainings of seconds."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dlfer.runs.member_rows import MemberRow, read_member_rows
from tests.integration.conftest import command, dlfer, environment

SEARCH = """
search:
  engine: ENGINE
  trials: 2
  space:
    finetune.optimizer.learning_rate: {log: [1e-4, 1e-2]}
"""


@pytest.fixture
def write_search(small):
    def write(engine="random"):
        small.write_text(small.read_text() + SEARCH.replace("ENGINE", engine))
        return small

    return write


def find_search(out: Path) -> Path:
    return next(iter(out.glob("small/*-search")))


def read_records(out: Path) -> list[MemberRow]:
    return [row for row in read_member_rows(find_search(out)) if row.trial is not None]


@pytest.mark.slow
def test_a_search_killed_in_an_epoch_ends_as_one_that_was_not(write_search, tmp_path):
    file = write_search()
    whole = dlfer("search", file, "--out", tmp_path / "a")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(command("search", file, "--out", tmp_path / "b"), env=environment())
    deadline = time.monotonic() + 600
    while not list((tmp_path / "b").glob("small/*/finetune/checkpoint.npz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = dlfer("search", "--resume", find_search(tmp_path / "b"))
    assert resumed.returncode == 0, resumed.stderr
    a, b = read_records(tmp_path / "a"), read_records(tmp_path / "b")
    assert [(r.settings, r.score) for r in a] == [(r.settings, r.score) for r in b]
    assert len(list((tmp_path / "b").glob("small/*/metrics.json"))) == 2
    # One EF-FER1 for all, and test was never opened.
    assert len([p for p in (tmp_path / "b" / ".cache" / "pretrain").iterdir() if p.is_dir()]) == 1
    for path in (tmp_path / "b").glob("small/*/metrics.json"):
        assert json.loads(path.read_text())["test"] is None
        assert "test_opened" not in path.with_name("log.jsonl").read_text()
        assert not (path.parent / "predictions" / "test.npz").exists()


@pytest.mark.slow
def test_a_run_of_two_rungs_is_the_run_without_a_stop(write_search, tmp_path):
    """Hyperband with factor 2: after one of two epochs the better half goes on, along the schedule of the whole."""
    done = dlfer(
        "search", write_search("hyperband"), "--set", "search.factor=2", "--trials", "5", "--out", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    records = read_records(tmp_path / "a")
    promoted = next(r for r in records if r.rung is None and r.settings in [x.settings for x in records if x.rung])
    keys = [f"{key}={value}" for key, value in promoted.settings.items()]
    alone = dlfer("run", tmp_path / "small.yaml", *[x for key in keys for x in ("--set", key)], "--out", tmp_path / "b")
    assert alone.returncode == 0, alone.stderr
    (run,) = (p.parent for p in (tmp_path / "b").glob("small/*/metrics.json"))
    states = [np.load(p / "finetune" / "checkpoint.npz") for p in (Path(promoted.path), run)]
    assert all(np.array_equal(states[0][name], states[1][name]) for name in states[0].files if name != "record")


@pytest.mark.slow
def test_an_ablation_judges_the_winners_once_on_test(write_search, tmp_path):
    # The seed of the experiment: the winners' own runs are judged, none is trained again.
    done = dlfer(
        "search", write_search(), "--ablation", "--trials", "1", "--set", "ablation.seeds=[1]", "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    folder = find_search(tmp_path)
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["judged_on"] == "test"
    assert [row["arm"] for row in comparison["table"]] == ["with EF-FER1", "without EF-FER1"]
    assert len(comparison["paired"]) == 1
    opened = [p.parent.name for p in tmp_path.glob("small/*/log.jsonl") if "test_opened" in p.read_text()]
    assert sorted(opened) == sorted(member["run"] for member in comparison["runs"])
    assert len(list(tmp_path.glob("small/*/finetune/history.csv"))) == 2
    for name in ("best-with-ef-fer1.yaml", "best-without-ef-fer1.yaml"):
        assert dlfer("check", folder / name).returncode == 0
