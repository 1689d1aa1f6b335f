"""An ensemble from its file to its report: members as runs of their own, stopped and resumed, trained ones as members."""

import json
from pathlib import Path

import numpy as np
import pytest

from dlfer.config.load import load_experiment
from dlfer.data.sources import load_data
from dlfer.errors import ProtocolError, TrainingStopped
from dlfer.experiment.run import resume_run, start_run
from dlfer.experiment.session import Session
from dlfer.metrics.predictions import read_predictions
from dlfer.model.families import load_artifact
from dlfer.model.predict import predict_views
from dlfer.runs.find import list_runs
from dlfer.runs.listeners import RunOptions
from dlfer.runs.member_rows import read_member_rows
from dlfer.train.progress import TrainingListener
from tests.integration.conftest import dlfer

FILE = """
experiment: {name: both}
model: {family: ensemble, dropout: 0.0}
finetune:
  data: {source: synthetic_faces, num_images: {train: 48, validation: 32, test: 24}}
  epochs: 2
  milestones: [1, 2]
  batch_size: 16
  image_size: 32
  crop: 0.8
  optimizer: {name: sgd, learning_rate: 0.01, momentum: 0.9}
  augment: {mirror: 0.5}
ensemble:
  combine: trained
  members:
    - {name: one, set: {model.backbone: efficientnet_nano, model.head.hidden: [8]}}
    - {name: two, set: {model.backbone: resnet_nano, finetune.batch_size: 24}}
evaluate: {bootstrap: 100, num_train: 16, views: [ten_crop], headline: ten_crop}
"""


class StopAfter(TrainingListener):
    def __init__(self, control, steps: int) -> None:
        super().__init__()
        self.control, self.left = control, steps

    def finish_step(self, step: int, loss: float, accuracy: float) -> None:
        super().finish_step(step, loss, accuracy)
        self.left -= 1
        if self.left == 0:
            self.control.request("SIGTERM")

    def say(self, text: str) -> None:
        """Keep quiet."""


def start(file, out, *, steps: int | None = None):
    session = Session.start(RunOptions(out=out))
    if steps is not None:
        session.listener = StopAfter(session.control, steps)
    return start_run(load_experiment(file), session)


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """Stopped in the second member's second epoch, and resumed."""
    folder = tmp_path_factory.mktemp("ensemble")
    file = folder / "both.yaml"
    file.write_text(FILE)
    out = folder / "runs"
    with pytest.raises(TrainingStopped):
        start(file, out, steps=2 * 3 + 3)
    statuses = {run.name.split("/")[0]: run.status for run in list_runs(out)}
    assert statuses == {"both": "stopped", "both-one": "finished", "both-two": "stopped"}
    stopped = next(run.path for run in list_runs(out) if run.name.startswith("both/"))
    assert [member.status for member in read_member_rows(stopped)] == ["finished", "stopped"]
    return resume_run(stopped, RunOptions(out=out))


def read(run, name: str):
    return json.loads((run / name).read_text())


@pytest.mark.slow
def test_a_stopped_ensemble_trains_no_member_twice(ensemble):
    runs = list_runs(ensemble.parent.parent)
    assert sorted(run.name.split("/")[0] for run in runs) == ["both", "both-one", "both-two"]
    assert {run.status for run in runs} == {"finished"}
    one = next(run.path for run in runs if run.name.startswith("both-one"))
    assert (one / "log.jsonl").read_text().count('"finetune_start"') == 1
    members = read_member_rows(ensemble)
    assert [(member.arm, member.status, bool(member.digest)) for member in members] == [
        ("one", "finished", True),
        ("two", "finished", True),
    ]


@pytest.mark.slow
def test_its_figures_are_those_of_its_saved_model(ensemble):
    """What was put together from the members' files is what the model in the folder answers."""
    stage = load_experiment(ensemble / "config.yaml").finetune
    test = load_data(stage.data, image_size=stage.native_size).test
    classifier = load_artifact(ensemble / "model")
    kept = read_predictions(ensemble / "predictions" / "test.npz")
    assert np.array_equal(kept.ids, test.ids)
    assert np.allclose(kept.probabilities, classifier.predict(test.images), atol=1e-5)
    viewed = read_predictions(ensemble / "predictions" / "views" / "ten_crop" / "test.npz")
    assert np.allclose(viewed.probabilities, predict_views(classifier, test.images, "ten_crop"), atol=1e-5)
    # On validation, which the combination was fitted on, what counts is out of fold.
    validation = read_predictions(ensemble / "predictions" / "validation.npz")
    images = load_data(stage.data, image_size=stage.native_size).validation.images
    assert not np.allclose(validation.probabilities, classifier.predict(images), atol=1e-3)


@pytest.mark.slow
def test_members_combinations_and_milestones_stand_beside_it(ensemble):
    metrics = read(ensemble, "metrics.json")
    assert [row["name"] for row in metrics["members"]] == ["one", "two"]
    assert [(row["name"], row["is_used"]) for row in metrics["combinations"]] == [
        ("average", False),
        ("vote", False),
        ("trained", True),
    ]
    used = metrics["combinations"][2]["test"]["accuracy"]
    assert used == metrics["views"]["ten_crop"]["test"]["accuracy"]
    for member, row in zip(read_member_rows(ensemble), metrics["members"], strict=True):
        own = read(Path(member.path), "metrics.json")
        assert row["test"]["accuracy"] == own["views"]["ten_crop"]["test"]["accuracy"]
        found = [stage["members"] for stage in metrics["ensemble"]["milestones"]]
        milestones = [next(m for m in rows if m["name"] == row["name"])["test"]["accuracy"] for rows in found]
        assert milestones == [stage["test"]["accuracy"] for stage in own["milestones"]]
    assert [row["epoch"] for row in metrics["milestones"]] == [1, 2]
    assert (
        metrics["milestones"][1]["test"]["accuracy"]
        == (metrics["ensemble"]["milestones"][1]["combinations"][2]["test"]["accuracy"])
    )
    assert metrics["ensemble"]["paired"]["part"] == "test"
    # Once for the model, once for each milestone.
    assert metrics["test_opened"] == 3


