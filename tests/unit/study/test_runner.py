"""The one runner, with stand-ins for the trainings."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import DlferError, TrainingStopped
from dlfer.runs.run import create_run
from dlfer.study.child import make_slots
from dlfer.study.runner import Ending, Runner, StudyConsole, Task
from dlfer.train.progress import StopControl


class Source:
    """Hands out tasks, and notes how they end."""

    def __init__(self, *tasks):
        self.tasks, self.endings, self.unwanted = list(tasks), {}, []

    def take(self, slot):
        return self.tasks.pop(0) if self.tasks else None

    def is_exhausted(self):
        return not self.tasks

    def end(self, task, ending):
        self.endings[task.title] = ending

    def tick(self):
        return self.unwanted


@pytest.fixture
def make_task(file, fake_child):
    def make(dropout, **given):
        config = load_experiment(file, {"model.dropout": dropout, "finetune.epochs": 4})
        return Task(f"{dropout:g}", create_run(Path("runs"), config, argv=[]), **given)

    return make


def run(source, *, workers=1, control=None):
    Runner(make_slots(workers, []), control or StopControl(), StudyConsole(), "the hint").run(source)


def count_processes(task) -> int:
    return len((task.run.path / "begun.txt").read_text().splitlines())


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_tasks_are_run_and_their_endings_told(make_task, fake_child):
    fake_child |= {"0.2": {"do": "fail"}}
    source = Source(make_task(0.1), make_task(0.2), make_task(0.3))
    run(source, workers=2)
    assert {title: ending.status for title, ending in source.endings.items()} == {
        "0.1": "finished",
        "0.2": "failed",
        "0.3": "finished",
    }
    failure = source.endings["0.2"]
    assert (failure.kind, failure.error) == ("NonFiniteError", "the loss became nan.\nsecond line")


def test_a_task_with_which_nothing_is_to_be_done_needs_no_process(make_task):
    task = make_task(0.1, find_ending=lambda: Ending("finished"))
    source = Source(task)
    run(source)
    assert source.endings["0.1"].status == "finished"
    assert not (task.run.path / "begun.txt").exists()


@pytest.mark.slow
def test_several_at_a_time_write_their_talk_to_files(make_task):
    tasks = [make_task(0.1), make_task(0.2)]
    run(Source(*tasks), workers=2)
    assert all((task.run.path / "console.txt").exists() for task in tasks)


def test_tasks_of_one_process_key_share_a_process(make_task):
    tasks = [
        make_task(dropout, process_key=process_key) for dropout, process_key in ((0.1, "a"), (0.2, "a"), (0.3, "b"))
    ]
    source = Source(*tasks)
    run(source)
    assert [ending.status for ending in source.endings.values()] == ["finished"] * 3
    first, second, third = (task.run.read_json("run.json")["pid"] for task in tasks)
    assert first == second != third


@pytest.mark.slow
def test_a_shared_process_that_fails_is_followed_by_another(make_task, fake_child):
    fake_child |= {"0.1": {"do": "fail"}, "0.2": {"do": "die once"}}
    source = Source(*(make_task(dropout, process_key="a") for dropout in (0.3, 0.1, 0.2)))
    run(source)
    assert [ending.status for ending in source.endings.values()] == ["finished", "failed", "finished"]


def test_a_child_is_asked_after_each_epoch_and_stopped_by_a_no(make_task):
    heard = []
    task = make_task(0.3, on_epoch=lambda row: heard.append(row["epoch"]) or row["epoch"] < 2)
    source = Source(task)
    run(source)
    assert heard == [1, 2]
    assert source.endings["0.3"].status == "cut"
    assert task.run.status == "stopped"


def test_a_child_that_somebody_stops_from_outside_goes_on(make_task, fake_child):
    fake_child |= {"seconds": 0.3}
    task = make_task(0.1)

    def interfere():
        wait_for(lambda: (task.run.path / "trains").exists())
        os.kill(task.run.read_json("run.json")["pid"], signal.SIGTERM)

    threading.Thread(target=interfere).start()
    source = Source(task)
    run(source)
    assert source.endings["0.1"].status == "finished"
    assert count_processes(task) == 2


def test_a_stop_is_passed_on_and_told(make_task, fake_child):
    fake_child |= {"0.1": {"do": "wait"}}
    control, task = StopControl(), make_task(0.1)

    def stop():
        wait_for(lambda: (task.run.path / "trains").exists())
        control.request("--max-hours")

    threading.Thread(target=stop).start()
    source = Source(task, make_task(0.2))
    with pytest.raises(TrainingStopped):
        run(source, control=control)
    assert source.endings["0.1"].status == "stopped"
    assert task.run.status == "stopped"
    assert "0.2" not in source.endings


def test_a_child_that_does_not_heed_is_killed(make_task, fake_child, monkeypatch):
    fake_child |= {"0.1": {"do": "deaf"}, "seconds": 30}
    monkeypatch.setattr("dlfer.study.runner.STOP_SECONDS", 0.2)
    control, task = StopControl(), make_task(0.1)

    def stop():
        wait_for(lambda: (task.run.path / "trains").exists())
        control.request("Ctrl-C")

    threading.Thread(target=stop).start()
    source = Source(task)
    with pytest.raises(TrainingStopped):
        run(source, control=control)
    assert source.endings["0.1"].status == "stopped"
    assert task.run.status == "stopped"


def test_a_task_that_is_no_longer_wanted_is_stopped_and_forgotten(make_task, fake_child):
    fake_child |= {"0.1": {"do": "wait"}}
    task = make_task(0.1)
    source = Source(task)

    def withdraw():
        wait_for(lambda: (task.run.path / "trains").exists())
        source.unwanted.append(task)

    threading.Thread(target=withdraw).start()
    run(source)
    assert source.endings == {}
    assert task.run.status == "stopped"


def test_a_run_that_a_lost_process_still_holds_is_waited_for(make_task, capfd):
    task, ended = make_task(0.1), []
    held = threading.Event()

    def hold():
        with task.run.hold():
            held.set()
            time.sleep(0.5)
            ended.append(time.monotonic())

    threading.Thread(target=hold).start()
    held.wait()
    run(Source(task))
    assert time.monotonic() > ended[0]
    assert "another process works on it" in capfd.readouterr().err


def test_a_run_that_a_lost_process_locks_after_the_child_began_is_waited_for(make_task, fake_child, capfd):
    task = make_task(0.1)
    fake_child |= {"0.1": {"do": "held once"}}
    source = Source(task)
    run(source)
    assert source.endings["0.1"].status == "finished"
    assert count_processes(task) == 2
    assert "another process works on it" in capfd.readouterr().err


def test_members_that_fail_alike_but_for_numbers_are_the_experiments_fault(make_task, fake_child):
    fake_child |= {f"0.{n}": {"do": "fail"} for n in range(1, 5)}
    source = Source(*(make_task(n / 10) for n in range(1, 5)))
    with pytest.raises(DlferError, match="first 3 members failed for the same reason"):
        run(source)
    assert len(source.endings) == 3
