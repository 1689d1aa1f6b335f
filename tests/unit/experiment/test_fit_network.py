"""What a run makes of a stage that starts from random weights, and where it says so."""

import json

import numpy as np
import pytest

from dlfer.data.bundle import Split
from dlfer.data.sources import load_data
from dlfer.experiment.fit_network import draw_images
from dlfer.metrics.predictions import read_predictions
from dlfer.model.families import load_artifact
from dlfer.runs.files import read_rows
from dlfer.runs.find import open_run

EXPERIMENT = """
experiment: {name: tiny, seed: 1, device: cpu}
model: {backbone: resnet_nano, dropout: 0.0}
pretrain:
  data: {source: synthetic_scenes, num_images: {train: 16, validation: 8}}
  epochs: 2
  batch_size: 8
  image_size: 32
  freeze: {head_epochs: 1, batch_norm: frozen}
finetune:
  data: {source: synthetic_faces, num_images: {train: 16, validation: 8, test: 8}}
  epochs: 2
  batch_size: 8
  image_size: 32
  freeze: {head_epochs: 1, head_learning_rate: 0.01}
evaluate: {bootstrap: 100, num_train: 0}
"""


@pytest.fixture
def run(tmp_path, call):
    """Run the experiment with these arguments; return the run's folder and what was said."""
    file = tmp_path / "tiny.yaml"
    file.write_text(EXPERIMENT)

    def run(*arguments):
        code, out, err = call("run", str(file), "--out", str(tmp_path / "runs"), *arguments)
        assert code == 0, err
        folders = sorted((tmp_path / "runs").glob("tiny/*"))
        return (folders[-1] if folders else None), out + err

    return run


def read_phases(path):
    return [row["phase"] for row in read_rows(path / "history.csv")]


@pytest.mark.slow
def test_without_ef_fer1_the_head_is_not_trained_alone(run):
    folder, said = run("--set", "pretrain=null")
    note = "EF-FER2 starts from random weights, so that freeze (head_epochs: 1) is not applied"
    assert read_phases(folder / "finetune") == ["all", "all"]
    assert said.count(note) == 1
    record = json.loads((folder / "run.json").read_text())
    assert [text for text in record["warnings"] if text.startswith(note)]
    assert note in (folder / "report.html").read_text()
    plan = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert not any("head alone" in line.get("text", "") for line in plan if line["event"] == "plan")


@pytest.mark.slow
def test_with_ef_fer1_the_head_is_and_ef_fer1_itself_is_not_frozen(run):
    folder, said = run()
    note = "EF-FER1 starts from random weights, so that freeze (head_epochs: 1, batch_norm: frozen)"
    assert said.count(note) == 1
    assert "EF-FER2 starts from random weights" not in said
    assert read_phases(folder / "pretrain") == ["all", "all"]
    assert read_phases(folder / "finetune") == ["head", "all"]
    warnings = json.loads((folder / "run.json").read_text())["warnings"]
    assert [text.startswith(note) for text in warnings] == [True]


@pytest.mark.slow
def test_a_network_trained_in_bfloat16_is_judged_and_kept_in_float32(run):
    keys = ("experiment.precision=mixed_bfloat16", "finetune.milestones=[1]", "finetune.freeze.head_epochs=0")
    folder, said = run(*(word for key in keys for word in ("--set", key)))
    model = load_artifact(folder)
    found = read_predictions(folder / "predictions" / "test.npz")
    bundle = load_data(open_run(folder).config().finetune.data, image_size=32)
    np.testing.assert_allclose(model.predict(bundle.test.images), found.probabilities, atol=1e-4)
    assert (folder / "model" / "network.onnx").is_file(), said
    # Its backbone is one for a run in float32, and for one in bfloat16.
    for precision in ("float32", "mixed_bfloat16"):
        run("--set", f"pretrain={{weights: {folder / 'pretrain'}}}", "--set", f"experiment.precision={precision}")


def test_a_dry_run_says_what_would_not_be_applied(run):
    folder, said = run("--dry-run", "--set", "pretrain=null")
    assert folder is None
    assert "freeze (head_epochs: 1) is not applied" in said
    assert "rate 0.001 (constant)" in said
    _, said = run("--dry-run")
    assert "EF-FER1 starts from random weights" in said
    assert "EF-FER2: " in said
    assert "head alone for 1 epoch at rate 0.01, then rate 0.001 (constant)" in said


def test_published_weights_with_another_scaling_are_told_in_a_dry_run(run):
    keys = ("pretrain={weights: imagenet}", "model.pixel_scaling=divide_by_255", "model.backbone=efficientnet_lite2")
    _, said = run("--dry-run", *(word for key in keys for word in ("--set", key)))
    assert "the published weights were trained with the backbone's own scaling" in said


@pytest.mark.slow
def test_keys_beside_weights_are_told_to_change_nothing(run):
    data = "data: {source: synthetic_scenes}, epochs: 50, optimizer: {learning_rate: 0.1}"
    keys = (f"pretrain={{weights: imagenet, {data}}}", "model.backbone=efficientnet_lite2")
    _, said = run("--dry-run", *(word for key in keys for word in ("--set", key)))
    line = next(line for line in said.splitlines() if "without effect" in line)
    for key in ("data", "epochs", "optimizer"):
        assert f"{key} (weights are given, and not trained further)" in line
    _, said = run("--dry-run", "--set", "pretrain={weights: imagenet}", "--set", "model.backbone=efficientnet_lite2")
    assert "without effect" not in said


@pytest.mark.slow
def test_a_milestone_that_early_stopping_comes_before_is_told(run):
    keys = ("pretrain=null", "finetune.epochs=4", "finetune.milestones=[1, 4]", "finetune.freeze={}")
    stop = "finetune.early_stopping={patience: 1, min_delta: 0.99}"
    folder, said = run(*(word for key in (*keys, stop) for word in ("--set", key)))
    expected = "EF-FER2 ended after 2 epochs, so that there is no row of the milestones 4."
    assert expected in said
    assert expected in json.loads((folder / "run.json").read_text())["warnings"]


def test_images_for_statistics_are_drawn_without_replacement_by_the_seed():
    images = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    split = Split("train", images, np.zeros(20, np.int64), np.array([f"i{n}" for n in range(20)]))
    first, again, other = (draw_images(split, 8, seed=seed)[:, 0, 0, 0] for seed in (0, 0, 1))
    assert len(set(first)) == 8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(draw_images(split, 1000, seed=0)) == 20


class Stream:
    """Of 130 images, read as StreamedSplit has them."""

    def batches(self, batch_size, *, seed, epoch, training):
        assert training
        for start in range(0, 130 - batch_size + 1, batch_size):
            yield np.full((batch_size, 4, 4, 3), start, np.uint8), None, None


@pytest.mark.parametrize(("number", "found"), [(60, 60), (1000, 100)])
def test_images_of_a_stream_are_the_first_of_its_first_epoch(number, found):
    assert draw_images(Stream(), number, seed=0).shape == (found, 4, 4, 3)
