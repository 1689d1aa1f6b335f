"""Whole searches in this process, with a stand-in for the training."""

from __future__ import annotations

import csv
import json
import re
import threading

import pytest

from dlfer.config.load import load_experiment
from dlfer.errors import ConfigError, DlferError, TrainingStopped, UserError
from dlfer.report.search import write_search_report
from dlfer.runs.find import open_run
from dlfer.runs.options import RunOptions
from dlfer.study.search import run as search_run
from dlfer.study.search.files import list_differences
from dlfer.study.search.run import SearchOptions, resume_search, run_search
from dlfer.train.control import StopControl

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
    return json.loads((folder / "trials.json").read_text())["arms"][0]["records"]


@pytest.mark.usefixtures("fake_child")
def test_a_search_from_file_to_report(write_file, options):
    folder = run_search(write_file(), options, SearchOptions(workers=2))
    assert open_run(folder).status == "finished"
    records = read_trials(folder)
    assert [record["status"] for record in records] == ["finished"] * 4
    best = max(records, key=lambda record: record["score"])
    assert best["low"] < best["score"] < best["high"]
    config = load_experiment(folder / "best.yaml")
    assert config.model.dropout == best["overrides"]["model.dropout"]
    assert config.search is None
    with open(folder / "members.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["model.dropout"]) for row in rows] == [r["overrides"]["model.dropout"] for r in records]
    page = (folder / "report.html").read_text()
    assert "Leaderboard" in page
    assert f"{best['score']:.4f}" in page
    assert page.count("<img") == 3
    assert write_search_report(folder).read_text() == page


@pytest.mark.usefixtures("fake_child")
def test_what_the_live_table_reads_waits_for_nobody(write_file, options, monkeypatch):
    """The terminal is locked while it is drawn, and the board while it tells: each must not wait for the other."""
    waited = []

    class View(search_run.SearchView):
        def start(self, title, total, num_workers, read):
            super().start(title, total, num_workers, read)
            self.read = read

        def update(self, records):
            thread = threading.Thread(target=self.read, daemon=True)
            thread.start()
            thread.join(2)
            waited.append(thread.is_alive())

    monkeypatch.setattr(search_run, "SearchView", View)
    run_search(write_file(), options, SearchOptions(trials=1))
    assert waited
    assert not any(waited)


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


@pytest.mark.usefixtures("fake_child")
def test_hyperbands_rungs_are_one_run(write_file, options):
    folder = run_search(write_file(engine="hyperband"), options, SearchOptions())
    records = read_trials(folder)
    promoted = [r for r in records if r["rung"] is None and r["overrides"] == records[0]["overrides"]]
    runs = {json.dumps(record["overrides"]): record["run"] for record in records}
    assert len(set(runs.values())) < len(records)
    assert all(record["run"] == runs[json.dumps(record["overrides"])] for record in records)
    for record in [*promoted, *[r for r in records if r["status"] == "finished"]]:
        log = (folder.parent / record["run"] / "log.txt").read_text().splitlines()
        assert log in (["begins after 0"], ["begins after 0", "begins after 1"])


@pytest.mark.usefixtures("fake_child")
def test_failing_trials_are_recorded_and_told_on_the_page(write_file, options):
    folder = run_search(write_file(high=0.99), RunOptions(**{**options.__dict__, "overrides": FAIL}), SearchOptions())
    records = read_trials(folder)
    failed = [record for record in records if record["status"] == "failed"]
    assert 0 < len(failed) < 4
    assert "the loss became nan" in failed[0]["error"]
    assert "the loss became nan" in (folder / "report.html").read_text()


FAIL = {"search.space.model.dropout": {"choice": [0.3, 0.95]}, "search.engine": "grid"}


@pytest.mark.usefixtures("fake_child")
def test_a_bug_in_the_experiment_stops_the_search(write_file, options):
    with pytest.raises(UserError, match=r"(?s)faces\.csv is not there.*dlfer search --resume"):
        run_search(write_file(seed=16), options, SearchOptions())
    (search,) = (options.out / "a").glob("*-search")
    assert open_run(search).status == "failed"
    assert [record["status"] for record in read_trials(search)] == ["failed"]


@pytest.mark.usefixtures("fake_child")
def test_three_alike_stop_it_too(write_file, options):
    always = {"search.space.model.dropout": {"between": [0.91, 0.99]}}
    with pytest.raises(DlferError, match="the loss became nan"):
        run_search(write_file(), RunOptions(**{**options.__dict__, "overrides": always}), SearchOptions())


@pytest.mark.usefixtures("fake_child")
def test_ctrl_c_ends_with_the_best_so_far_and_resume_goes_on(write_file, options, monkeypatch, capsys):
    class Impatient(StopControl):
        def get_reason(self):
            done = list((options.out / "a").glob("*/metrics.json"))
            if len(done) >= 2:
                self.request("Ctrl-C")
            return super().get_reason()

    with monkeypatch.context() as patch:
        patch.setattr(search_run, "StopControl", Impatient)
        with pytest.raises(TrainingStopped) as caught:
            run_search(write_file(seed=15), options, SearchOptions())
    assert caught.value.exit_code == 130
    (folder,) = (options.out / "a").glob("*-search")
    assert open_run(folder).status == "stopped"
    assert (folder / "best.yaml").exists()
    assert (folder / "report.html").exists()
    said = capsys.readouterr().err
    assert "best validation macro_f1" in said
    assert f"dlfer search --resume {folder}" in said
    resume_search(folder, options, SearchOptions())
    assert [record["status"] for record in read_trials(folder)] == ["finished"] * 4


@pytest.mark.usefixtures("fake_child")
def test_ctrl_c_in_the_first_trial_says_where_that_one_stands(write_file, options, monkeypatch, capsys):
    class Impatient(StopControl):
        def get_reason(self):
            if list((options.out / "a").glob("*/finetune/history.csv")):
                self.request("Ctrl-C")
            return super().get_reason()

    monkeypatch.setattr(search_run, "StopControl", Impatient)
    with pytest.raises(TrainingStopped):
        run_search(write_file(seed=15), options, SearchOptions())
    said = capsys.readouterr().err
    assert "no trial has a score yet" in said
    assert re.search(r"trial 1 interrupted at macro_f1 0\.\d{4} after [12] epochs: dropout", said), said


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


@pytest.mark.usefixtures("fake_child")
def test_an_ablation_tunes_both_arms_alike_and_judges_the_winners_on_test(write_file, options):
    path = write_file()
    path.write_text(path.read_text() + "    pretrain.epochs: {choice: [1, 2]}\n")
    given = {"pretrain": {"data": {"source": "synthetic_scenes"}}, "ablation.seeds": [0, 1]}
    both = RunOptions(**{**options.__dict__, "overrides": given})
    folder = run_search(path, both, SearchOptions(ablation=True, trials=3))
    arms = json.loads((folder / "trials.json").read_text())["arms"]
    assert [(arm["name"], len(arm["records"])) for arm in arms] == [("with EF-FER1", 3), ("without EF-FER1", 3)]
    assert "pretrain.epochs" in arms[0]["records"][0]["overrides"]
    assert "pretrain.epochs" not in arms[1]["records"][0]["overrides"]
    assert load_experiment(folder / "best-without-ef-fer1.yaml").pretrain is None
    assert not (folder / "best.yaml").exists()
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["judged_on"] == "test"
    assert len(comparison["paired"]) == 1
    # Of seed 0 the trial's own run is judged, seed 1 is trained; nothing else has a test part.
    bests = {max(arm["records"], key=lambda record: record["score"])["run"] for arm in arms}
    assert {member["run"] for member in comparison["runs"] if member["seed"] == 0} == bests
    judged = {path.parents[1].name for path in folder.parent.glob("*/predictions/test.npz")}
    assert judged == {member["run"] for member in comparison["runs"]}
    assert len(judged) == 4
    assert comparison["paired"][0]["sentence"] in (folder / "report.html").read_text()