@pytest.mark.slow
def test_what_members_add_and_the_final_labels_stand_beside_it(ensemble):
    metrics = read(ensemble, "metrics.json")
    growth, members = metrics["ensemble"]["growth"], {row["name"]: row for row in metrics["members"]}
    assert sorted(row["added"] for row in growth) == ["one", "two"]
    assert growth[0]["validation"]["accuracy"] == members[growth[0]["added"]]["validation"]["accuracy"]
    assert members[growth[0]["added"]]["validation"]["accuracy"]["value"] == max(
        row["validation"]["accuracy"]["value"] for row in members.values()
    )
    assert growth[1]["test"]["accuracy"] == metrics["combinations"][0]["test"]["accuracy"]
    final = metrics["ensemble"]["final_labels"]
    assert [row["name"] for row in final] == ["one", "two", "ensemble"]
    for member, row in zip(read_member_rows(ensemble), final, strict=False):
        kept = read_predictions(Path(member.path) / "predictions" / "views" / "ten_crop" / "test.npz")
        for label, answer in row["labels"].items():
            of_label = kept.predicted[kept.targets == kept.labels.index(label)]
            times = [int((of_label == number).sum()) for number in range(len(kept.labels))]
            assert times[kept.labels.index(answer["label"])] == max(times)
            assert answer["n"] == len(of_label)
    for member in read_member_rows(ensemble):
        blocks = read(Path(member.path), "network.json")["blocks"]
        assert [block["name"] for block in blocks[-2:]] == ["feature level 5", "head"]
        assert all(block["trained"] == block["parameters"] - block["statistics"] for block in blocks)


@pytest.mark.slow
def test_the_report_has_the_members_and_the_milestones(ensemble):
    page = (ensemble / "report.html").read_text()
    for text in (
        "Members and combinations, test",
        "ensemble: trained on validation",
        "epoch 2",
        "Milestones, test",
        "Final emotion",
    ):
        assert text in page
    assert (ensemble / "figures" / "members.png").exists()
    assert (ensemble / "figures" / "milestones.png").exists()


@pytest.mark.slow
def test_trained_runs_are_members_of_another_ensemble(ensemble, tmp_path):
    """Those of the same data; one that was trained on this test split is refused."""
    members = read_member_rows(ensemble)
    file = tmp_path / "given.yaml"
    given = "\n".join(f"    - {{name: m{i}, model: {member.path}}}" for i, member in enumerate(members))
    file.write_text(FILE.split("  members:")[0] + f"  members:\n{given}\n" + FILE[FILE.index("evaluate:") :])
    path = start(file, tmp_path / "runs", steps=10**6)
    assert [member.status for member in read_member_rows(path)] == ["given", "given"]
    figures = [read(run, "metrics.json")["combinations"][0]["test"] for run in (path, ensemble)]
    assert figures[0] == figures[1]
    leaking = tmp_path / "leaking.yaml"
    leaking.write_text(file.read_text().replace("test: 24}}", "test: 24}, protocol: resplit}"))
    with pytest.raises(ProtocolError, match="was trained on"):
        start(leaking, tmp_path / "runs", steps=10**6)


@pytest.mark.slow
def test_kept_predictions_of_other_images_are_not_taken_for_these(ensemble, tmp_path):
    """The same ids with other pixels behind them: the members are asked again, and have no milestones here."""
    members = read_member_rows(ensemble)
    file = tmp_path / "other.yaml"
    given = "\n".join(f"    - {{name: m{i}, model: {member.path}}}" for i, member in enumerate(members))
    text = FILE.split("  members:")[0] + f"  members:\n{given}\n" + FILE[FILE.index("evaluate:") :]
    file.write_text(text.replace("test: 24}}", "test: 24}, seed: 3}").replace("combine: trained", "combine: vote"))
    path = start(file, tmp_path / "runs", steps=10**6)
    metrics = read(path, "metrics.json")
    assert metrics["ensemble"]["milestones"] == []
    assert "milestones" not in metrics
    own = read_predictions(path / "predictions" / "test.npz")
    before = read_predictions(ensemble / "predictions" / "test.npz")
    assert np.array_equal(own.ids, before.ids)
    classifier = load_artifact(path / "model")
    stage = load_experiment(path / "config.yaml").finetune
    test = load_data(stage.data, image_size=stage.native_size).test
    assert np.allclose(own.probabilities, classifier.predict(test.images), atol=1e-5)


@pytest.mark.slow
def test_members_are_trained_in_processes_of_their_own_by_the_command(tmp_path):
    """As `dlfer run` does; the ensemble that is put together is the same."""
    file = tmp_path / "both.yaml"
    file.write_text(FILE)
    done = dlfer("run", file, "--smoke", "--out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.split()[0])
    pids = {read(Path(row.path), "run.json")["pid"] for row in read_member_rows(run)}
    assert len(pids | {read(run, "run.json")["pid"]}) == 3
    assert [row.status for row in read_member_rows(run)] == ["finished", "finished"]
