"""Members of an ablation or a sweep as tasks of a job array, and the collection of what has finished."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.runs.find import list_runs
from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.run import Run, create_run
from dlfer.study.ablation import ABLATION, EQUAL_COMPUTE, WITH, WITHOUT
from dlfer.study.comparison import ArrayTask
from dlfer.study.members import open_shared_run
from dlfer.study.sweep import SWEEP


def find_shared() -> Path:
    (path,) = Path("runs/small").glob("shared-*-sweep")
    return path


def test_each_member_is_a_run_in_one_shared_folder_and_the_rest_is_collected(file, options, plan, capfd):
    first = SWEEP.start(file, options, array=ArrayTask("1"))
    assert first.name == f"{find_shared().name}-1"
    assert Run(first).status == "finished"
    # Only who collects writes members.csv.
    assert not (find_shared() / "members.csv").exists()
    path = SWEEP.start(file, options, array=ArrayTask(None))
    assert path == find_shared()
    assert [row.status for row in read_member_rows(path)] == ["pending", "finished"]
    assert Run(path).status == "stopped"
    said = capfd.readouterr().err
    assert "1 of 2 members are not finished:\n  dlfer sweep ... --member 0    dropout=0.1, seed 0: pending" in said
    assert [row["arm"] for row in json.loads((path / "comparison.json").read_text())["table"]] == ["dropout=0.2"]
    SWEEP.start(file, options, array=ArrayTask("0"))
    SWEEP.start(file, options, array=ArrayTask(None))
    assert [row.status for row in read_member_rows(path)] == ["finished", "finished"]
    assert Run(path).status == "finished"
    assert {run.kind for run in list_runs(Path("runs"))} == {"run", "sweep"}


@pytest.mark.parametrize("variable", ["SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"])
def test_auto_takes_the_index_of_the_scheduler(file, options, plan, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert SWEEP.start(file, options, array=ArrayTask("auto")).name.endswith("-sweep-1")


def test_a_member_that_is_no_number_of_the_plan_is_refused(file, options, plan, monkeypatch):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(UserError, match="neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX"):
        SWEEP.start(file, options, array=ArrayTask("auto"))
    for text in ("2", "-1", "x"):
        with pytest.raises(UserError, match="expected a number from 0 to 1"):
            SWEEP.start(file, options, array=ArrayTask(text))
    assert not Path("runs").exists()


def test_a_member_is_not_run_twice_and_one_that_stopped_goes_on(file, options, plan):
    plan |= {"0.1": {"do": "wait"}}
    with pytest.raises(TrainingStopped):
        SWEEP.start(file, replace(options, max_hours=1e-9), array=ArrayTask("0"))
    plan.clear()
    plan |= {"right": {"train": 55, "validation": 40, "test": 30}}
    path = SWEEP.start(file, options, array=ArrayTask("0"))
    begun = (path / "begun.txt").read_text()
    assert SWEEP.start(file, options, array=ArrayTask("0")) == path
    assert (path / "begun.txt").read_text() == begun


def test_a_member_that_fails_says_so_by_its_exit_code(file, options, plan):
    plan |= {"0.1": {"do": "fail"}, "0.2": {"do": "refuse"}}
    with pytest.raises(DlferError, match=r"dropout=0\.1, seed 0 failed: NonFiniteError: the loss became nan") as caught:
        SWEEP.start(file, options, array=ArrayTask("0"))
    assert caught.value.exit_code == 1
    with pytest.raises(UserError, match=r"dropout=0.2, seed 0 failed: DataError: no such file\."):
        SWEEP.start(file, options, array=ArrayTask("1"))
    with pytest.raises(DlferError, match="2 of 2 members failed"):
        SWEEP.start(file, options, array=ArrayTask(None))


def test_a_shared_sweep_can_be_completed_here(file, options, plan):
    SWEEP.start(file, options, array=ArrayTask("0"))
    path = SWEEP.resume(find_shared(), options)
    assert [row.status for row in read_member_rows(path)] == ["finished", "finished"]
    assert [Path(row.path).name for row in read_member_rows(path)] == [f"{path.name}-{number}" for number in (0, 1)]


def test_another_experiment_has_another_shared_folder(file, options, plan):
    SWEEP.start(file, options, array=ArrayTask("0"))
    SWEEP.start(file, replace(options, overrides={"finetune.epochs": 1}), array=ArrayTask("0"))
    assert len(list(Path("runs/small").glob("shared-*-sweep"))) == 2


def test_equal_compute_waits_for_the_arm_whose_cost_it_takes(file, options, plan):
    keys = {"pretrain": {"data": {"source": "synthetic_scenes"}}, "ablation.equal_compute": True, "sweep": None}
    given = replace(options, overrides=keys)
    with pytest.raises(UserError, match=f"{EQUAL_COMPUTE}, seed 0 needs a finished member of another arm"):
        ABLATION.start(file, given, seeds=[0], array=ArrayTask("2"))
    ABLATION.start(file, given, seeds=[0], array=ArrayTask("1"))
    path = ABLATION.start(file, given, seeds=[0], array=ArrayTask(None))
    assert [(row.arm, row.status) for row in read_member_rows(path)] == [
        (WITH, "pending"),
        (WITHOUT, "finished"),
        (EQUAL_COMPUTE, "pending"),
    ]


def _open(number: int) -> str:
    config = load_experiment("small.yaml")
    create = lambda folder: create_run(folder, config, argv=[str(number)], kind="sweep")  # noqa: E731
    run = open_shared_run(Path("runs"), config.experiment.name, "shared-x", create)
    return run.read_json("run.json")["argv"][0]


def test_many_processes_agree_on_one_directory(file):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made_by = pool.map(_open, range(12))
    assert len(set(made_by)) == 1
    assert [path.name for path in Path("runs").iterdir()] == ["small"]
    assert [path.name for path in Path("runs/small").iterdir()] == ["shared-x"]
