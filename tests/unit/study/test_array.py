"""Members of an ablation or a sweep as tasks of a job array, and the collection of what has finished."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dlfer.cli import main
from dlfer.config.load import compute_digest, load_experiment
from dlfer.errors import DlferError, TrainingStopped, UserError
from dlfer.report.comparison import write_comparison_report
from dlfer.runs.find import list_runs
from dlfer.runs.member_rows import read_member_rows
from dlfer.runs.run import Run, create_run
from dlfer.study.ablation import ABLATION, EQUAL_COMPUTE, WITH, WITHOUT
from dlfer.study.comparison import ArrayTask
from dlfer.study.members import open_shared_run
from dlfer.study.sweep import SWEEP

pytestmark = pytest.mark.usefixtures("blank_figures")


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


def test_a_seed_that_is_too_large_names_the_option_that_gave_it(file, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", str(file), "--seeds", "99999999999", "--out", "runs"])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--seeds 99999999999: sweep.seeds" in said
    assert "--set" not in said


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


def read_subtitle(path: Path) -> str:
    """Return the line of a page that has the status, which is the same when the page is written again."""
    line = re.search(rf"{path.name} · [^<]*", (path / "report.html").read_text())[0]
    assert line in write_comparison_report(path).read_text()
    return line.strip()


@pytest.mark.slow
def test_the_page_of_the_last_collection_is_that_of_a_finished_comparison(file, options, plan):
    SWEEP.start(file, options, array=ArrayTask("0"))
    path = SWEEP.start(file, options, array=ArrayTask(None))
    assert read_subtitle(path).endswith("· stopped")
    SWEEP.start(file, options, array=ArrayTask("1"))
    SWEEP.start(file, options, array=ArrayTask(None))
    assert "stopped" not in read_subtitle(path)
    assert f"finished {Run(path).record.finished[:16].replace('T', ' ')} UTC" in read_subtitle(path)


@pytest.mark.slow
def test_the_page_of_a_sweep_that_ran_here_has_the_time_of_its_end(file, options, plan, monkeypatch):
    path = SWEEP.start(file, options)
    assert f"finished {Run(path).record.finished[:16].replace('T', ' ')} UTC" in read_subtitle(path)
    plan |= {"0.1": {"do": "fail"}}
    with pytest.raises(DlferError, match="1 of 2 members failed"):
        SWEEP.start(file, options, seeds=[1])
    (failed,) = (run.path for run in list_runs(Path("runs")) if run.kind == "sweep" and run.path != path)
    assert read_subtitle(failed).endswith("· failed")


def test_a_comparison_without_its_page_is_not_finished(file, options, plan, monkeypatch):
    for member in ("0", "1"):
        SWEEP.start(file, options, array=ArrayTask(member))

    def refuse(path, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlfer.study.comparison.write_comparison_report", refuse)
    with pytest.raises(OSError, match="No space left"):
        SWEEP.start(file, options, array=ArrayTask(None))
    assert Run(find_shared()).status != "finished"


def list_shared() -> set[str]:
    return {path.name for path in Path("runs/small").glob("shared-*-sweep")}


@pytest.mark.slow
def test_other_seeds_and_another_grid_have_other_shared_folders(file, options, plan):
    """A finished run of one comparison counted as the member of the same number of the other."""
    first = SWEEP.start(file, options, array=ArrayTask("0"))
    second = SWEEP.start(file, options, seeds=[5], array=ArrayTask("0"))
    assert [Run(path).config().experiment.seed for path in (first, second)] == [0, 5]
    other = replace(options, overrides={"sweep.grid": {"model.dropout": [0.3, 0.4]}})
    third = SWEEP.start(file, other, array=ArrayTask("0"))
    assert Run(third).config().model.dropout == 0.3
    turned = replace(options, overrides={"sweep.grid": {"model.dropout": [0.2, 0.1]}})
    SWEEP.start(file, turned, array=ArrayTask(None))
    assert len(list_shared()) == 4
    SWEEP.start(file, options, seeds=[0], array=ArrayTask(None))
    assert len(list_shared()) == 4


def test_a_run_of_another_comparison_under_a_members_name_is_refused(file, options, plan):
    foreign = SWEEP.start(file, options, array=ArrayTask("0"))
    folder = SWEEP.start(file, options, seeds=[5], array=ArrayTask(None))
    foreign.rename(foreign.with_name(f"{folder.name}-0"))
    expected = (
        r"sweep-0: found a run of another comparison where member 0 .*experiment.seed: 5 -> 0\. Move this folder away"
    )
    for member in ("0", None):
        with pytest.raises(UserError, match=expected):
            SWEEP.start(file, options, seeds=[5], array=ArrayTask(member))


def test_a_run_that_another_process_made_under_a_members_name_is_refused(file, options, plan, monkeypatch):
    folder = SWEEP.start(file, options, array=ArrayTask(None))
    foreign = create_run(Path("other"), load_experiment(file, {"model.dropout": 0.4}), argv=[])
    made = lambda out, experiment, name, create: Run(folder) if name.endswith("-sweep") else foreign  # noqa: E731
    monkeypatch.setattr("dlfer.study.comparison.open_shared_run", made)
    with pytest.raises(UserError, match=r"model.dropout: 0.1 -> 0.4"):
        SWEEP.start(file, options, array=ArrayTask("0"))


def test_a_folder_that_an_earlier_version_named_goes_on_with_the_same_plan_only(file, options, plan):
    first = SWEEP.start(file, options, array=ArrayTask("0"))
    former = f"shared-{compute_digest(load_experiment(file))[:8]}-sweep"
    find_shared().rename(first.with_name(former))
    first.rename(first.with_name(f"{former}-0"))
    assert SWEEP.start(file, options, array=ArrayTask("0")).name == f"{former}-0"
    assert SWEEP.start(file, options, array=ArrayTask("1")).name == f"{former}-1"
    path = SWEEP.start(file, options, array=ArrayTask(None))
    assert (path.name, list_shared()) == (former, {former})
    assert (first.with_name(f"{former}-0") / "begun.txt").read_text().count("\n") == 1
    assert SWEEP.start(file, options, seeds=[5], array=ArrayTask(None)).name != former


def test_a_change_that_a_member_went_on_with_is_no_other_comparison(file, options, plan):
    first = Run(SWEEP.start(file, options, array=ArrayTask("0")))
    settings = {**first.record.settings, "finetune": {**first.record.settings["finetune"], "epochs": 3}}
    changes = [{"time": "2026-01-01T00:00:00Z", "differences": ["config.yaml: finetune.epochs: 2 -> 3"]}]
    first.update(settings=settings, changes=changes)
    assert SWEEP.start(file, options, array=ArrayTask("0")) == first.path
    first.update(changes=[])
    with pytest.raises(UserError, match=r"planned -> found: finetune.epochs: 2 -> 3"):
        SWEEP.start(file, options, array=ArrayTask("0"))


@pytest.mark.slow
def test_the_epochs_of_equal_compute_are_those_that_its_member_has(file, options, plan, monkeypatch):
    monkeypatch.setattr("dlfer.study.ablation._count_equal_epochs", lambda config, members: 7)
    keys = {"pretrain": {"data": {"source": "synthetic_scenes"}}, "ablation.equal_compute": True, "sweep": None}
    given = replace(options, overrides=keys)
    for member in ("0", "2", "2"):
        ABLATION.start(file, given, seeds=[0], array=ArrayTask(member))
    path = ABLATION.start(file, given, seeds=[0], array=ArrayTask(None))
    row = read_member_rows(path)[2]
    assert (row.arm, row.status, row.settings["finetune.epochs"]) == (EQUAL_COMPUTE, "finished", 7)


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
