"""Family boosted from the command line: run, stop, resume, evaluate, compare, search."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.integration.conftest import command, dlfer, environment

BOOSTED = """
experiment: {name: small, seed: 1, deterministic: true}
model: {family: boosted, backbone: efficientnet_nano}
finetune:
  data: {source: synthetic_faces, num_images: {train: 160, validation: 48, test: 64}}
  epochs: 40
  batch_size: 16
  image_size: 32
  monitor: loss
boosting: {rounds_per_epoch: 2, max_depth: 3, subsample: 0.8, learning_rate: 0.02}
evaluate: {bootstrap: 100, num_train: 32}
search:
  trials: 2
  space:
    boosting.max_depth: {choice: [2, 3]}
"""


PRETRAIN = """
pretrain:
  data: {source: synthetic_scenes, num_images: {train: 32, validation: 16}}
  epochs: 1
  batch_size: 16
  image_size: 32
"""


@pytest.fixture
def boosted(tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(BOOSTED)
    return path


def find_run(out: Path) -> Path:
    return next(out.glob("small/*/run.json")).parent


def count_epochs(out: Path) -> int:
    try:
        return json.loads((find_run(out) / "finetune" / "state.json").read_text())["epoch"]
    except (StopIteration, FileNotFoundError):
        return 0


@pytest.mark.slow
def test_stopped_and_resumed_it_grows_the_same_trees_on_cached_features(boosted, tmp_path):
    out = tmp_path / "runs"
    process = subprocess.Popen(
        command("run", boosted, "--out", out), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and count_epochs(out) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    assert 3 <= count_epochs(out) < 40
    done = dlfer("run", "--resume", find_run(out))
    assert done.returncode == 0, done.stderr
    assert "features of train: taken from the cache" in done.stderr

    whole = dlfer("run", boosted, "--out", tmp_path / "whole", "--no-cache")
    assert whole.returncode == 0, whole.stderr
    assert not list((tmp_path / "whole").glob(".cache/features/*"))
    trees = [(find_run(folder) / "model" / "trees.json").read_bytes() for folder in (out, tmp_path / "whole")]
    assert trees[0] == trees[1]

    run = find_run(out)
    record = json.loads((run / "boosting.json").read_text())
    assert sum(level["gain"] for level in record["levels"]) == pytest.approx(1)
    assert {path.name for path in (run / "model").iterdir()} >= {"trees.json", "features.npz", "backbone.weights.h5"}
    page = (run / "report.html").read_text()
    for words in ("share of the gain", "top_activation", "rounds of trees", "It does not measure"):
        assert words in page
    assert "adamw" not in page.partition("config.yaml</summary>")[0].partition("The experiment")[2][:3000]
    judged = dlfer("evaluate", run)
    assert judged.returncode == 0, judged.stderr


@pytest.mark.slow
def test_a_dry_run_tells_features_memory_and_time_and_leaves_nothing(boosted, tmp_path):
    done = dlfer("run", boosted, "--dry-run", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    for words in ("features: 196 of 5 levels", "MiB on disk", "expected memory", "for all rounds", "are not used"):
        assert words in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_it_is_ablated_and_searched(boosted, tmp_path):
    boosted.write_text(BOOSTED + PRETRAIN)
    few = ("--set", "finetune.epochs=4")
    done = dlfer("ablate", boosted, "--seeds", "0", *few, "--out", tmp_path / "ablation")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "ablation").glob("small/*/boosting.json"))) == 2
    done = dlfer("search", boosted, *few, "--out", tmp_path / "search")
    assert done.returncode == 0, done.stderr
    rows = [path.read_text().splitlines() for path in (tmp_path / "search").glob("small/*/finetune/history.csv")]
    assert [len(lines) for lines in rows] == [5, 5]
    # Trials that differ in the trees alone share the features.
    assert len(list((tmp_path / "search").glob(".cache/features/*.npy"))) == 2


@pytest.mark.slow
def test_what_trees_do_not_have_is_refused(boosted, tmp_path):
    done = dlfer("run", boosted, "--set", "ablation.equal_compute=true", "--out", tmp_path / "runs")
    assert done.returncode == 2
    assert "do not cost what EF-FER1 costs" in done.stderr
