"""A sweep's order of things: ranks, files, members that fail, are killed, stopped, and gone on with."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from dlfer.errors import ConfigError, DlferError, ModelError, TrainingStopped, UserError
from dlfer.report.sweep import format_sweep_table
from dlfer.runs.comparison_record import ComparisonRecord
from dlfer.runs.find import open_run
from dlfer.runs.run import Run
from dlfer.study.sweep import SWEEP

pytestmark = pytest.mark.usefixtures("blank_figures")


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def find_sweep() -> Path:
    return next(Path("runs/small").glob("*-sweep"))


def count_begun(member: dict) -> int:
    return len((Path(member["path"]) / "begun.txt").read_text().splitlines())


def set_keys(options, **overrides):
    return replace(options, overrides={key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.slow
def test_cells_are_ranked_by_validation_whatever_test_says(file, options, plan, capfd):
    plan |= {
        "0.1": {"right": {"validation": 30, "test": 58}},
        "0.2": {"right": {"validation": 50, "test": 20}},
        "0.3": {"right": {"validation": 40, "test": 40}},
    }
    path = SWEEP.start(file, set_keys(options, **{"sweep.grid.model.dropout": [0.1, 0.2, 0.3], "sweep.seeds": [0, 1]}))
    assert open_run(path).status == "finished"
    comparison = ComparisonRecord.require(path)
    assert [row.arm for row in comparison.table] == ["dropout=0.2", "dropout=0.3", "dropout=0.1"]
    assert comparison.reference == "dropout=0.2"
    assert [(pair.a, pair.b, pair.part) for pair in comparison.paired] == [
        ("dropout=0.2", "dropout=0.3", "test"),
        ("dropout=0.2", "dropout=0.1", "test"),
    ]
    for pair in comparison.paired:
        assert pair.num_pairs == 2
        assert pair.p_holm >= pair.p_value
        assert "by Holm over 2 pairs" in pair.sentence
    best = comparison.table[0]
    assert best.seeds == [0, 1]
    assert best.validation.low < best.validation.value < best.validation.high
    assert best.validation.sd_over_seeds >= 0
    rows = read_csv(path / "sweep.csv")
    assert [(row["rank"], row["cell"], row["model.dropout"], row["num_seeds"]) for row in rows] == [
        ("1", "dropout=0.2", "0.2", "2"),
        ("2", "dropout=0.3", "0.3", "2"),
        ("3", "dropout=0.1", "0.1", "2"),
    ]
    assert float(rows[0]["validation_accuracy"]) == best.validation.value
    assert float(rows[0]["test_low"]) <= float(rows[0]["test_accuracy"]) <= float(rows[0]["test_high"])
    members = read_csv(path / "members.csv")
    assert [(m["arm"], m["seed"]) for m in members] == [(f"dropout=0.{i}", s) for s in "01" for i in (1, 2, 3)]
    assert {m["status"] for m in members} == {"finished"}
    notes = " ".join(comparison.notes)
    assert "The best of 3 cells was chosen on the same images" in notes
    assert "each of the 6 finished members opened it once" in notes
    page = (path / "report.html").read_text()
    assert "Best on validation by accuracy: dropout=0.2" in page
    assert page.count("data:image/png;base64,") == 3
    shown = capfd.readouterr().err
    assert shown.index("dropout=0.2, seed 1: validation") < shown.index("Ranked by accuracy")


def test_a_reference_named_beforehand_and_a_rank_by_macro_f1(file, options, plan):
    plan |= {"0.1": {"right": {"validation": 30}}, "0.2": {"right": {"validation": 50}}, "parts": ["validation"]}
    keys = {"sweep.reference": "dropout=0.1", "sweep.rank_by": "macro_f1"}
    comparison = ComparisonRecord.require(SWEEP.start(file, set_keys(options, **keys)))
    assert comparison.table[0].arm == "dropout=0.2"
    assert comparison.table[0].ranked_by == comparison.table[0].validation_macro_f1
    assert [(pair.a, pair.b, pair.part) for pair in comparison.paired] == [("dropout=0.1", "dropout=0.2", "validation")]
    notes = " ".join(comparison.notes)
    assert "named beforehand" in notes
    assert "There is no test split" in notes
    assert comparison.judged_on == "validation (PublicTest, used for selection)"


@pytest.mark.slow
def test_cells_that_were_judged_on_other_images_are_ranked_on_their_own_and_not_compared(file, options, plan):
    # As of a sweep over finetune.data.fraction, whose cells have other images.
    plan |= {"0.1": {"right": {"validation": 58}, "shift": 7}, "0.2": {"right": {"validation": 50}}, "0.3": {}}
    path = SWEEP.start(file, set_keys(options, **{"sweep.grid.model.dropout": [0.1, 0.2, 0.3]}))
    assert open_run(path).status == "finished"
    comparison = ComparisonRecord.require(path)
    assert [row.arm for row in comparison.table] == ["dropout=0.2", "dropout=0.3", "dropout=0.1"]
    assert [(row.image_set, row.rank) for row in comparison.table] == [(1, 1), (1, 2), (2, 1)]
    rows = {row["cell"]: (row["image_set"], row["rank"]) for row in read_csv(path / "sweep.csv")}
    assert rows == {"dropout=0.2": ("1", "1"), "dropout=0.3": ("1", "2"), "dropout=0.1": ("2", "1")}
    assert [(pair.a, pair.b) for pair in comparison.paired] == [("dropout=0.2", "dropout=0.3")]
    (note,) = [note for note in comparison.notes if note.startswith("Not compared")]
    assert note == (
        "Not compared with dropout=0.2: dropout=0.1, which was not judged on the same images with the same labels, or has no "
        "seed in common with it."
    )
    page = (path / "report.html").read_text()
    assert "Not compared with dropout=0.2" in page
    assert "Best on validation of the 2 cells of set 1 of images by accuracy: dropout=0.2." in page
    assert "Cells, ranked on validation within each set of images" in page


def test_an_axis_called_as_a_column_of_the_csv_keeps_its_values(file, options, plan):
    grid = {"status": {"low": {"model.dropout": 0.1}, "high": {"model.dropout": 0.2}}}
    path = SWEEP.start(file, set_keys(options, **{"sweep.grid": grid}))
    rows = {row["cell"]: row for row in read_csv(path / "sweep.csv")}
    assert {name: (row["axis status"], row["status"]) for name, row in rows.items()} == {
        "low": ("low", "finished"),
        "high": ("high", "finished"),
    }


@pytest.mark.slow
def test_failed_and_killed_cells_do_not_stop_the_rest_and_resume_runs_them_alone(file, options, plan):
    plan |= {"0.1": {"do": "fail"}, "0.2": {"do": "die"}}
    keys = set_keys(options, **{"sweep.grid.model.dropout": [0.1, 0.2, 0.3]})
    with pytest.raises(DlferError, match=r"2 of 3 members failed: dropout=0.1, seed 0: NonFiniteError: the loss"):
        SWEEP.start(file, keys)
    path = find_sweep()
    assert open_run(path).status == "failed"
    before = {m["arm"]: m for m in read_csv(path / "members.csv")}
    assert [m["status"] for m in before.values()] == ["failed", "failed", "finished"]
    assert before["dropout=0.1"]["error"] == "NonFiniteError: the loss became nan."
    assert before["dropout=0.2"]["error"] == "its process was ended by SIGKILL; it may have run out of memory, twice"
    assert Run(Path(before["dropout=0.2"]["path"])).status == "failed"
    cells = {row["cell"]: row for row in read_csv(path / "sweep.csv")}
    assert cells["dropout=0.1"]["status"] == "failed"
    assert cells["dropout=0.1"]["rank"] == ""
    assert "NonFiniteError" in cells["dropout=0.1"]["error"]
    assert "NonFiniteError: the loss became nan." in (path / "report.html").read_text()

    plan.clear()
    assert SWEEP.resume(path, replace(options, overrides={})) == path
    after = {m["arm"]: m for m in read_csv(path / "members.csv")}
    assert {m["status"] for m in after.values()} == {"finished"}
    assert {m["error"] for m in after.values()} == {""}
    assert {arm: m["path"] for arm, m in after.items()} == {arm: m["path"] for arm, m in before.items()}
    assert {arm: count_begun(m) for arm, m in after.items()} == {"dropout=0.1": 2, "dropout=0.2": 3, "dropout=0.3": 1}
    assert open_run(path).status == "finished"


def test_two_members_refused_for_one_reason_end_the_sweep(file, options, plan):
    plan |= {f"0.{i}": {"do": "refuse"} for i in range(1, 5)}
    with pytest.raises(
        UserError, match="first 2 members failed for the same reason, so the others were not begun: no such file"
    ):
        SWEEP.start(file, set_keys(options, **{"sweep.grid.model.dropout": [0.1, 0.2, 0.3, 0.4]}))
    statuses = [m["status"] for m in read_csv(find_sweep() / "members.csv")]
    assert statuses == ["failed", "failed", "pending", "pending"]


def signal_when_a_member_waits(number: signal.Signals) -> None:
    """Send this process a signal once two members have begun; the second waits."""

    def watch() -> None:
        while len(list(Path("runs/small").glob("*/trains"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


@pytest.mark.parametrize(
    ("number", "reason", "code"),
    [pytest.param(signal.SIGTERM, "SIGTERM", 143, marks=pytest.mark.slow), (signal.SIGINT, "Ctrl-C", 130)],
)
def test_a_stop_is_handed_on_and_what_finished_is_in_the_page(file, options, plan, number, reason, code):
    plan |= {"0.2": {"do": "wait"}}
    signal_when_a_member_waits(number)
    with pytest.raises(TrainingStopped) as caught:
        SWEEP.start(file, options)
    assert (caught.value.reason, caught.value.exit_code) == (reason, code)
    path = find_sweep()
    assert open_run(path).status == "stopped"
    members = read_csv(path / "members.csv")
    assert [m["status"] for m in members] == ["finished", "stopped"]
    assert Run(Path(members[1]["path"])).status == "stopped"
    assert "dropout=0.1" in (path / "report.html").read_text()
    plan.clear()
    SWEEP.resume(path, options)
    assert [m["status"] for m in read_csv(path / "members.csv")] == ["finished", "finished"]
    assert count_begun(members[0]) == 1


@pytest.mark.slow
def test_a_sweep_whose_process_was_killed_goes_on_and_waits_for_a_member_that_still_runs(file, options, plan):
    path = SWEEP.start(file, options)
    rows = read_csv(path / "members.csv")
    for row in rows:
        row["status"] = "running"
    with open(path / "members.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    open_run(path).update(status="running")
    orphan = Run(Path(rows[0]["path"]))
    orphan.update(status="running")

    def finish() -> None:
        with orphan.hold():
            held.set()
            time.sleep(0.5)
            orphan.finish()

    held = threading.Event()
    thread = threading.Thread(target=finish)
    thread.start()
    held.wait()
    SWEEP.resume(path, options)
    thread.join()
    members = read_csv(path / "members.csv")
    assert [m["status"] for m in members] == ["finished", "finished"]
    # Both were done: nothing was trained again.
    assert [count_begun(m) for m in members] == [1, 1]


@pytest.mark.slow
def test_two_processes_do_not_go_on_with_one_sweep(file, options, plan):
    path = SWEEP.start(file, options)
    with open_run(path).hold(), pytest.raises(ModelError, match=r"another process works on it \(process \d+ on "):
        SWEEP.resume(path, options)
    assert open_run(path).status == "finished"


@pytest.mark.slow
def test_members_moved_with_their_folder_are_found_and_one_that_is_gone_is_begun_anew(file, options, plan):
    path = SWEEP.start(file, options)
    moved = Path("elsewhere").resolve()
    Path("runs").rename(moved)
    path = moved / "small" / path.name
    rows = read_csv(path / "members.csv")
    for item in sorted((moved / "small" / Path(rows[1]["path"]).name).rglob("*"), reverse=True):
        item.rmdir() if item.is_dir() else item.unlink()
    SWEEP.resume(path, replace(options, out=None))
    members = read_csv(path / "members.csv")
    assert all(Path(m["path"]).parent == moved / "small" for m in members)
    assert [count_begun(m) for m in members] == [1, 1]
    assert members[1]["path"] != rows[1]["path"]


def test_workers_share_the_gpus_in_turn(file, options, plan, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    path = SWEEP.start(file, options)
    seen = {(Path(m["path"]) / "begun.txt").read_text().strip() for m in read_csv(path / "members.csv")}
    assert seen == {"4", "7"}


def test_without_a_sweep_or_with_a_wrong_grid_nothing_is_left_behind(file, options):
    with pytest.raises(ConfigError, match="there is no section sweep"):
        SWEEP.start(file, set_keys(options, sweep=None))
    with pytest.raises(ConfigError, match=r"Did you mean model\.dropout"):
        SWEEP.start(file, set_keys(options, **{"sweep.grid.model.dropuot": [1]}))
    assert not Path("runs").exists()


def test_the_table_for_the_terminal_names_what_did_not_finish(file, options, plan):
    plan |= {"0.1": {"do": "fail"}}
    with pytest.raises(DlferError):
        SWEEP.start(file, options)
    console = Console(width=120, record=True, quiet=False, file=open("table.txt", "w"))  # noqa: SIM115
    console.print(format_sweep_table(ComparisonRecord.require(find_sweep())))
    text = console.export_text()
    assert "dropout=0.2" in text
    assert "n = 60" in text
    assert "failed" in next(line for line in text.splitlines() if "dropout=0.1" in line)
