"""What `dlfer.sweep`, `ablate` and `search` return, and how they are resumed; the members do not train."""

from __future__ import annotations

import pytest

import dlfer
from dlfer.errors import DlferError

pytestmark = pytest.mark.usefixtures("blank_figures")

SPACE = {"search.engine": "random", "search.trials": 2, "search.space": {"model.dropout": {"between": [0.0, 0.6]}}}


def test_a_sweep_returns_its_table_and_its_runs(file, plan):
    plan |= {"0.1": {"right": {"validation": 30, "test": 50}}, "0.2": {"right": {"validation": 50, "test": 30}}}
    study = dlfer.sweep(file, {"finetune.epochs": 1}, seeds=[0, 1], out="runs")
    assert (study.kind, study.status) == ("sweep", "finished")
    assert [row.arm for row in study.comparison.table] == ["dropout=0.2", "dropout=0.1"]
    assert [row.seed for row in study.members] == [0, 0, 1, 1]
    assert [run.config.finetune.epochs for run in study.runs] == [1] * 4
    assert [run.metrics.validation.n for run in study.runs] == [60] * 4
    assert study.report.is_file()
    assert "dropout=0.2" in study._repr_html_()
    assert study.best == {}
    assert dlfer.compare(*study.runs, split="validation").n_common == 60


@pytest.mark.slow
def test_an_experiment_in_memory_makes_the_same_study(file, plan):
    config = dlfer.load_experiment(file, {"sweep.grid": {"model.dropout": [0.3, 0.4]}})
    study = dlfer.sweep(config, seeds=[2])
    assert [row.settings for row in study.members] == [{"model.dropout": 0.3}, {"model.dropout": 0.4}]
    assert study.folder.parts[:3] == ("saved_models", "runs", "small")


def test_an_ablation_has_two_arms(file, plan):
    study = dlfer.ablate(file, {"pretrain": {"data": {"source": "synthetic_scenes"}}}, seeds=[0], workers=2)
    assert [row.arm for row in study.comparison.table] == ["with EF-FER1", "without EF-FER1"]
    assert len(study.comparison.paired) == 1


@pytest.mark.usefixtures("fake_child")
def test_the_best_of_a_search_is_an_experiment(file):
    study = dlfer.search(file, SPACE)
    assert [row.status for row in study.members] == ["finished"] * 2
    best = max(study.members, key=lambda row: row.score)
    assert list(study.best) == ["best"]
    assert study.best["best"].model.dropout == best.settings["model.dropout"]
    shown = study._repr_html_()
    assert shown.index(f"{best.score:.4f}") == min(shown.index(f"{row.score:.4f}") for row in study.members)


@pytest.mark.slow
def test_a_member_that_failed_is_resumed(file, plan):
    plan |= {"0.1": {"do": "fail"}}
    with pytest.raises(DlferError, match="1 of 2 members failed"):
        dlfer.sweep(file, out="runs")
    [folder] = (file.parent / "runs" / "small").glob("*-sweep")
    study = dlfer.open_run(folder)
    assert study.status == "failed"
    plan |= {"0.1": {"right": {"train": 55, "validation": 40, "test": 30}}}
    assert study.resume(workers=1).status == "finished"
