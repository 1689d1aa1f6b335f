"""What a person reads while a search runs."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from dlfer.study.search.engine import Proposal, TrialRecord
from dlfer.study.search.live import SearchView
from dlfer.study.search.worker import Progress


@pytest.fixture
def view():
    return SearchView("macro_f1", Console(file=io.StringIO(), width=120))


def make_record(number, status="finished", **given):
    given = {"score": 0.1 * number, "seconds": 60.0, "epochs": 9, "run": f"r{number}", **given}
    return TrialRecord(str(number), {"model.dropout": number / 10}, status, **given)


def test_the_time_left_is_that_of_the_trials_left_shared_by_the_workers(view):
    view.total, view.num_workers = 6, 2
    records = [make_record(1), make_record(2, seconds=120.0)]
    assert view.describe_left(records) == "about 3 min 00 s left"
    assert view.describe_left([]) == ""
    assert view.describe_left([make_record(n) for n in range(6)]) == ""


def test_what_runs_is_taken_off_the_time_left(view):
    view.total = 2
    running = Progress(Proposal("2", {}), time.monotonic() - 20)
    assert view.describe_left([make_record(1)], [running, Progress()]) in ("about 40.0 s left", "about 39.9 s left")
    late = Progress(Proposal("2", {}), time.monotonic() - 500)
    assert view.describe_left([make_record(1)], [late]) == ""


def test_rungs_are_reckoned_by_their_epochs(view):
    """Two trials of one epoch, one of which went on to three: three epochs in 180 s; twelve are left."""
    view.total, view.total_epochs = 9, 15
    records = [
        make_record(1, "rung", epochs=1, seconds=30.0),
        make_record(2, "rung", epochs=1, seconds=30.0),
        make_record(3, "rung", epochs=3, run="r2", seconds=140.0),
    ]
    assert view.describe_left(records) == "about 9 min 10 s left"


def test_trials_of_other_machines_stand_in_the_table(view):
    view.total = 3
    records = [make_record(1), make_record(2, "running", score=None, seconds=None, epochs=0)]
    view.console.print(view.draw(records, []))
    text = view.console.file.getvalue()
    assert "dropout 0.2" in text
    assert "running" in text
    assert "1 of 3 trials" in text
    assert text.index("dropout 0.1") < text.index("dropout 0.2")
