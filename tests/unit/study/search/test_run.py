"""Whole searches in this process, with a stand-in for the training."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError, EnvironmentProblem, ModelError, TrainingStopped, UserError
from dlfer.report.search import write_search_report
from dlfer.runs.changes import list_differences
from dlfer.runs.find import open_run
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import read_member_rows
from dlfer.study.search.run import SearchOptions, resume_search, run_search

pytestmark = pytest.mark.usefixtures("blank_figures")

TEXT = """
experiment: {name: a, seed: SEED}
model: {dropout: 0.1}
finetune: {data: {source: synthetic_faces}, epochs: 3}
search:
  engine: ENGINE
  trials: 4
  space:
    model.dropout: {between: [0.0, HIGH]}
    finetune.batch_size: {choice: [8, 16]}
"""


@pytest.fixture
def write_file(tmp_path):
    def write(name="a.yaml", *, seed=0, engine="random", high=0.6):
        path = tmp_path / name
        path.write_text(TEXT.replace("SEED", str(seed)).replace("ENGINE", engine).replace("HIGH", str(high)))
        return path

    return write


@pytest.fixture
def options(tmp_path):
    return RunOptions(out=tmp_path / "runs", argv=("dlfer", "search", "a.yaml"))


def read_trials(folder):
    return [row for row in read_member_rows(folder) if row.trial is not None]


def read_log(row) -> list[str]:
    return (Path(row.path) / "log.txt").read_text().splitlines()


@pytest.mark.usefixtures("fake_child")
def test_a_search_from_file_to_report(write_file, options):
    folder = run_search(write_file(), options, SearchOptions(workers=2))
    assert open_run(folder).status == "finished"
    records = read_trials(folder)
    assert [record.status for record in records] == ["finished"] * 4
    best = max(records, key=lambda record: record.score)
    assert best.low < best.high
    config = load_experiment(folder / "best.yaml")
    assert config.model.dropout == best.settings["model.dropout"]
    assert config.search is None
    with open(folder / "members.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["model.dropout"]) for row in rows] == [r.settings["model.dropout"] for r in records]
    page = (folder / "report.html").read_text()
    assert "Leaderboard" in page
    assert f"{best.score:.4f}" in page
    assert page.count("<img") == 3
    assert write_search_report(folder).read_text() == page


@pytest.mark.slow
@pytest.mark.usefixtures("fake_child")
def test_a_search_that_is_resumed_with_more_trials_keeps_the_old_ones(write_file, options):
    path = write_file()
    folder = run_search(path, options, SearchOptions(trials=2))
    first = read_trials(folder)
    resume_search(folder, options, SearchOptions(trials=3), file=path)
    assert read_trials(folder)[:2] == first
    assert len(read_trials(folder)) == 3


@pytest.mark.usefixtures("fake_child")
def test_a_changed_experiment_or_space_is_refused_with_the_difference(write_file, options):
    folder = run_search(write_file(), options, SearchOptions(trials=1))
    with pytest.raises(ConfigError) as caught:
        resume_search(folder, options, SearchOptions(), file=write_file("b.yaml", seed=7, high=0.4))
    message = str(caught.value)
    assert "experiment.seed: 0 -> 7" in message
    assert "search.space.model.dropout: {'between': [0.0, 0.6]} -> {'between': [0.0, 0.4]}" in message
    # And so is a copy in the run that somebody has edited.
    copy = folder / "config.yaml"
    copy.write_text(copy.read_text().replace("dropout: 0.1", "dropout: 0.2"))
    with pytest.raises(ConfigError, match=r"config\.yaml is not .*\n.*model\.dropout: 0\.1 -> 0\.2"):
        resume_search(folder, options, SearchOptions())


def test_the_number_of_trials_may_change(write_file):
    a, b = (load_experiment(write_file(), {"search.trials": n}) for n in (3, 9))
    assert list_differences(a, b) == []


@pytest.mark.slow
@pytest.mark.usefixtures("fake_child")
def test_hyperbands_rungs_are_one_run(write_file, options):
    folder = run_search(write_file(engine="hyperband"), options, SearchOptions())
    records = read_trials(folder)
    promoted = [r for r in records if r.rung is None and r.settings == records[0].settings]
    runs = {json.dumps(record.settings): record.path for record in records}
    assert len(set(runs.values())) < len(records)
    assert all(record.path == runs[json.dumps(record.settings)] for record in records)
    for record in [*promoted, *[r for r in records if r.status == "finished"]]:
        assert read_log(record) in (["begins after 0"], ["begins after 0", "begins after 1"])


FAIL = {"search.space.model.dropout": {"choice": [0.3, 0.95]}, "search.engine": "grid"}


@pytest.mark.slow
def test_failing_trials_are_recorded_and_told_on_the_page(write_file, options, fake_child):
    fake_child |= {"0.95": {"do": "fail"}}
    folder = run_search(write_file(high=0.99), replace(options, overrides=FAIL), SearchOptions())
    failed = [record for record in read_trials(folder) if record.status == "failed"]
    assert 0 < len(failed) < 4
    assert failed[0].error == "the loss became nan."
    assert "the loss became nan" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_fault_of_the_experiment_stops_the_search_and_costs_no_trial(write_file, options, fake_child):
    fake_child |= {"do": "refuse"}
    with pytest.raises(UserError, match=r"(?s)no such file.*dlfer search --resume"):
        run_search(write_file(), options, SearchOptions())
    (search,) = (options.out / "a").glob("*-search")
    assert open_run(search).status == "failed"
    assert {record.status for record in read_trials(search)} == {"running"}
    fake_child.clear()
    resume_search(search, options, SearchOptions())
    assert [record.status for record in read_trials(search)] == ["finished"] * 4


def interrupt_when(condition) -> None:
    """Send this process SIGINT once a condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["random", "optuna", "hyperband", "grid", "bayesian"])
