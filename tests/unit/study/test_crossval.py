"""A cross-validation's order of things: folds, pooled predictions, choice by fold, members that fail, tasks of an array."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dlfer
from dlfer.cli import main
from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError, DlferError, EnvironmentProblem, ModelError, UserError
from dlfer.experiment.limits import find_obstacles
from dlfer.metrics.predictions import read_predictions
from dlfer.report.comparison import write_comparison_report
from dlfer.runs.comparison_record import ComparisonRecord
from dlfer.runs.listeners import RunOptions
from dlfer.runs.run import Run
from dlfer.study.compare import compare_runs
from dlfer.study.comparison import ArrayTask
from dlfer.study.crossval import CROSSVAL
from dlfer.study.sweep import SWEEP

pytestmark = pytest.mark.usefixtures("blank_figures")

EXPERIMENT = """\
experiment: {name: small, seed: 7}
model: {dropout: 0.3}
finetune:
  data: {source: synthetic_faces, protocol: cross_validation, folds: 3}
  epochs: 2
"""
CELLS = """\
sweep:
  grid:
    model.dropout: [0.1, 0.2]
"""


@pytest.fixture
def folds(file) -> Path:
    """An experiment to be cross-validated over three folds."""
    file.write_text(EXPERIMENT)
    return file


@pytest.fixture
def cells(folds) -> Path:
    """The same with a sweep of two cells."""
    folds.write_text(EXPERIMENT + CELLS)
    return folds


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def set_keys(options: RunOptions, **overrides) -> RunOptions:
    return replace(options, overrides={key.replace("__", "."): value for key, value in overrides.items()})


def test_each_image_is_predicted_once_and_the_pool_has_two_intervals(folds, options, plan, capfd):
    path = CROSSVAL.start(folds, options)
    assert (Run(path).status, Run(path).kind, path.name.endswith("-cross_validation")) == (
        "finished",
        "cross_validation",
        True,
    )
    members = read_csv(path / "members.csv")
    assert [(m["arm"], m["seed"], m["fold"], m["status"]) for m in members] == [
        ("small", str(7 + fold), str(fold), "finished") for fold in range(3)
    ]
    assert [Run(Path(m["path"])).config().finetune.data.fold for m in members] == [0, 1, 2]
    found = ComparisonRecord.require(path).table[0].cross_validated
    pooled = read_predictions(path / found.predictions)
    assert len(set(pooled.ids.tolist())) == len(pooled) == 180 == found.n
    assert (found.num_groups, found.num_folds, [fold.seed for fold in found.folds]) == (90, 3, [7, 8, 9])
    assert found.recipe.value == found.trained.value == pytest.approx(pooled.correct.mean())
    assert np.average([fold.accuracy.value for fold in found.folds]) == pytest.approx(found.recipe.value)
    assert found.recipe.low < found.trained.low < found.trained.value < found.trained.high < found.recipe.high
    said = capfd.readouterr().err
    assert "Each of 180 images was predicted once, by the model of its fold" in said
    assert "[3/3] small, fold 2" in said
    page = (path / "report.html").read_text()
    assert "<title>small: cross-validation</title>" in page
    assert "accuracy<br>of the trained models" in page
    assert page.count("data:image/png;base64,") == 2
    assert write_comparison_report(path).exists()


@pytest.mark.slow
def test_cells_are_ranked_by_validation_and_compared_over_folds(cells, options, plan, capfd):
    plan |= {
        "0.1": {"right": {"validation": 30, "test": 50}},
        "0.2": {"right": {"validation": 50, "test": 20}},
    }
    path = CROSSVAL.start(cells, options)
    found = ComparisonRecord.require(path)
    assert [row.arm for row in found.table] == ["dropout=0.2", "dropout=0.1"]
    (pair,) = found.paired
    assert (pair.a, pair.b, pair.num_folds, pair.scope) == ("dropout=0.2", "dropout=0.1", 3, "recipes")
    assert pair.is_significant
    assert (
        "3 folds, n = 180): significant difference (t test over folds with Nadeau and Bengio's correction"
        in pair.sentence
    )
    # Each fold's own choice is the cell that is best on its validation, however bad it is on the fold.
    assert {fold.arm for fold in found.chosen.folds} == {"dropout=0.2"}
    assert found.chosen.trained.value == found.table[0].test.value
    assert {row.key for row in found.arm_keys} == {"model.dropout"}
    with pytest.raises(UserError, match=r"compare the pooled predictions of its arms: .*0\.npz .*1\.npz"):
        compare_runs([str(path), str(path)])
    files = {row.cross_validated.predictions for row in found.table}
    assert len(files) == 2
    assert all(len(read_predictions(path / name)) == 180 for name in files)
    assert "each fold's own choice" in (path / "report.html").read_text().replace("&#39;", "'")
    assert "each fold's own choice" in capfd.readouterr().err


def test_a_reference_of_which_no_fold_finished_is_replaced_by_none(cells, options, plan):
    plan |= {"0.1": {"do": "fail"}}
    keys = replace(options, overrides={**options.overrides, "sweep.reference": "dropout=0.1"})
    with pytest.raises(DlferError):
        CROSSVAL.start(cells, keys)
    found = ComparisonRecord.require(next(Path("runs/small").glob("*-cross_validation")))
    assert found.paired == []
    notes = " ".join(found.notes)
    assert "No arm is compared with 'dropout=0.1', which was named beforehand" in notes
    assert "(named beforehand)" not in notes


def test_the_experiment_that_comes_with_dlfer_is_a_cross_validation():
    """What it extends has keys of a sweep that a cross-validation refuses."""
    path = Path(dlfer.__file__).parents[1] / "experiments" / "backbones_cv.yaml"
    plan = CROSSVAL.plan(load_experiment(path), path, False)
    assert (len(plan.arms), len(plan.seeds)) == (112, 5)


@pytest.mark.slow
def test_cells_whose_folds_hold_other_images_are_not_compared(cells, options, plan):
    """As where images of a folder are reduced to sizes that differ, and near duplicates with them."""
    plan |= {"0.1": {"shift": 1}}
    found = ComparisonRecord.require(CROSSVAL.start(cells, options))
    assert (len(found.table), found.paired, found.chosen) == (2, [], None)
    assert "Not compared: 1 of 1 arms" in " ".join(found.notes)


@pytest.mark.slow
def test_a_fold_that_fails_is_named_left_out_and_run_again(folds, options, plan):
    plan |= {"0.3": {"do": "fail"}}
    with pytest.raises(DlferError):
        CROSSVAL.start(folds, options)
    path = next(Path("runs/small").glob("*-cross_validation"))
    plan.clear()
    plan |= {"right": {"train": 55, "validation": 40, "test": 30}}
    CROSSVAL.resume(path, RunOptions())
    assert {m["status"] for m in read_csv(path / "members.csv")} == {"finished"}
    assert ComparisonRecord.require(path).table[0].cross_validated.n == 180


@pytest.mark.slow
def test_a_cross_validation_that_was_opened_in_python_is_resumed_as_one(folds, options, plan):
    path = CROSSVAL.start(folds, options)
    Run(path).stop("Ctrl-C")
    study = dlfer.open_run(path)
    assert (study.kind, study.resume().status) == ("cross_validation", "finished")
    assert ComparisonRecord.require(path).table[0].cross_validated.n == 180


@pytest.mark.slow
def test_the_tasks_of_an_array_train_folds_and_what_is_there_is_collected(folds, options, plan, capfd):
    CROSSVAL.start(folds, options, array=ArrayTask("1"))
    path = CROSSVAL.start(folds, options, array=ArrayTask(None))
    found = ComparisonRecord.require(path)
    (row,) = found.table
    assert [fold.fold for fold in row.cross_validated.folds] == [1]
    assert row.cross_validated.recipe.low is None
    assert "one fold has finished" in row.cross_validated.recipe.reason
    assert row.cross_validated.trained.low is not None
    assert "2 of 3 members have not finished" in " ".join(found.notes)
    assert "dlfer crossval ... --member 0    small, fold 0: pending" in capfd.readouterr().err
    for member in "02":
        CROSSVAL.start(folds, options, array=ArrayTask(member))
    assert CROSSVAL.start(folds, options, array=ArrayTask(None)) == path
    assert ComparisonRecord.require(path).table[0].cross_validated.n == 180


@pytest.mark.slow
def test_an_image_in_two_folds_is_refused(folds, options, plan):
    plan |= {"same_images": True}
    with pytest.raises(ModelError, match=r"the image 'all/0' is in two folds; the data has changed"):
        CROSSVAL.start(folds, options)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"finetune__data": {"source": "synthetic_faces"}},
            r"protocol: found official, expected cross_validation.*--folds 5",
        ),
        ({"finetune__data__fold": 1}, r"fold: found 1; dlfer crossval trains a model for every fold"),
        ({"sweep__grid__model__dropout": [0.1, 0.2], "sweep__seeds": [0, 1]}, r"sweep\.seeds: found \[0, 1\]"),
        ({"sweep__grid__model__dropout": [0.1, 0.2], "sweep__rank_by": "macro_f1"}, r"sweep\.rank_by: found macro_f1"),
        ({"sweep__grid__model__dropout": [0.1, 0.2], "sweep__best_of": ["model.dropout"]}, r"sweep\.best_of: found"),
        (
            {"pretrain": {"data": {"source": "synthetic_faces"}}},
            r"pretrain\.data: found source synthetic_faces.*EF-FER1 would have seen the test fold",
        ),
        (
            {"sweep__grid": {"finetune.data.seed": [0, 1]}},
            r"the cell 'seed=1' sets finetune\.data\.seed; all cells of a cross-validation are judged on the same images",
        ),
    ],
)
def test_experiments_that_cannot_be_cross_validated_are_refused(folds, options, plan, keys, message):
    with pytest.raises(ConfigError, match=message):
        CROSSVAL.start(folds, set_keys(options, **keys))


def test_one_training_without_a_fold_is_an_obstacle_of_all_other_verbs(cells, options, plan):
    config = load_experiment(cells)
    for kind in ("run", "ablation", "sweep", "search"):
        assert any("finetune.data.fold: found null" in line for line in find_obstacles(config, kind=kind))
    assert not any("fold" in line for line in find_obstacles(config, kind="cross_validation"))
    with pytest.raises(EnvironmentProblem, match=r"dlfer crossval trains a model for each fold"):
        SWEEP.start(cells, options)


def test_a_smoke_run_trains_two_folds(folds, options, plan):
    path = CROSSVAL.start(folds, replace(options, smoke=True))
    assert [m["fold"] for m in read_csv(path / "members.csv")] == ["0", "1"]


def test_folds_belong_to_the_start_and_are_refused_on_resume(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["crossval", "--resume", "x", "--folds", "5"])
    assert stop.value.code == 2
    assert "continues with its own folds; leave --folds out" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["1", "21"])
def test_a_wrong_number_of_folds_names_the_option_that_gave_it(folds, capsys, given):
    with pytest.raises(SystemExit) as stop:
        main(["crossval", str(folds), "--folds", given])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"--folds {given}: finetune.data.folds: found {given}" in said
    assert "--set" not in said


FEW = "{train: 24, validation: 8, test: 8}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "beside",
    [
        ["finetune.data.protocol=cross_validation", f"finetune.data.num_images={FEW}"],
        [f"finetune.data={{source: synthetic_faces, num_images: {FEW}}}"],
    ],
)
def test_folds_hold_beside_a_section_of_data_and_their_protocol(folds, capsys, plan, beside):
    with pytest.raises(SystemExit) as stop:
        main(
            ["crossval", str(folds), "--folds", "2", *(word for key in beside for word in ("--set", key)), "--dry-run"]
        )
    assert not stop.value.code
    assert "1 arm x 2 folds" in capsys.readouterr().err


def test_folds_turn_any_experiment_into_one_to_be_cross_validated(folds, capsys, plan):
    folds.write_text(EXPERIMENT.replace(", protocol: cross_validation, folds: 3", ""))
    with pytest.raises(SystemExit):
        main(["crossval", str(folds), "--folds", "21"])
    assert "finetune.data.folds" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["crossval", str(folds), "--folds", "2", "--out", "runs"])
    assert not stop.value.code
    assert (Path(capsys.readouterr().out.split()[0]) / "comparison.json").exists()
