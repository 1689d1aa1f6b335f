"""A sweep with real processes: small, but through every step of a run."""

import csv
import json
from pathlib import Path

import pytest

from tests.integration.conftest import dlfer


@pytest.mark.slow
def test_two_cells_train_in_processes_of_their_own(small, tmp_path):
    """EF-FER1 is in one cell and not in the other: an ablation is a sweep of two."""
    grid = "sweep.grid.ef_fer1={with: {}, without: {pretrain: null}}"
    best_of = ("--set", "sweep.best_of=[ef_fer1]")
    done = dlfer("sweep", small, "--set", grid, *best_of, "--smoke", "--workers", "2", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    path, page = map(Path, done.stdout.split())
    assert page == path / "report.html"
    assert "Best on validation by accuracy: with" in page.read_text()
    with open(path / "members.csv", newline="") as file:
        members = list(csv.DictReader(file))
    assert [(m["arm"], m["status"]) for m in members] == [("with", "finished"), ("without", "finished")]
    with open(path / "best.csv", newline="") as file:
        rows = {row["cell"]: row for row in csv.DictReader(file)}
    for member in members:
        run = Path(member["path"])
        assert (run / "report.html").exists()
        assert (run / "transfer.json").exists() == (member["arm"] == "with")
        # Several at a time do not talk into one another.
        assert "EF-FER2" in (run / "console.txt").read_text()
        assert sum(json.loads(line)["event"] == "test_opened" for line in (run / "log.jsonl").open()) == 1
        best = rows[member["arm"]]
        plan = f"EF-FER2: {int(best['num_parameters']):,} parameters; {best['optimizer']} (weight decay 0.004, decoupled, kernels only); rate"
        assert plan in (run / "console.txt").read_text()
        assert (best["steps_an_epoch"], best["num_cells"]) == ("2", "1")
    assert "EF-FER2 epoch" not in done.stderr
    again = dlfer("run", "--resume", members[0]["path"])
    assert "is finished already" in again.stderr