def test_ctrl_c_ends_with_the_best_so_far_and_resume_goes_on(write_file, options, fake_child, capfd, engine):
    fake_child |= {"seconds": 0.3}
    # When the second trial that has all epochs has done its first one.
    interrupt_when(lambda: len(list((options.out / "a").glob("*/finetune/history.csv"))) >= 2)
    with pytest.raises(TrainingStopped) as caught:
        run_search(write_file(engine=engine), options, SearchOptions())
    assert caught.value.exit_code == 130
    (folder,) = (options.out / "a").glob("*-search")
    assert open_run(folder).status == "stopped"
    assert (folder / "best.yaml").exists()
    assert (folder / "report.html").exists()
    said = capfd.readouterr().err
    assert "best validation macro_f1" in said
    assert f"dlfer search --resume {folder}" in said
    # A rung of Hyperband has one epoch here, and usually ends with it.
    assert engine == "hyperband" or "interrupted at macro_f1" in said, said
    fake_child.clear()
    resume_search(folder, options, SearchOptions())
    records = read_trials(folder)
    assert {record.status for record in records} <= {"finished", "rung", "pruned"}
    assert len(records) == 4
    # Nothing that was finished is trained again, and what was interrupted goes on.
    logs = [read_log(record) for record in {record.path: record for record in records}.values()]
    assert all(len(set(log)) == len(log) for log in logs)


def test_ctrl_c_in_the_first_trial_says_where_that_one_stands(write_file, options, fake_child, capfd):
    fake_child |= {"seconds": 0.3}
    interrupt_when(lambda: list((options.out / "a").glob("*/finetune/history.csv")))
    with pytest.raises(TrainingStopped):
        run_search(write_file(), options, SearchOptions())
    said = capfd.readouterr().err
    assert "no trial has a score yet" in said
    assert re.search(r"trial 1 of 4 interrupted at macro_f1 0\.\d{4} after [12] epochs?: dropout", said), said


@pytest.mark.usefixtures("fake_child")
def test_a_search_that_is_stopped_before_its_first_trial_has_a_page(write_file, options):
    with pytest.raises(TrainingStopped):
        run_search(write_file(), replace(options, max_hours=1e-9), SearchOptions())
    (folder,) = (options.out / "a").glob("*-search")
    assert "No trial has a score yet" in (folder / "report.html").read_text()


def test_a_search_of_an_earlier_version_is_reported_and_not_resumed(write_file, options, fake_child):
    folder = run_search(write_file(), options, SearchOptions(trials=1))
    open_run(folder).update(search={"ablation": False, "trials": 1})
    with pytest.raises(ModelError, match="an earlier version of dlfer began this search and cannot be resumed"):
        resume_search(folder, options, SearchOptions())
    (row,) = read_trials(folder)
    record = {
        **row.model_dump(exclude={"settings"}),
        "overrides": row.settings,
        "run": Path(row.path).name,
        "error": None,
    }
    former = {"figure": "macro_f1", "direction": "max", "keys": list(row.settings)}
    (folder / "members.csv").unlink()
    (folder / "trials.json").write_text(json.dumps({**former, "arms": [{"name": "search", "records": [record]}]}))
    assert f"{row.score:.4f}" in write_search_report(folder).read_text()


def test_a_dry_run_trains_nothing(write_file, options, capsys):
    dry = RunOptions(**{**options.__dict__, "dry_run": True})
    assert run_search(write_file(), dry, SearchOptions()) is None
    assert "first trial: dropout" in capsys.readouterr().err
    assert not options.out.exists()


def test_an_experiment_without_a_space_says_how_to_add_one(write_file, options):
    path = write_file()
    path.write_text(path.read_text().partition("search:")[0])
    with pytest.raises(ConfigError, match=r"has no section search\. Add one"):
        run_search(path, options, SearchOptions())


def test_an_ablation_needs_ef_fer1(write_file, options):
    with pytest.raises(ConfigError, match="pretrain is null"):
        run_search(write_file(), options, SearchOptions(ablation=True))


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "journal.log"])
def test_an_ablation_tunes_both_arms_alike_and_judges_the_winners_on_test(
    write_file, options, fake_child, tmp_path, storage
):
    path = write_file(engine="random" if storage is None else "optuna")
    path.write_text(path.read_text() + "    pretrain.epochs: {choice: [1, 2]}\n")
    given = {"pretrain": {"data": {"source": "synthetic_scenes"}}, "ablation.seeds": [0, 1]}
    place = None if storage is None else str(tmp_path / storage)
    folder = run_search(path, replace(options, overrides=given), SearchOptions(ablation=True, trials=3, storage=place))
    arms: dict = {}
    for row in read_trials(folder):
        arms.setdefault(row.arm, []).append(row)
    assert {name: len(rows) for name, rows in arms.items()} == {"with EF-FER1": 3, "without EF-FER1": 3}
    assert "pretrain.epochs" in arms["with EF-FER1"][0].settings
    assert "pretrain.epochs" not in arms["without EF-FER1"][0].settings
    assert load_experiment(folder / "best-without-ef-fer1.yaml").pretrain is None
    assert not (folder / "best.yaml").exists()
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["judged_on"] == "test"
    assert len(comparison["paired"]) == 1
    # Of seed 0 the trial's own run is judged, seed 1 is trained; nothing else has a test split.
    bests = {Path(max(rows, key=lambda row: row.score).path).name for rows in arms.values()}
    assert {member["run"] for member in comparison["runs"] if member["seed"] == 0} == bests
    judged = {path.parents[1].name for path in folder.parent.glob("*/predictions/test.npz")}
    assert judged == {member["run"] for member in comparison["runs"]}
    assert len(judged) == 4
    page = (folder / "report.html").read_text()
    assert comparison["paired"][0]["sentence"][:60] in page
    winners = [row for row in read_member_rows(folder) if row.trial is None]
    assert [(row.arm, row.seed, row.status) for row in winners] == [
        (arm, seed, "finished") for seed in (0, 1) for arm in ("with EF-FER1", "without EF-FER1")
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("fake_child")
def test_a_storage_goes_on_with_the_same_command_in_the_same_folder(write_file, options, tmp_path):
    given = SearchOptions(storage=str(tmp_path / "journal.log"), trials=2)
    folder = run_search(write_file(engine="optuna"), options, given)
    first = read_trials(folder)
    assert folder.name.startswith("shared-")
    assert run_search(tmp_path / "a.yaml", options, replace(given, trials=3)) == folder
    assert read_trials(folder)[:2] == first
    assert len(read_trials(folder)) == 3
    with pytest.raises(UserError, match="continue it with the command that began it"):
        resume_search(folder, options, SearchOptions())


@pytest.mark.usefixtures("fake_child")
def test_a_storage_refuses_another_experiment_and_other_engines(write_file, options, tmp_path):
    given = SearchOptions(storage=str(tmp_path / "journal.log"), trials=1)
    folder = run_search(write_file(engine="optuna"), options, given)
    with pytest.raises(ConfigError, match=r"(?s)experiment\.seed: 0 -> 7.*--set experiment\.name=NAME"):
        run_search(write_file("b.yaml", engine="optuna", seed=7), options, given)
    with pytest.raises(ConfigError, match="found random with --storage, expected optuna"):
        run_search(write_file("c.yaml"), options, given)
    # Nothing is left behind by what was refused.
    assert list((options.out / "a").glob("*-search")) == [folder]


def test_a_storage_that_cannot_be_reached_is_explained(write_file, options):
    given = SearchOptions(storage="postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(EnvironmentProblem, match="the storage cannot be used"):
        run_search(write_file(engine="optuna"), options, given)
    assert not options.out.exists()
